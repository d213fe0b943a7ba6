"""Every layer, cell and model in torch's `fully_shard`: each of their modules can be sharded, and saved."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import LAYERS
from rank_threads import on_threads
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from minrnn.files import write_directory
from minrnn.mixers import GATED_RNNS, MIXERS, PairedMinLSTM, PairedMinLSTMCell
from minrnn.mixers.convolution import CausalConv
from minrnn.models import ModelConfig, SequenceModel, checkpoint, load_checkpoint, save_checkpoint
from minrnn.models.checkpoint import load_tensors, save_tensors, send_tensors
from minrnn.models.shards import divided_like, gathered, is_sharded, own_part

pytestmark = pytest.mark.filterwarnings("ignore:.*returned a view tensor")  # torch's: nothing writes into it

GRADIENTS = 2e-6


def shard(model: nn.Module, names: list[str]) -> None:
    """Shard some modules of a model by themselves, the last one first."""
    mesh = init_device_mesh("cpu", (2,))
    for name in reversed(names):
        fully_shard(model.get_submodule(name), mesh=mesh)


def with_parameters(model: nn.Module) -> list[str]:
    """Return the names of the modules that can be sharded; an inner module comes after those it is in."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None and not isinstance(module, nn.ModuleList)
    ]


def check(model: nn.Module, names: list[str], loss: Callable[[nn.Module, int], Tensor]) -> None:
    """Hold the gradients of a model with sharded modules to those of the whole, two ranks' inputs' mean.

    Args:
        model: the model.
        names: the modules that are sharded.
        loss: computes the loss of a model on a rank's input.
    """

    def on_rank(rank: int) -> dict[str, Tensor]:
        own = copies[rank]
        shard(own, names)
        for _ in range(2):  # a second time, as torch prepares much in the first
            own.zero_grad()
            loss(own, rank).backward()
        return {name: gathered(x.grad) for name, x in own.named_parameters()}

    copies = [copy.deepcopy(model) for _ in range(2)]
    found = on_threads(2, on_rank)
    (sum(loss(model, rank) for rank in range(2)) / 2).backward()
    largest = max(float(x.grad.abs().max()) for x in model.parameters())
    for name, x in model.named_parameters():
        for gradients in found:
            assert (gradients[name] - x.grad).abs().max() <= GRADIENTS * largest, name


def call(model: nn.Module, x: Tensor) -> Tensor:
    """Return a number that depends on everything a module returns."""
    found = model(x)
    leaves = torch.utils._pytree.tree_leaves(found)
    return torch.stack([leaf.square().mean() for leaf in leaves if leaf.is_floating_point()]).sum()


# --- gradients -------------------------------------------------------------------------------------------

INPUTS = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
"""Of two ranks, (2, B, T, D)."""

TOKENS = torch.randint(11, (2, 3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", LAYERS)
def test_layers(gate: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[gate](4, 5, num_layers=2, batch_first=True, bidirectional=True)
    check(layer, [""], lambda own, rank: call(own, INPUTS[rank]))


@pytest.mark.parametrize("kind", [*(row.cell for row in GATED_RNNS.values()), PairedMinLSTMCell])
def test_cells(kind: type[nn.Module]) -> None:
    check(kind(4, 5), [""], lambda own, rank: call(own, INPUTS[rank, :, 0]))


@pytest.mark.parametrize("kind", [lambda: PairedMinLSTM(4, 5), lambda: CausalConv(4, 3)])
def test_other_modules(kind: Callable[[], nn.Module]) -> None:
    check(kind(), [""], lambda own, rank: call(own, INPUTS[rank]))


def model_of(mixer: str, **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(vocab_size=11, d_model=8, num_layers=1, mixer=mixer, **options))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_module_of_models(mixer: str) -> None:
    """All of them, each by itself; and the embedding, which is the head as well."""
    model = model_of(mixer, tie_embeddings=True)
    check(model, with_parameters(model), lambda own, rank: call(own, TOKENS[rank]))


@pytest.mark.parametrize("tied", [False, True])
def test_losses_of_models_with_a_sharded_head(tied: bool) -> None:
    """`SequenceModel.loss` is called by a module, as torch runs no other method of a sharded one."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of("mingru", tie_embeddings=tied)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model.loss(tokens[:, :-1], tokens[:, 1:])[0]

    head = "model.embedding" if tied else "model.head"
    check(Trained(), ["", "model.blocks.0", head], lambda own, rank: own(TOKENS[rank]))


# --- files -----------------------------------------------------------------------------------------------


def save_on_two(model: nn.Module, directory: Path, prepare: Callable[[Any], object], **options: Any) -> None:
    copies = [copy.deepcopy(model) for _ in range(2)]

    def on_rank(rank: int) -> None:
        prepare(copies[rank])
        save_checkpoint(directory, copies[rank], **options)

    on_threads(2, on_rank)


def shard_blocks(model: Any) -> None:
    shard(model, ["", *(f"blocks.{index}" for index in range(len(model.blocks)))])


def shard_and_call(model: Any) -> None:
    """Leave the weights whole that the first call leaves so."""
    shard_blocks(model)
    with torch.no_grad():
        model(TOKENS[0])
    assert not is_sharded(model.embedding.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prepare", [shard_blocks, shard_and_call])
def test_sharded_models_are_saved_as_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, prepare: Callable[[Any], object]
) -> None:
    model, writers = model_of("mingru", tie_embeddings=tied), []

    def write(folder: Path) -> Any:
        writers.append(distributed.get_rank())
        return write_directory(folder)

    monkeypatch.setattr(checkpoint, "write_directory", write)
    save_on_two(model, tmp_path / "a", prepare, extra={"step": 3}, files={"a.txt": "b"})
    loaded, extra = load_checkpoint(tmp_path / "a")
    assert extra == {"step": 3}
    assert writers == [0]
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert (tmp_path / "a" / "a.txt").read_text() == "b"


def test_what_differs_from_its_config_is_refused_on_every_rank(tmp_path: Path) -> None:
    def prepare(model: Any) -> None:
        model.norm = nn.Identity()
        shard_blocks(model)

    with pytest.raises(ValueError, match=r"missing: norm.bias, norm.weight"):
        save_on_two(model_of("mingru"), tmp_path / "a", prepare)
    assert not (tmp_path / "a").exists()


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def test_files_are_written_tensor_by_tensor(tmp_path: Path) -> None:
    """Of every dtype and of sizes that are odd, or none; some are not sharded."""
    shapes = ((5, 3), (1,), (4, 0), (2, 3, 3))
    wholes = {
        f"{dtype} {shape}": (torch.arange(60)[: torch.Size(shape).numel()].view(shape) % 2).to(dtype)
        for dtype, shape in itertools.product(DTYPES, shapes)
    }
    wholes["transposed"] = torch.arange(6.0).view(2, 3).T
    wholes["a number"] = torch.tensor(3.5)

    def on_rank(rank: int) -> None:
        like = nn.Linear(3, 5)
        fully_shard(like, mesh=init_device_mesh("cpu", (2,)))
        tensors = {
            name: x if name == "a number" or "uint8" in name else divided_like(x, like.weight)
            for name, x in wholes.items()
        }
        assert is_sharded(tensors["transposed"])
        assert own_part(tensors["transposed"]).shape == (2 - rank, 2)
        if rank == 0:
            save_tensors(tmp_path / "a", tensors)
        else:
            send_tensors(tensors)

    on_threads(2, on_rank)
    found = load_tensors(tmp_path / "a")
    assert found.keys() == wholes.keys()
    for name, x in wholes.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x), name
    save_tensors(tmp_path / "b", wholes)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
