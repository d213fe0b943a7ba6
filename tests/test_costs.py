"""The model of what training on many GPUs costs: its arithmetic, and what it counts of a model."""

import pytest
import torch

from minrnn.cli.main import main
from minrnn.distributed.costs import Cluster, Work, costs, work_of
from minrnn.mixers import GATED_RNNS, MIXERS
from minrnn.models import ModelConfig, SequenceModel

CLUSTER = Cluster(tflops=400, link=300, network=45, gpus=8, latency=15, latency_between=8)
LARGE = Work(
    mixer="mingru", parameters=1_250_000_000, layers=24, channels=2048, conv_width=4, kept=1e6, rows=4, T=2048
)


def of(rows: int, T: int = 2048) -> Work:
    return Work(**{**vars(LARGE), "rows": rows, "T": T})


@pytest.mark.parametrize(
    ("ranks", "traffic", "speed"),
    [(1, 0.0, 53_333), (8, 29.167e-3, 426_667), (64, 53.472e-3, 3_413_333), (1024, 56.727e-3, 54_613_333)],
)
def test_the_example_of_the_page(ranks: int, traffic: float, speed: float) -> None:
    """docs/distributed.md: 8,192 tokens a rank, gradients summed in two levels and hidden."""
    found = costs(of(4 * ranks), CLUSTER, ranks)
    assert found.compute == pytest.approx(6 * 1.25e9 * 8192 / 400e12) == pytest.approx(0.1536)
    assert found.traffic == pytest.approx(traffic, rel=1e-3)
    assert found.step == found.compute
    assert found.tokens_per_second == pytest.approx(speed, rel=1e-5)
    assert (found.weights, found.activations) == (20e9, 8192e6)
    assert (found.sequence_ranks, found.carries) == (1, 0.0)


def test_what_is_not_hidden_is_waited_for() -> None:
    little = costs(of(64, 128), CLUSTER, 64)  # 128 tokens a rank: 2.4 ms of computing, 1.6 of them hide
    assert little.compute == pytest.approx(2.4e-3)
    assert little.step == pytest.approx(2.4e-3 + 53.472e-3 - 1.6e-3, rel=1e-4)
    sharded = costs(of(64, 128), CLUSTER, 64, "sharded")  # one ring of 12 bytes a parameter, behind all of it
    assert sharded.traffic == pytest.approx(15e9 * 63 / 64 / 45e9)
    assert sharded.step == pytest.approx(sharded.traffic)
    assert sharded.weights == 20e9 / 64


def test_rows_that_are_fewer_than_ranks_are_divided() -> None:
    found = costs(of(2, 4096), CLUSTER, 8)
    assert found.sequence_ranks == 4
    assert found.compute == pytest.approx(6 * 1.25e9 * 1024 / 400e12)
    received = (16 + 12 * 3) * 1 * 2048 * 4  # bytes of a layer
    assert found.carries == pytest.approx(24 * (received * 3 / 4 / 300e9 + 4 * 15e-6))
    assert found.step == pytest.approx(found.compute + found.traffic - found.compute * 2 / 3 + found.carries)
    assert found.activations == 1024e6
    plain = Work(**{**vars(of(1, 4096)), "conv_width": 0})
    between = costs(plain, CLUSTER, 64)
    assert between.carries == pytest.approx(24 * (16 * 2048 * 64 * 63 / 64 / 45e9 + 4 * (15 + 24) * 1e-6))


def test_uneven_rows_wait_for_the_largest_part() -> None:
    found = costs(of(7), CLUSTER, 4)
    assert found.compute == pytest.approx(6 * 1.25e9 * 2 * 2048 / 400e12)
    assert found.tokens_per_second == pytest.approx(7 * 2048 / found.step)


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_what_the_model_of_costs_describes_is_divided(mixer: str) -> None:
    """Other states are larger, or sequences of such a mixer cannot be divided at all."""
    work = Work(**{**vars(of(4)), "mixer": mixer})
    assert costs(work, CLUSTER, 4).carries == 0
    if mixer in GATED_RNNS:
        assert costs(work, CLUSTER, 8).carries > 0
    else:
        with pytest.raises(ValueError, match=f"must be of mingru, .*, got {mixer}; with at most 4 ranks"):
            costs(work, CLUSTER, 8)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", "attention"])
def test_a_models_numbers_are_those_of_the_model(mixer: str) -> None:
    """Parameters, and the bytes that autograd keeps of one more token."""
    config = ModelConfig(vocab_size=40, d_model=16, num_layers=2, mixer=mixer, conv_width=3)
    model = SequenceModel(config)

    def kept(T: int) -> int:
        storages = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x  # alive, so that no address is given twice
            return x

        tokens = torch.zeros(1, T, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = model.loss(tokens, tokens)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = [x.untyped_storage().nbytes() for place, x in storages.items() if place not in own]
        assert loss.requires_grad
        return sum(sizes)

    work = work_of(config, 3, 100)
    assert work.mixer == mixer
    assert (work.rows, work.T, work.layers, work.channels, work.conv_width) == (3, 100, 2, config.d_hidden, 3)
    assert work.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert work.kept == (kept(512) - kept(256)) / 256


def test_the_command_prints_a_line_for_each_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.d-model", "16", "--model.num-layers", "2", "--rows", "2", "--length", "4096"]
    assert main(["plan", "demo", *sizes, "--ranks", "1", "2", "8", "--cluster.memory", "1e-2"]) == 0
    said = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [["1", "1"], ["2", "1"], ["8", "4"]]
    assert [row[-1].strip().endswith("!") for row in rows] == [True, False, False]
    assert "computed and not measured" in said


def test_the_batch_may_grow_with_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.d-model", "16", "--model.num-layers", "2", "--ranks", "2", "16"]
    main(["plan", "demo", *sizes, "--rows-per-rank", "1"])
    grown = capsys.readouterr().out
    assert [line.split("│")[2].strip() for line in grown.splitlines() if line.startswith("│")] == ["1", "1"]
    main(["plan", "demo", *sizes, "--rows-per-rank", "1", "--weights", "sharded"])
    assert capsys.readouterr().out != grown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["demo", "--rows", "3", "--ranks", "4"], "ranks must be a multiple of the 3 rows if more, got 4"),
        (["demo", "--rows", "1", "--length", "4", "--ranks", "8"], "must be at most 4, the tokens of a step"),
        (["demo", "--ranks", "0"], "--ranks must be 1 to "),
        (["demo", "--length", "0"], "--length must be 1 to "),
        (["demo", "--cluster.link", "0"], "link must be more than 0, got 0"),
        (["decisions"], "the recipe must be one for text, got decisions"),
        (["--rows", "2", "shakespeare"], "the recipe must come first: minrnn plan shakespeare"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
