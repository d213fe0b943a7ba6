"""Decoder: its steps equal the model's forward, with either backend, for batches and rows of pools."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gated import RECURRENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GATES
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from minrnn.mixers import GATED_RNNS, MIXERS
from minrnn.models import (
    TOKENS,
    DecisionConfig,
    DecisionModel,
    Decoder,
    ModelConfig,
    SequenceModel,
    Steps,
    fused_step,
    map_state,
)
from minrnn.models.block import ACTIVATIONS
from minrnn.models.sequence import NORMS
from minrnn.ops import CANDIDATES
from minrnn.ops.registry import forced, load
from minrnn.training.threads import cpu_threads

HERE = Path(__file__).parent
V = 11
TOLERANCE = 2e-5  # of float32 through some layers, relative to the largest number

MinCell = dict[str, Any]
CELLS: list[MinCell] = [{"mixer": name, **options} for name, options in RECURRENCES.values()]

compiled = pytest.mark.skipif(
    isinstance(load("cpp"), ImportError) or forced() not in (None, "cpp"),
    reason="the compiled engine is missing or disabled",
)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def build(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(**{"vocab_size": V, "d_model": 20, "num_layers": 2, **options}))
    return with_other_vectors(model.eval())


def with_other_vectors(model: Any) -> Any:
    """Draw biases and scales, which start at 0 and 1, where it would not be seen that one is not used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_tokens(rows: int, steps: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, steps), generator=torch.Generator().manual_seed(seed))


class Counting:
    """A compiled step that notes the rows of each call."""

    def __init__(self, step: Any, found: list[int]) -> None:
        self.step, self.found = step, found

    def run(self, rows: int, *arguments: Any) -> bool:
        self.found.append(rows)
        return self.step.run(rows, *arguments)


@contextmanager
def counted(decoder: Decoder) -> Iterator[list[int]]:
    """Collect the rows of each step that the engine takes."""
    found: list[int] = []
    fused = decoder._fused
    if fused is None:
        yield found
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_step", Counting(fused._step, found))
        yield found


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)  # type: ignore[func-returns-value]
    return found


def assert_equal(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    pairs = zip((actual[0], *tensors_of(actual[1])), (expected[0], *tensors_of(expected[1])), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * scale)


def one(inputs: Any, t: int = 0) -> Any:
    """The inputs of one step, as a decoder takes them, of those `(B, T)` of a model."""
    if isinstance(inputs, Steps):
        return Steps(*(part[:, t : t + 1] for part in inputs))
    return inputs[:, t]


def forward(model: Any, inputs: Any, state: Any = None) -> tuple[Tensor, Any]:
    """The outputs after the last of some steps, and the state, by the model's own forward."""
    with torch.no_grad():
        outputs, state = model(inputs, state)
    return outputs[:, -1], state


def check_steps(model: SequenceModel, rows: int = 3, steps: int = 6) -> None:
    """Steps in one call are steps of the model, and those of one pass."""
    tokens = make_tokens(rows, steps)
    decoder = Decoder(model)
    assert decoder.backend == "cpp", decoder.reason
    ours: Any = None
    theirs: Any = None
    outputs = []
    with torch.no_grad():
        for t in range(steps):
            with counted(decoder) as calls:
                logits, ours = decoder.step(tokens[:, t], ours)
            assert calls == [rows]
            expected, theirs = forward(model, tokens[:, t : t + 1], theirs)
            assert_equal((logits, ours), (expected, theirs))
            outputs.append(logits)
        assert_equal((torch.stack(outputs, dim=1), ours), model(tokens))


# --- laws ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_steps_of_every_cell(cell: MinCell, candidate: str) -> None:
    check_steps(build(**cell, candidate=candidate))


def test_every_gate_of_a_mixer_is_among_the_cells() -> None:
    layers = [build(**cell).blocks[0].mixer.rnn for cell in CELLS]
    forms = {(form.gate, form.signed) for form in GATES.values()}
    assert {(layer.gate, layer.signed) for layer in layers} == forms - {("identity", False)}


@compiled
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("conv_width", [0, 1, 4])
def test_steps_of_every_block(norm: str, activation: str, conv_width: int) -> None:
    options = {"norm": norm, "mlp_activation": activation, "conv_width": conv_width}
    check_steps(build(**options))
    check_steps(build(**options, residual=False, bias=False, mlp_ratio=1.3, tie_embeddings=True))


@compiled
@settings(max_examples=40)
@given(
    d_model=st.integers(1, 70),
    expansion=st.sampled_from([0.5, 1.0, 2.5]),
    mlp_ratio=st.sampled_from([0.0, 0.5, 2.0]),
    num_layers=st.integers(1, 3),
    rows=st.integers(1, 20),
    cell=st.sampled_from(CELLS),
)
def test_steps_of_every_size(rows: int, cell: MinCell, **options: Any) -> None:
    check_steps(build(**cell, **options), rows, steps=3)


@compiled
def test_threads_change_nothing() -> None:
    model = build(d_model=520, mlp_activation="swiglu", conv_width=4)
    results = []
    for threads in (1, 3):
        with cpu_threads(threads):
            logits, state = Decoder(model).step(make_tokens(2)[:, 0])
        results.append([logits, *tensors_of(state)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@compiled
def test_rows_do_not_meet() -> None:
    model, tokens = build(), make_tokens(5)
    decoder = Decoder(model)
    together, _ = decoder.step(tokens[:, 0])
    apart = [decoder.step(tokens[row])[0] for row in range(5)]
    assert torch.equal(together, torch.cat(apart))


@compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, 1e20, -1e20, 40.0, -40.0, 1e-30, 0.0])
def test_activations_of_extreme_numbers(activation: str, value: float) -> None:
    """NaN comes out where it went in, and nothing overflows on the way."""
    model = build(norm="none", conv_width=0, mlp_activation=activation, num_layers=1, d_model=4)
    block = model.blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.mlp.up.bias.fill_(value)
        block.mlp.down.weight.fill_(1.0)
        assert model.head is not None
        model.head.weight.fill_(1.0)
        model.embedding.weight.zero_()
    decoder = Decoder(model)
    with counted(decoder) as calls:
        ours, _ = decoder.step(make_tokens(1)[:, 0])
    assert len(calls) == 1
    theirs, _ = forward(model, make_tokens(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


@compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa: str) -> None:
    from minrnn.ops import cpu

    names = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if names.index(isa) > names.index(cpu.ISA):
        pytest.skip(f"this processor has {cpu.ISA} at most")
    program = "import test_decoder; test_decoder.check_instruction_set()"
    environment = {**os.environ, "MINRNN_ISA": isa, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def check_instruction_set() -> None:
    from minrnn.ops import cpu

    for cell, activation, d_model in itertools.product(CELLS, ACTIVATIONS, (5, 36)):
        check_steps(build(**cell, mlp_activation=activation, d_model=d_model), steps=2)
    print(cpu.ISA)


# --- policies -----------------------------------------------------------------------------------------


def policy(**options: Any) -> DecisionModel:
    torch.manual_seed(0)
    model = DecisionModel(
        DecisionConfig(ModelConfig(d_model=20, num_layers=2), 5, 3, **options, return_scale=10.0)
    )
    model.set_statistics(
        torch.randn(5), torch.rand(5) + 0.5, None if model.config.discrete else torch.ones(3) * 2
    )
    return with_other_vectors(model.eval())


def one_step(model: DecisionModel, seed: int, time: int) -> Steps:
    torch.manual_seed(seed)
    previous = torch.randint(-1, 3, (4, 1)) if model.config.discrete else torch.randn(4, 1, 3)
    return Steps(30 * torch.randn(4, 1), torch.randn(4, 1, 5), previous, torch.full((4, 1), time))


@compiled
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("max_steps", [0, 9])
def test_steps_of_policies(tokens: str, discrete: bool, max_steps: int) -> None:
    model = policy(tokens=tokens, discrete=discrete, max_steps=max_steps)
    ours: Any = None
    theirs: Any = None
    decoder, at_once = Decoder(model), tokens != "interleaved" and not max_steps
    assert decoder.backend == ("cpp" if at_once else "torch")
    for time in range(4):
        steps = one_step(model, time, time)
        with counted(decoder) as calls:
            actions, ours = decoder.step(steps, ours)
        assert len(calls) == at_once
        expected, theirs = forward(model, steps, theirs)
        assert_equal((actions, ours), (expected, theirs))


# --- every mixer, either kind of model ------------------------------------------------------------------

KINDS = ["sequence", *(f"decision-{tokens}" for tokens in TOKENS)]
every_kind = pytest.mark.parametrize("kind", KINDS)
BATCH, T = 3, 7


def model_of(kind: str, mixer: str = "mingru", **options: Any) -> SequenceModel | DecisionModel:
    """A small model of one of KINDS."""
    torch.manual_seed(0)
    trunk: dict[str, Any] = {"d_model": 24, "num_layers": 2, "mixer": mixer, **options}
    if kind == "sequence":
        return SequenceModel(ModelConfig(vocab_size=V, **trunk)).eval()
    config = DecisionConfig(ModelConfig(**trunk), 5, 3, tokens=kind.removeprefix("decision-"))
    return DecisionModel(config).eval()


def inputs_of(model: SequenceModel | DecisionModel, batch: int = BATCH, steps: int = T, seed: int = 1) -> Any:
    if isinstance(model, SequenceModel):
        return make_tokens(batch, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, steps, *sizes, generator=generator) for sizes in ((), (5,), (3,))]
    return Steps(*parts, torch.arange(steps).expand(batch, steps))


def up_to(inputs: Any, t: int) -> Any:
    return Steps(*(part[:, :t] for part in inputs)) if isinstance(inputs, Steps) else inputs[:, :t]


@every_mixer
@every_kind
def test_a_decoder_is_the_model(kind: str, mixer: str) -> None:
    """Prompts and steps give what forward gives; states go from either to the other."""
    model = model_of(kind, mixer)
    decoder, inputs = Decoder(model), inputs_of(model)
    whole, _ = forward(model, inputs)
    outputs, state = decoder.prefill(up_to(inputs, 3))
    assert_equal((outputs, state), forward(model, up_to(inputs, 3)))
    for t in range(3, T):
        now = one(inputs, t)
        piece = now if isinstance(now, Steps) else now.unsqueeze(1)
        if t % 2:
            outputs, state = decoder.step(now, state)
        else:
            outputs, state = forward(model, piece, state)
    torch.testing.assert_close(outputs, whole, rtol=0, atol=TOLERANCE * 10)
    assert not outputs.requires_grad
    assert decoder.backend == ("cpp" if is_fused(kind, mixer) else "torch")


def is_fused(kind: str, mixer: str) -> bool:
    has_engine = not isinstance(load("cpp"), ImportError) and forced() in (None, "cpp")
    return has_engine and mixer in GATED_RNNS and kind != "decision-interleaved"


@every_kind
def test_a_step_does_not_change_the_state_that_it_starts_from(kind: str) -> None:
    model = model_of(kind)
    decoder, inputs = Decoder(model), inputs_of(model)
    _, state = decoder.step(one(inputs))
    kept = map_state(torch.clone, state)
    again = [decoder.step(one(inputs, 1), state)[0] for _ in range(2)]
    assert torch.equal(*again)
    assert all(map(torch.equal, tensors_of(state), tensors_of(kept)))


def test_a_prompt_is_read_with_its_resets() -> None:
    model = model_of("sequence")
    tokens, reset = make_tokens(2, 5), torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        expected, after = model(tokens, reset=reset)
    assert_equal(Decoder(model).prefill(tokens, reset=reset), (expected[:, -1], after))


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        model = model_of(kind)
        inputs, decoder = inputs_of(model), Decoder(model)
        whole = decoder.prefill(inputs)
        for chunk in (1, 2, 3):
            monkeypatch.setattr("minrnn.models.decoder.PROMPT_CHUNK", chunk)
            assert_equal(decoder.prefill(inputs), whole)
        monkeypatch.undo()


# --- pools ----------------------------------------------------------------------------------------------


def pool_options(mixer: str) -> dict[str, Any]:
    return {"window": 4} if mixer == "attention" else {}


@every_mixer
@every_kind
def test_an_empty_state_is_none(kind: str, mixer: str) -> None:
    model = model_of(kind, mixer, **pool_options(mixer))
    decoder, inputs = Decoder(model), inputs_of(model)
    ours: Any = decoder.new_state(BATCH)
    theirs: Any = None
    for t in range(T):
        (y, ours), (expected, theirs) = (
            decoder.step(one(inputs, t), ours),
            decoder.step(one(inputs, t), theirs),
        )
        torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)
    whole, _ = forward(model, inputs, decoder.new_state(BATCH))
    torch.testing.assert_close(whole, expected, rtol=0, atol=TOLERANCE * 10)


@every_mixer
@every_kind
def test_rows_of_a_pool_are_a_batch_of_their_own(kind: str, mixer: str) -> None:
    """Whatever rows step when, in whatever order; the others keep their bits."""
    model = model_of(kind, mixer, **pool_options(mixer))
    decoder, inputs, N = Decoder(model), inputs_of(model, batch=6), 9
    pool = decoder.new_state(N)
    alone: list[Any] = [decoder.new_state(1) for _ in range(6)]
    steps = [0] * 6
    generator = torch.Generator().manual_seed(2)
    for _ in range(T):
        chosen = torch.randperm(6, generator=generator)[: int(torch.randint(1, 7, (1,), generator=generator))]
        rows, before = chosen + 2, map_state(torch.clone, pool)
        now = [take(inputs, int(row), steps[int(row)]) for row in chosen]
        outputs, returned = decoder.step(join(now), pool, rows)
        assert returned is pool
        for index, row in enumerate(chosen.tolist()):
            expected, alone[row] = decoder.step(now[index], alone[row])
            torch.testing.assert_close(outputs[index], expected[0], rtol=0, atol=TOLERANCE)
            steps[row] += 1
        others = [row for row in range(N) if row not in rows.tolist()]
        for part, old in zip(tensors_of(pool), tensors_of(before), strict=True):
            assert torch.equal(part[others], old[others])
    for part, whole in zip(tensors_of(pool), zip(*map(tensors_of, alone), strict=True), strict=True):
        torch.testing.assert_close(part[2:8], torch.cat(whole), rtol=0, atol=TOLERANCE)


def take(inputs: Any, row: int, t: int) -> Any:
    now = one(inputs, t)
    return Steps(*(part[row : row + 1] for part in now)) if isinstance(now, Steps) else now[row : row + 1]


def join(inputs: list[Any]) -> Any:
    if isinstance(inputs[0], Steps):
        return Steps(*(torch.cat(parts) for parts in zip(*inputs, strict=True)))
    return torch.cat(inputs)


@compiled
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_pools_steps_have_the_bits_of_a_batchs(cell: MinCell) -> None:
    model, rows = build(**cell), torch.tensor([5, 0, 3])
    decoder, tokens = Decoder(model), make_tokens(3, 5)
    pool, state = decoder.new_state(7), None
    for t in range(5):
        with counted(decoder) as calls:
            ours, _ = decoder.step(tokens[:, t], pool, rows)
            theirs, state = decoder.step(tokens[:, t], state)
        assert len(calls) == 2
        assert torch.equal(ours, theirs)
    taken = map_state(lambda part: part[rows], pool)
    assert all(map(torch.equal, tensors_of(taken), tensors_of(state)))
    assert_equal(forward(model, make_tokens(3), taken), forward(model, make_tokens(3), state))


@every_mixer
@every_kind
def test_prompts_are_read_into_rows_of_a_pool(kind: str, mixer: str) -> None:
    model = model_of(kind, mixer, **pool_options(mixer))
    decoder, inputs, rows = Decoder(model), inputs_of(model), torch.tensor([4, 0, 2])
    pool, state = decoder.new_state(5), decoder.new_state(3)
    for steps in (3, 1, 2):
        before, prompt = map_state(torch.clone, pool), up_to(inputs, steps)
        ours, returned = decoder.prefill(prompt, pool, rows)
        theirs, state = decoder.prefill(prompt, state)
        assert returned is pool
        assert_equal((ours, map_state(lambda part: part[rows], pool)), (theirs, state))
        for part, old in zip(tensors_of(pool), tensors_of(before), strict=True):
            assert torch.equal(part[[1, 3]], old[[1, 3]])
    with pytest.raises(ValueError, match=r"Decoder.prefill: rows must lie in 0 \.\. 4"):
        decoder.prefill(inputs, pool, rows + 3)


@every_mixer
def test_rows_are_made_empty_again(mixer: str) -> None:
    model = model_of("sequence", mixer, **pool_options(mixer))
    decoder, tokens = Decoder(model), make_tokens(4, 3)
    pool = decoder.new_state(4)
    for t in range(3):
        decoder.step(tokens[:, t], pool, torch.arange(4))
    before, rows = map_state(torch.clone, pool), torch.tensor([3, 1])
    decoder.reset(pool, rows)
    for part, old, empty in zip(
        tensors_of(pool), tensors_of(before), tensors_of(decoder.new_state(2)), strict=True
    ):
        assert torch.equal(part[rows], empty)
        assert torch.equal(part[[0, 2]], old[[0, 2]])
    ours, _ = decoder.step(tokens[rows, 0], pool, rows)
    theirs, _ = decoder.step(tokens[rows, 0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@compiled
def test_a_pool_is_advanced_only_by_a_step_that_succeeds() -> None:
    """One that nears overflow in its last part is the model's: no row is advanced twice."""
    model = build()
    decoder, rows = Decoder(model), torch.tensor([2, 0])
    pool = decoder.new_state(3)
    decoder.step(make_tokens(2)[:, 0], pool, rows)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.mul_(1e37)
    before = map_state(lambda part: part[rows], pool)
    with counted(decoder) as calls:
        ours, _ = decoder.step(make_tokens(2)[:, 0], pool, rows)
    theirs, after = forward(model, make_tokens(2), before)
    assert calls == [2]
    assert theirs.isfinite().all()
    assert torch.equal(ours, theirs)
    assert all(map(torch.equal, tensors_of(map_state(lambda part: part[rows], pool)), tensors_of(after)))


def test_a_state_that_grows_has_no_pool() -> None:
    decoder = Decoder(build(mixer="attention", d_model=24))
    pool, rows = decoder.new_state(2), torch.tensor([1])
    with pytest.raises(ValueError, match=r"a row must keep its shapes.*attention needs a window"):
        decoder.step(make_tokens(1)[:, 0], pool, rows)


# --- what is left to torch ------------------------------------------------------------------------------


def is_served(model: Any, tokens: Tensor | None = None, state: Any = None) -> bool:
    """Whether a decoder that is made now takes a step in one call."""
    decoder = Decoder(model)
    with counted(decoder) as calls:
        decoder.step(make_tokens(2)[:, 0] if tokens is None else tokens[:, 0], state)
    assert bool(calls) <= (decoder.backend == "cpp")
    return bool(calls)


def reason_of(model: Any) -> str:
    decoder = Decoder(model)
    decoder.step(make_tokens(2)[:, 0])
    assert decoder.backend == "torch"
    assert decoder.most_rows == 0
    assert decoder.reason is not None
    assert "\n" not in decoder.reason
    return decoder.reason


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


REASONS: dict[str, tuple[Callable[[], Any], str]] = {
    "mixer": (
        lambda: build(mixer="gru"),
        r"blocks\.0\.mixer is of class GRUMixer, not MinGRUMixer or MinLSTM",
    ),
    "dtype": (
        lambda: build().double(),
        r"embedding\.weight is \(11, 20\) torch\.float64 on cpu, not .*float32",
    ),
    "half": (lambda: build().bfloat16(), r"torch\.bfloat16 on cpu, not"),
    "wrapped": (
        lambda: torch.compile(build(), backend="eager"),
        "of class OptimizedModule, not SequenceModel",
    ),
    "compiled": (
        lambda: compiled_in_place(build()),
        "the model has hooks, is compiled, or has another forward",
    ),
    "hook": (lambda: hooked(build(), "blocks.1.mlp.up"), r"blocks\.1\.mlp\.up has hooks"),
    "model's hook": (lambda: hooked(build(), ""), "the model has hooks"),
    "parametrization": (lambda: parametrized(build()), r"rnn is of class ParametrizedMinGRU, not MinGRU"),
    "replaced": (lambda: replaced(build()), r"blocks\.1\.down is of class Twice, not Linear"),
    "dropout": (
        lambda: in_training(build(dropout=0.5)),
        "dropout is in training mode in a model that is not",
    ),
    "max norm": (lambda: with_max_norm(build()), "embedding has a max_norm"),
}


def compiled_in_place(model: SequenceModel) -> SequenceModel:
    model.compile(backend="eager")
    return model


def hooked(model: SequenceModel, path: str) -> SequenceModel:
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    return model


def parametrized(model: SequenceModel) -> SequenceModel:
    weight_norm(model.blocks[0].mixer.rnn, "weight_ih_l0")
    return model


def replaced(model: SequenceModel) -> SequenceModel:
    model.blocks[1].down = Twice(20, 20)
    return model


def in_training(model: SequenceModel) -> SequenceModel:
    model.dropout.train()
    return model


def with_max_norm(model: SequenceModel) -> SequenceModel:
    model.embedding.max_norm = 1.0
    return model


@compiled
@pytest.mark.parametrize("cause", REASONS)
def test_each_cause_has_a_reason(cause: str) -> None:
    make, reason = REASONS[cause]
    assert re.search(reason, reason_of(make()))


@compiled
def test_a_policy_has_reasons_of_its_own() -> None:
    assert Decoder(policy(tokens="interleaved")).reason == (
        "a step of interleaved tokens is three steps of the blocks"
    )
    assert Decoder(policy(max_steps=9)).reason == "embed_time is of class Embedding, not None"
    model = policy()
    model.observation_std = model.observation_std.double()
    assert "observation_std is (5,) torch.float64" in str(Decoder(model).reason)


def test_without_the_engine_torch_computes() -> None:
    program = (
        "import torch; from minrnn import Decoder, ModelConfig, SequenceModel\n"
        "decoder = Decoder(SequenceModel(ModelConfig(vocab_size=5, d_model=8)))\n"
        "logits, _ = decoder.step(torch.zeros(1, dtype=torch.int64))\n"
        "print(tuple(logits.shape), decoder.backend, decoder.reason)\n"
    )
    environment = {**os.environ, "MINRNN_ENGINE": "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    said = "(1, 5) torch the compiled engine is disabled by MINRNN_ENGINE=reference"
    assert done.stdout.strip() == said, done.stderr


def test_a_missing_engine_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step, "load", lambda name: ImportError("it was not compiled"))
    assert reason_of(build()) == "the compiled engine is missing: it was not compiled"


@compiled
@every_mixer
def test_it_is_the_step_of_our_cells_alone(mixer: str) -> None:
    assert is_served(build(mixer=mixer, d_model=24)) == (mixer in GATED_RNNS)


@compiled
def test_it_is_for_steps_of_few_rows() -> None:
    model = build()
    decoder = Decoder(model)
    isa = fused_step.load("cpp").ISA
    assert decoder.most_rows == {True: 65536, False: 16384}["avx512" in isa] // 20
    for rows, served in ((decoder.most_rows, True), (decoder.most_rows + 1, False)):
        tokens = make_tokens(rows)
        assert is_served(model, tokens) == served
        pool = decoder.new_state(rows + 1)
        outputs, _ = decoder.step(tokens[:, 0], pool, torch.arange(rows))
        assert_equal((outputs, map_state(lambda x: x[:-1], pool)), forward(model, tokens))


@compiled
def test_gradients_and_modes_are_the_callers() -> None:
    """Steps are in evaluation mode and without gradients, whatever the caller's; the model's mode is kept."""
    model = build(dropout=0.5)
    expected = Decoder(model).step(make_tokens(2)[:, 0])
    assert torch.is_grad_enabled()
    assert is_served(model.train())
    for decoder in (Decoder(model), Decoder(hooked(build(dropout=0.5).train(), "norm"))):
        logits, state = decoder.step(make_tokens(2)[:, 0])
        assert_equal((logits, state), expected)
        assert not logits.requires_grad
        assert all(module.training for module in decoder.model.modules())


@compiled
@pytest.mark.parametrize(
    "watching",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),  # a mode of functions
    ],
    ids=["autocast", "dispatch", "function"],
)
def test_it_hides_nothing_from_those_who_watch(watching: Callable[[], AbstractContextManager[Any]]) -> None:
    decoder, tokens = Decoder(build()), make_tokens(2)[:, 0]
    with counted(decoder) as calls, watching():
        decoder.step(tokens)
        assert decoder.backend == "torch"
        assert decoder.reason is not None
        assert decoder.reason.startswith("autocast, a transform, a tracer or a mode of torch is active")
    assert not calls
    assert decoder.backend == "cpp"
    assert decoder.reason is None
    with counted(decoder) as calls:
        decoder.step(tokens)
    assert calls == [2]


@compiled
def test_transforms_and_compilers_see_torchs_operations() -> None:
    model, tokens = build(), make_tokens(2)[:, 0]
    decoder = Decoder(model)
    expected, _ = decoder.step(tokens)
    with counted(decoder) as calls:
        stacked, _ = torch.vmap(lambda token: decoder.step(token.unsqueeze(0)))(tokens)
        graph = torch.compile(lambda tokens: decoder.step(tokens), backend="eager", fullgraph=True)
        torch.testing.assert_close(graph(tokens)[0], expected, rtol=0, atol=TOLERANCE)
    assert not calls
    torch.testing.assert_close(stacked.squeeze(1), expected, rtol=0, atol=TOLERANCE)


PARTS = [
    "norm",
    *(
        f"blocks.1.{name}"
        for name in ("mixer_norm", "conv", "mixer", "down", "mlp_norm", "mlp", "mlp.up", "mlp.down")
    ),
    "blocks.0",
]


@compiled
@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called(part: str) -> None:
    model = build()
    assert is_served(model)
    seen: list[str] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.get_submodule(part), register)(lambda *_: seen.append(part))
        assert not is_served(model)
        handle.remove()
        assert is_served(model)
    assert len(seen) == 2


@compiled
def test_hooks_of_all_modules_are_called() -> None:
    model, seen = build(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert not is_served(model)
    finally:
        handle.remove()
    assert "MinGRUMixer" in seen
    assert is_served(model)


@compiled
def test_parts_that_do_something_else_are_called() -> None:
    for part in ("down", "mlp.up"):
        model = build()
        assert is_served(model)
        before = model.blocks[1].get_submodule(part)
        after = Twice(before.in_features, before.out_features)
        model.blocks[1].set_submodule(part, after)
        assert not is_served(model)
        model.blocks[1].set_submodule(part, before)
        assert is_served(model)
    model = build()
    model.norm.forward = lambda x: 0 * x  # type: ignore[method-assign]
    assert not is_served(model)
    model = build()
    weight_norm(model.blocks[0].mixer.rnn, "weight_ih_l0")
    assert not is_served(model)


@compiled
def test_states_that_lie_otherwise_are_read_all_the_same() -> None:
    model, tokens = build(conv_width=4), make_tokens(2)
    decoder, rows = Decoder(model), torch.tensor([1, 0])
    _, state = decoder.step(tokens[:, 0])
    expected = decoder.step(tokens[:, 0], state)
    scattered = map_state(lambda x: x.repeat_interleave(2, dim=-1)[..., ::2], state)
    assert not is_served(model, tokens, scattered)
    assert_equal(decoder.step(tokens[:, 0], scattered), expected)
    outputs, after = decoder.step(tokens[rows, 0], scattered, rows)
    assert_equal((outputs[rows], after), expected)


@compiled
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12, 1e16, 1e20, torch.inf, torch.nan])
def test_steps_overflow_where_longer_calls_do(norm: str, activation: str, scale: float) -> None:
    for options, d_model, seed in itertools.product(
        ({"conv_width": 0, "mlp_ratio": 0.0}, {"mlp_ratio": 2.0}), (8, 20), range(2)
    ):
        model = build(norm=norm, mlp_activation=activation, d_model=d_model, num_layers=1, **options)
        for name, parameter in model.named_parameters():
            if seed == 0 or name == "embedding.weight":
                parameter.data.mul_(scale)
        tokens = make_tokens(3, 2, seed)
        with torch.no_grad():
            expected = model(tokens)[0][:, 0]
        ours = Decoder(model).step(tokens[:, 0])[0]
        assert torch.equal(ours.isfinite(), expected.isfinite())
        assert torch.equal(ours.isnan(), expected.isnan())


@compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_overflow_that_an_activation_would_hide_is_none_of_ours(activation: str) -> None:
    """Every input of the activation is minus infinity: zero would come of it, where torch has NaN."""
    model = build(mlp_activation=activation, num_layers=1)
    mlp = model.blocks[0].mlp
    model.blocks[0].mlp_norm.weight.data.zero_()
    model.blocks[0].mlp_norm.bias.data.fill_(1.0)
    mlp.up.weight.data.fill_(-1e38)
    tokens = make_tokens(3)
    with torch.no_grad():
        expected = model(tokens)[0][:, 0]
    ours = Decoder(model).step(tokens[:, 0])[0]
    assert torch.equal(ours.isnan(), expected.isnan())
    assert expected.isnan().all() == (activation != "relu")


# --- wrong arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mingru", "gru"])
def test_wrong_states_are_refused(mixer: str) -> None:
    decoder, tokens = Decoder(build(mixer=mixer)), make_tokens(2)[:, 0]
    _, state = decoder.step(tokens)
    with pytest.raises(ValueError, match="must have 2 blocks, got 1"):
        decoder.step(tokens, state[:1])
    with pytest.raises(ValueError, match="must be the batch, 2"):
        decoder.step(tokens, map_state(lambda x: x[:1], state))
    with pytest.raises((ValueError, RuntimeError)):
        decoder.step(tokens, map_state(lambda x: x[..., :-1], state))
    with pytest.raises(ValueError, match="state must be"):
        decoder.step(tokens, tuple((windows, ()) for windows, _ in state))
    with pytest.raises(TypeError, match="state must be the tuple"):
        decoder.step(tokens, tuple((windows, list(carried)) for windows, carried in state))  # type: ignore[arg-type]


@every_mixer
def test_pools_with_fewer_rows_in_one_part_are_refused(mixer: str) -> None:
    """Their rows are read by address: one that only other parts have lies beyond the end."""
    decoder = Decoder(build(mixer=mixer, d_model=24, **({"window": 4} if mixer == "attention" else {})))
    pool, token, row = decoder.new_state(5), make_tokens(1)[:, 0], torch.tensor([4])
    leaves, form = tree_flatten(pool)
    for place in range(len(leaves) - 1):
        parts = [leaf[:3] if index == place else leaf for index, leaf in enumerate(leaves)]
        with pytest.raises(
            ValueError, match="first axis of each state tensor must be the batch, 5, got shape"
        ):
            decoder.step(token, tree_unflatten(parts, form), row)
    assert all(torch.equal(x, y) for x, y in zip(leaves, tree_leaves(decoder.new_state(5)), strict=True))


def misshapen(part: Tensor) -> list[Tensor]:
    """What has the batch of a part of a state but not its shape: as many numbers, or more, or fewer."""
    batch, *axes = part.shape
    others = [
        part.reshape(batch, -1, 1),
        part.reshape(batch, 1, -1),
        part.unsqueeze(1),
    ]
    if axes:
        others += [part.flatten(1), part.transpose(1, -1), torch.cat([part, part], dim=-1)]
        others += [part[..., :0], part[:, 1:]]
    return [other for other in others if other.shape != part.shape and other.shape[:1] == (batch,)]


@every_mixer
def test_states_of_another_shape_are_refused_by_steps_and_by_longer_calls(mixer: str) -> None:
    model = build(mixer=mixer, d_model=24, conv_width=4, num_layers=1)
    decoder = Decoder(model)
    _, (((window,), carried),) = decoder.prefill(make_tokens(2, 3))
    others = [((), carried), ((window, window), carried), ((window,), (*carried, carried[0]))]
    others += [((window,), carried[:-1])]
    others += [((other,), carried) for other in misshapen(window)]
    for at, part in enumerate(carried):
        for other in misshapen(part):
            others.append(((window,), (*carried[:at], other, *carried[at + 1 :])))
    for block, steps in itertools.product(others, (1, 2)):
        for call in (lambda *args: decoder.prefill(*args), lambda *args: forward(model, *args)):
            with pytest.raises(ValueError, match=r"must (be|have)") as refused:
                call(make_tokens(2, steps), (block,))
            assert "\n" not in str(refused.value)
    model.blocks[0].conv = None
    with pytest.raises(ValueError, match="must have 0 windows"):
        forward(model, make_tokens(2), (((window,), carried),))
    with pytest.raises(ValueError, match="must have 0 windows"):
        Decoder(model).step(make_tokens(2)[:, 0], (((window,), carried),))


TWO = torch.tensor([1, 2])


@pytest.mark.parametrize("mixer", ["mingru", "gru"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2],), TypeError, "Decoder.step: tokens must be a tensor, got list"),
        ((TWO.float(),), TypeError, "Decoder.step: tokens must be int64, got torch.float32"),
        ((TWO.unsqueeze(0),), ValueError, r"Decoder.step: tokens must be \(B,\), got \(1, 2\)"),
        ((TWO, None, TWO), TypeError, "Decoder.step: rows need a state, as from new_state, got NoneType"),
        ((TWO, "pool", [1, 2]), TypeError, "Decoder.step: rows must be a tensor, got list"),
        ((TWO, "pool", TWO.int()), TypeError, "Decoder.step: rows must be int64, got torch.int32"),
        ((TWO, "pool", TWO[:1]), ValueError, r"Decoder.step: rows must be \(2,\), got \(1,\)"),
        ((TWO, "pool", TWO + 3), ValueError, r"rows must lie in 0 \.\. 4, got 4 \.\. 5"),
        ((TWO, "pool", TWO - 2), ValueError, r"rows must lie in 0 \.\. 4, got -1 \.\. 0"),
        ((TWO, "pool", TWO // 2 * 0), ValueError, "rows must be different from each other"),
        ((TWO, (), TWO), TypeError, "rows need a state"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(
    mixer: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    decoder = Decoder(build(mixer=mixer))
    pool = decoder.new_state(5)
    with pytest.raises(error, match=message) as refused:
        decoder.step(*(pool if isinstance(x, str) else x for x in arguments))
    assert "\n" not in str(refused.value)
    assert not any(part.any() for part in tensors_of(pool))


@pytest.mark.parametrize("mixer", ["mingru", "gru"])
def test_tokens_out_of_the_vocabulary_are_refused(mixer: str) -> None:
    decoder = Decoder(build(mixer=mixer))
    for token in (-1, V, 1 << 40):
        with pytest.raises(IndexError):
            decoder.step(torch.tensor([0, token]))


def test_other_mistakes_are_one_line() -> None:
    with pytest.raises(
        TypeError, match="Decoder: model must be a SequenceModel or DecisionModel, got Linear"
    ):
        Decoder(nn.Linear(2, 2))  # type: ignore[arg-type]
    decoder, acting = Decoder(build()), Decoder(policy())
    with pytest.raises(ValueError, match="num_rows must be greater than zero, got 0"):
        decoder.new_state(0)
    with pytest.raises(ValueError, match=r"Decoder.prefill: tokens must be \(B, T\), got \(2,\)"):
        decoder.prefill(TWO)
    with pytest.raises(ValueError, match="must hold a token or a step, got none"):
        decoder.prefill(make_tokens(2)[:, :0])
    with pytest.raises(ValueError, match=r"Decoder.prefill: reset must be \(2, 3\)"):
        decoder.prefill(make_tokens(2, 3), reset=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"Decoder.step: steps must be Steps, got Tensor"):
        acting.step(TWO)
    with pytest.raises(ValueError, match=r"with T = 1, got T = 7"):
        acting.step(inputs_of(policy()))
    with pytest.raises(ValueError, match=r"observations must be \(B, T, 5\)"):
        acting.step(one(inputs_of(policy()))._replace(observations=torch.zeros(3, 1, 4)))
    for decoder in (Decoder(build()), Decoder(build(mixer="gru"))):
        with pytest.raises(ValueError, match=r"Decoder.reset: the state of a row must keep its shapes"):
            decoder.reset(map_state(lambda x: x[..., :1], decoder.new_state(3)), TWO)
        with pytest.raises(ValueError, match=r"Decoder.reset: rows must lie in 0 \.\. 1"):
            decoder.reset(decoder.new_state(2), TWO)


# --- models change --------------------------------------------------------------------------------------


def change_numbers(model: SequenceModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def load_in_place(model: SequenceModel) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})


def load_others(model: SequenceModel) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)


def convert_twice(model: SequenceModel) -> None:
    assert not is_served(model.double())
    model.float()


def swap_data(model: SequenceModel) -> None:
    model.blocks[0].down.weight.data = torch.randn(20, 20)


def share(model: SequenceModel) -> None:
    model.share_memory()


def free(model: SequenceModel) -> None:
    model.blocks[1].mlp.up.weight.untyped_storage().resize_(0)


def replace_a_parameter(model: SequenceModel) -> None:
    model.blocks[0].mixer.rnn.weight_ih_l0 = nn.Parameter(torch.randn(40, 20))


def replace_a_part(model: SequenceModel) -> None:
    model.blocks[1].mlp = build(mlp_activation="relu", mlp_ratio=1.0).blocks[0].mlp


def drop_a_part(model: SequenceModel) -> None:
    model.blocks[1].mlp = None


def add_a_block(model: SequenceModel) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def drop_a_block(model: SequenceModel) -> None:
    del model.blocks[1]


def change_settings(model: SequenceModel) -> None:
    model.blocks[0].residual = False
    model.blocks[1].mlp.activation = "silu"
    model.norm.eps = 0.5


def hook(model: SequenceModel) -> None:
    hooked(model, "norm")


IN_PLACE = [change_numbers, load_in_place]
MOVED = [convert_twice, swap_data, share, free]
REPLACED = [
    load_others,
    replace_a_parameter,
    replace_a_part,
    drop_a_part,
    add_a_block,
    drop_a_block,
    change_settings,
    hook,
]


@compiled
@pytest.mark.parametrize("change", IN_PLACE)
def test_numbers_that_change_in_place_are_seen(change: Callable[[SequenceModel], None]) -> None:
    model, tokens = build(), make_tokens(2)
    decoder = Decoder(model)
    before, _ = decoder.step(tokens[:, 0])
    change(model)
    with counted(decoder) as calls:
        ours = decoder.step(tokens[:, 0])
    assert len(calls) == 1
    assert_equal(ours, forward(model, tokens))
    assert not torch.allclose(ours[0], before, atol=1e-3)


@compiled
@pytest.mark.parametrize("change", MOVED)
def test_tensors_that_move_are_noticed(change: Callable[[SequenceModel], None]) -> None:
    model, tokens = build(), make_tokens(2)
    decoder = Decoder(model)
    decoder.step(tokens[:, 0])
    change(model)
    for state, rows in ((None, None), (decoder.new_state(3), TWO)):
        with pytest.raises(RuntimeError, match="have been moved or replaced; make a new Decoder"):
            decoder.step(tokens[:, 0], state, rows)
    if change is not free:
        assert_equal(Decoder(model).step(tokens[:, 0]), forward(model, tokens))


@compiled
@pytest.mark.parametrize("change", REPLACED)
def test_what_is_replaced_is_not_seen(change: Callable[[SequenceModel], None]) -> None:
    """The decoder goes on as it was, and a new one is of the model as it is now."""
    model, tokens = build(), make_tokens(2)
    decoder = Decoder(model)
    before, state = decoder.step(tokens[:, 0])
    change(model)
    again, after = decoder.step(tokens[:, 0])
    assert all(map(torch.equal, (before, *tensors_of(state)), (again, *tensors_of(after))))
    new = Decoder(model).step(tokens[:, 0])
    assert_equal(new, forward(model, tokens))
    if change is not hook:
        assert not torch.allclose(new[0], before, atol=1e-3)


def outcome(step: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any] | type[Exception]:
    try:
        return step()
    except Exception as error:
        return type(error)


def assert_follows(model: SequenceModel) -> None:
    """A new decoder's step is what torch makes of the model as it is now, be that an error."""
    tokens = make_tokens(2)
    ours = outcome(lambda: Decoder(model).step(tokens[:, 0]))
    theirs = outcome(lambda: forward(model, tokens))
    if isinstance(theirs, tuple):
        assert isinstance(ours, tuple)
        assert_equal(ours, theirs)
    else:
        assert ours is theirs


def stepped(**options: Any) -> SequenceModel:
    """Make a model that has taken a step, whose matrices are square."""
    model = build(**{"num_layers": 1, "conv_width": 20, "mlp_ratio": 1.0, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert is_served(model)
    return model


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "broadcast": lambda x: x[:1].expand(x.shape),
    "rows": lambda x: x[: len(x) // 2],
    "columns": lambda x: x[..., : x.shape[-1] // 2],
    "flat": lambda x: x.flatten(),
    "column": lambda x: x.unsqueeze(-1),
    "overlapping": lambda x: x.as_strided(x.shape, (1,) * x.dim()),
    "later": lambda x: torch.cat([x, x.flip(0)])[1 : len(x) + 1],
    "negative": torch._neg_view,
    "integers": lambda x: x.view(torch.int32),
    "halves": lambda x: x.view(torch.float16),
}
"""Other readings of the memory where a tensor lies."""


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_tensor_in_another_layout(layout: str) -> None:
    """A new decoder follows it; an old one goes on as it was, or says that the tensor has moved."""
    for name in dict(stepped().named_parameters()):
        if name != "embedding.weight":
            model = stepped()
            decoder, tokens = Decoder(model), make_tokens(2)[:, 0]
            before, _ = decoder.step(tokens)
            parameter = model.get_parameter(name)
            kept = parameter.data
            if kept.is_floating_point() and layout == "integers":
                parameter.requires_grad_(False)
            parameter.data = LAYOUTS[layout](kept)
            assert_follows(model)
            if parameter.data_ptr() == kept.data_ptr():
                assert torch.equal(decoder.step(tokens)[0], before)
            else:
                with pytest.raises(RuntimeError, match="make a new Decoder"):
                    decoder.step(tokens)
            parameter.data = kept
            assert is_served(model)
            assert_follows(model)
            assert torch.equal(decoder.step(tokens)[0], before)


@compiled
def test_each_tensor_changed_in_place() -> None:
    for name in dict(stepped().named_parameters()):
        model = stepped()
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.t_() if parameter.dim() == 2 else parameter.as_strided_(parameter.shape, (0,))
        assert_follows(model)


def others(value: Any) -> list[Any]:
    """Other values of an attribute."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value + 0.5]
    if isinstance(value, str):
        return [*GATES, *CANDIDATES, *ACTIVATIONS, "unknown"]
    if isinstance(value, tuple):
        return [(), (7,), (*value, 1)]
    return []


@compiled
@pytest.mark.parametrize("options", [{}, {"mixer": "minlstm", "norm": "rms", "bias": False}], ids=str)
def test_each_attribute(options: dict[str, Any]) -> None:
    model = stepped(**options)
    changed = 0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            for other in others(value) if not name.startswith("_") else []:
                setattr(module, name, other)
                assert_follows(model)
                setattr(module, name, value)
                changed += 1
    assert changed > 50
    assert is_served(model)


@compiled
@pytest.mark.parametrize("options", [{}, {"mixer": "minlstm", "norm": "rms", "bias": False}], ids=str)
def test_each_tensor_that_is_deleted_or_becomes_an_attribute(options: dict[str, Any]) -> None:
    for path, part in stepped(**options).named_modules():
        for name in ("weight", "bias", "weight_ih_l0", "bias_ih_l0"):
            found = getattr(part, name, None)
            if path == "embedding" or not (isinstance(found, Tensor) or name in part._parameters):
                continue
            for register in (setattr, nn.Module.register_buffer, None):
                model = stepped(**options)
                module = model.get_submodule(path)
                delattr(module, name)
                assert_follows(model)
                if register is not None:
                    register(module, name, torch.randn(20) if found is None else torch.randn_like(found))
                    assert_follows(model)


PUBLIC = ("forward", "mix", "__call__")


@compiled
@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
@pytest.mark.parametrize("on", ["instance", "class", "base"])
def test_patched_methods_are_called(mixer: str, on: str) -> None:
    """Of every part but those that a mixer runs without a call."""
    model = stepped(mixer=mixer)
    tokens, patched = make_tokens(2)[:, 0], 0
    for path, module in model.named_modules():
        for name in PUBLIC:
            if not path or not hasattr(type(module), name) or path.endswith(("rnn", "blocks", "embedding")):
                continue
            method = getattr(type(module), name)
            owner: Any = next(base for base in type(module).__mro__ if name in vars(base))
            place: Any = {"instance": module, "class": type(module), "base": owner}[on]
            with pytest.MonkeyPatch.context() as patch:
                calls: list[str] = []

                def noted(*args: Any, method: Any = method, calls: list[str] = calls, **options: Any) -> Any:
                    calls.append("")
                    return method(*args, **options)

                patch.setattr(
                    place, name, noted.__get__(module) if on == "instance" else noted, raising=False
                )
                Decoder(model).step(tokens)
                assert bool(calls) == (on != "instance" or name != "__call__"), (path, name)
            assert is_served(model)
            patched += 1
    assert patched > 15


@compiled
def test_a_mixer_that_overrides_mix_is_called() -> None:
    class Zero(type(build().blocks[0].mixer)):  # type: ignore[misc]
        def mix(self, x: Tensor, state: Any, reset: Any) -> Any:
            y, state = super().mix(x, state, reset)
            return 0 * y, state

    model = stepped()
    model.blocks[0].mixer.__class__ = Zero
    assert not is_served(model)


@compiled
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copied: Callable[[Decoder], Decoder]) -> None:
    decoder, tokens = Decoder(build()), make_tokens(2)
    before, _ = decoder.step(tokens[:, 0])
    other = copied(decoder)
    assert other.backend == "cpp"
    change_numbers(other.model)  # type: ignore[arg-type]
    assert torch.equal(decoder.step(tokens[:, 0])[0], before)
    assert not torch.allclose(other.step(tokens[:, 0])[0], before)
    assert_equal(other.step(tokens[:, 0]), forward(other.model, tokens))


def test_forward_has_one_path() -> None:
    """A model's step without gradients is made of the operations of a longer call."""
    model = build()
    seen: list[str] = []
    for path, part in model.named_modules():
        part.register_forward_hook(lambda *_, path=path: seen.append(path))
    called = []
    for steps in (1, 2):
        with torch.no_grad():
            model(make_tokens(2, steps))
        called.append(tuple(seen))
        seen.clear()
    assert called[0] == called[1]


# --- what strangers tried ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mingru", "gru"])
def test_threads_share_a_model_in_training_mode(mixer: str) -> None:
    """While one thread needs evaluation mode, no other takes it away; at the end the modes are restored."""
    model = build(mixer=mixer, dropout=0.5).train()
    decoder, prompt = Decoder(model), make_tokens(2, 20)
    expected, _ = Decoder(copy.deepcopy(model).eval()).prefill(prompt)
    found: list[Tensor] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda: [found.append(decoder.prefill(prompt)[0]) for _ in range(8)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 32
    for logits in found:
        torch.testing.assert_close(logits, expected)
    assert all(module.training for module in model.modules())


@compiled
def test_replaced_tensors_are_refused_by_the_next_prompt() -> None:
    model = build()
    decoder, prompt = Decoder(model), make_tokens(2, 5)
    model.load_state_dict(build(d_model=20).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="tensors were replaced; make a new decoder"):
        decoder.prefill(prompt)
    Decoder(model).prefill(prompt)


@compiled
@pytest.mark.parametrize("kind", ["sequence", "policy"])
def test_each_tensor_that_is_replaced_left_out_or_added_is_noticed(kind: str) -> None:
    model = build() if kind == "sequence" else policy()
    decoder, prompt = Decoder(model), make_tokens(4) if kind == "sequence" else one_step(model, 0, 0)
    decoder.prefill(prompt)
    tables = [table for part in model.modules() for table in (part._parameters, part._buffers)]
    places = [(table, name) for table in tables for name, x in table.items() if x is not None]
    assert len(places) == len([*model.parameters(), *model.buffers()])
    for table, name in places:
        tensor = table[name]
        for other in (copy.deepcopy(tensor), None):
            table[name] = other
            with pytest.raises(RuntimeError, match="tensors were replaced; make a new decoder"):
                decoder.prefill(prompt)
        table[name] = tensor
    decoder.prefill(prompt)
    model.register_buffer("another", torch.zeros(1))
    with pytest.raises(RuntimeError, match="tensors were replaced; make a new decoder"):
        decoder.prefill(prompt)


@compiled
def test_a_decoder_keeps_the_memory_that_it_reads() -> None:
    """Were it freed, another tensor could come to lie at the address that the decoder compares."""
    model = build()
    numbers = np.random.default_rng(0).standard_normal(model.head.weight.shape, dtype=np.float32)
    model.head.weight.data = torch.from_numpy(numbers)
    memory = weakref.ref(numbers)
    decoder = Decoder(model)
    model.head.weight.data = torch.zeros_like(model.head.weight)
    del numbers
    gc.collect()
    assert memory() is not None
    with pytest.raises(RuntimeError, match="have been moved or replaced"):
        decoder.step(make_tokens(1)[:, 0])
    del decoder
    gc.collect()
    assert memory() is None


@every_mixer
@pytest.mark.parametrize("length", [1, 2, 9])
def test_outputs_do_not_keep_those_of_the_whole_prompt_alive(mixer: str, length: int) -> None:
    logits, _ = Decoder(build(mixer=mixer, d_model=24)).prefill(make_tokens(3, length))
    assert logits.untyped_storage().nbytes() == 3 * V * 4


@every_mixer
def test_steps_of_no_row(mixer: str) -> None:
    """A server's tick may have none to advance."""
    decoder = Decoder(build(mixer=mixer, d_model=24, **({"window": 4} if mixer == "attention" else {})))
    pool, none = decoder.new_state(3), torch.zeros(0, dtype=torch.int64)
    before = map_state(torch.clone, pool)
    logits, after = decoder.step(none, pool, none)
    assert logits.shape == (0, V)
    assert after is pool
    decoder.reset(pool, none)
    for x, y in zip(tree_leaves(before), tree_leaves(pool), strict=True):
        assert torch.equal(x, y)


def test_a_prompts_tokens_are_in_the_vocabulary() -> None:
    with pytest.raises(IndexError, match=f"tokens must lie in 0 .. {V - 1}, got 3 .. {V}"):
        Decoder(build()).prefill(torch.tensor([[V, 3]]))


@pytest.mark.parametrize("mixer", ["mingru", "gru"])
def test_a_pool_made_in_inference_mode_is_written_outside_it(mixer: str) -> None:
    decoder, rows = Decoder(build(mixer=mixer)), torch.tensor([2, 0])
    with torch.inference_mode():
        pool = decoder.new_state(3)
    decoder.prefill(make_tokens(2, 5), pool, rows)
    decoder.step(make_tokens(2, 1)[:, 0], pool, rows)
    decoder.reset(pool, rows)
