"""The training loop does what its settings say: each setting by its effect, with numbers computed by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import run_config, trained, weights
from torch import nn

from minrnn.mixers import MIXERS
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel, load_checkpoint
from minrnn.tasks import TASKS, TaskConfig, TextTask
from minrnn.training import (
    Precision,
    RunConfig,
    RunLog,
    TrainConfig,
    compilation,
    read_config,
    read_metrics,
    train,
)
from minrnn.training.config import OPTIMIZERS, OptimizerName
from minrnn.training.loop import Run
from minrnn.training.optim import decayed_parameters, learning_rate_at, make_optimizers
from minrnn.training.resume import check_unchanged

pytestmark = pytest.mark.usefixtures("cache")


def make_run(corpus: Path, folder: Path, *, dropout: float = 0.1, **settings: Any) -> Run:
    config = run_config(corpus, **settings).override(model={"dropout": dropout})
    return Run(config, folder, RunLog())


def watch_steps(run: Run, seen: Callable[[], Any]) -> list[Any]:
    """Append the value of `seen()` to the list that is returned, just before each step of the optimizer."""
    found: list[Any] = []
    run.optimizers[0].register_step_pre_hook(lambda *_: found.append(seen()))
    return found


def gradients(run: Run) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def total_norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


# --- learning rate ---------------------------------------------------------------------------------------

RATES = {
    0: 0.2,  # the first step of the warm-up
    1: 0.4,
    3: 0.8,  # its last
    4: 0.8,  # the cosine starts at the peak
    6: 0.7121320344,  # 0.2 + 0.6 (1 + cos 45 degrees) / 2
    8: 0.5,  # its middle
    10: 0.2878679656,  # 0.2 + 0.6 (1 + cos 135 degrees) / 2
    11: 0.2228361402,  # the last step: 0.2 + 0.6 (1 + cos 157.5 degrees) / 2
    12: 0.2,  # the end
    100: 0.2,
}
SCHEDULE: dict[str, Any] = {
    "steps": 12,
    "warmup_steps": 4,
    "learning_rate": 0.8,
    "min_learning_rate_ratio": 0.25,
}


@pytest.mark.parametrize("step", RATES)
def test_learning_rate_of_a_step(step: int) -> None:
    assert learning_rate_at(step, TrainConfig(**SCHEDULE)) == pytest.approx(RATES[step], rel=1e-9)


def test_learning_rate_without_warmup_and_without_decay() -> None:
    without_warmup = TrainConfig(**{**SCHEDULE, "warmup_steps": 0})
    assert [learning_rate_at(step, without_warmup) for step in (0, 6, 12)] == pytest.approx([0.8, 0.5, 0.2])
    constant = TrainConfig(**{**SCHEDULE, "min_learning_rate_ratio": 1.0})
    assert [learning_rate_at(step, constant) for step in (0, 4, 11)] == pytest.approx([0.2, 0.8, 0.8])
    to_zero = TrainConfig(**{**SCHEDULE, "min_learning_rate_ratio": 0.0})
    assert learning_rate_at(12, to_zero) == pytest.approx(0.0, abs=1e-12)
    never_decays = TrainConfig(**{**SCHEDULE, "warmup_steps": 24})
    assert learning_rate_at(11, never_decays) == pytest.approx(0.4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_group_of_every_optimizer_has_the_rate_of_the_step(
    corpus: Path, tmp_path: Path, optimizer: OptimizerName
) -> None:
    scale = 1e-3  # of the rates above, so that training is stable
    settings = {**SCHEDULE, "learning_rate": 0.8 * scale}
    run = make_run(corpus, tmp_path, optimizer=optimizer, **settings)
    rates = watch_steps(run, lambda: [g["lr"] for one in run.optimizers for g in one.param_groups])
    for _ in range(12):
        run.step()
    for step, rate in RATES.items():
        if step < 12:
            assert rates[step] == pytest.approx([rate * scale] * (2 if optimizer == "adamw" else 3))


def test_logged_rates_are_those_of_the_steps(corpus: Path, tmp_path: Path) -> None:
    settings = {**SCHEDULE, "learning_rate": 8e-4, "log_every": 4}
    trained(run_config(corpus, **settings), tmp_path / "run")
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in r]
    assert [record["step"] for record in records] == [4, 8, 12]
    last_of_each = [8e-4, 0.2e-3 + 0.6e-3 * 0.6913417162, 2.228361402e-4]  # after the warm-up; 67.5 degrees
    assert [record["learning_rate"] for record in records] == pytest.approx(last_of_each)


# --- optimizers ------------------------------------------------------------------------------------------


def test_settings_reach_adamw(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, beta1=0.7, beta2=0.85, weight_decay=0.3)
    (adamw,) = run.optimizers
    assert isinstance(adamw, torch.optim.AdamW)
    for group, decay in zip(adamw.param_groups, (0.3, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.85), 1e-8, decay)
        assert (group["amsgrad"], group["maximize"]) == (False, False)


def test_settings_reach_muon_and_its_adamw(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, optimizer="muon", beta1=0.7, beta2=0.85, weight_decay=0.3)
    muon, adamw = run.optimizers
    (group,) = muon.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.95, True, 0.3)
    assert (group["adjust_lr_fn"], group["ns_steps"]) == ("match_rms_adamw", 5)
    assert [(g["betas"], g["eps"]) for g in adamw.param_groups] == [((0.7, 0.85), 1e-8)] * 2
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.3, 0.0]
    # The head's matrix alone is left of those that decay.
    assert [parameter is run.model.head.weight for parameter in adamw.param_groups[0]["params"]] == [True]


def test_two_steps_of_adamw_by_hand() -> None:
    """Gradients 2, then 1; the weight decays, the bias does not.

    Step 1: m = 1, v = 1, update 0.1 * 2 / 2. Step 2: m = 1, v = 1, update 0.1 (1 / 0.75) / sqrt(1 / 0.4375).
    """
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    (adamw,) = make_optimizers(layer, TrainConfig(learning_rate=0.1, beta1=0.5, beta2=0.75, weight_decay=0.5))
    found = []
    for gradient in (2.0, 1.0):
        layer.weight.grad, layer.bias.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        adamw.step()
        found.append((layer.weight.item(), layer.bias.item()))
    assert found[0] == pytest.approx((0.85, 0.9), rel=1e-6)
    assert found[1] == pytest.approx((0.719308290, 0.811808290), rel=1e-6)


def test_epsilon_halves_an_update_by_a_gradient_of_its_size() -> None:
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.bias)
    layer.bias.grad = torch.full((1,), 1e-8)
    (adamw,) = make_optimizers(layer, TrainConfig(learning_rate=0.1))
    adamw.step()
    assert layer.bias.item() == pytest.approx(-0.05, rel=1e-4)


OF_BLOCKS = {"blocks.0.down.weight", "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight"}
OF_MIXERS: dict[str, set[str]] = {
    "mingru": set(),
    "minlstm": set(),
    "minema": set(),
    "rnn": set(),
    "gru": set(),
    "lstm": set(),
    "attention": {"qkv"},
    "aaren": {"key", "value"},
    "s4d": {"output"},
    "mamba": {"in_proj", "x_proj", "dt_proj"},
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_names_of_the_parameters_that_decay(mixer: str, tied: bool) -> None:
    model = SequenceModel(ModelConfig(d_model=8, num_layers=1, mixer=mixer, tie_embeddings=tied))
    of_mixer = {f"blocks.0.mixer.{name}.weight" for name in OF_MIXERS[mixer]}
    assert decayed_parameters(model) == OF_BLOCKS | of_mixer | (set() if tied else {"head.weight"})


def test_names_of_the_parameters_of_a_policy_that_decay() -> None:
    model = DecisionModel(DecisionConfig(ModelConfig(d_model=8, num_layers=1), 3, 2, max_steps=5))
    embeddings = {f"embed_{name}.weight" for name in ("observation", "previous", "return")}
    assert decayed_parameters(model) == OF_BLOCKS | embeddings | {"head.weight"}


def test_a_layer_that_is_tied_to_an_embedding_does_not_decay() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "head": nn.Linear(2, 3), "other": nn.Linear(2, 3)})
    model["head"].weight = model["table"].weight
    assert decayed_parameters(model) == {"other.weight"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_decays_in_a_run(corpus: Path, tmp_path: Path, optimizer: OptimizerName) -> None:
    """With all gradients 0, a step multiplies what decays by 1 - rate * decay = 0.9, and nothing else."""
    run = make_run(corpus, tmp_path, optimizer=optimizer, learning_rate=0.2, warmup_steps=0, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}

    def forget() -> None:
        for parameter in run.model.parameters():
            parameter.grad.zero_()

    watch_steps(run, forget)
    run.step()
    decays = {
        name
        for layer in (0, 1)
        for name in (
            f"blocks.{layer}.down.weight",
            f"blocks.{layer}.mlp.up.weight",
            f"blocks.{layer}.mlp.down.weight",
            *([f"blocks.{layer}.mixer.rnn.weight_ih_l0"] if optimizer == "muon" else []),
        )
    } | {"head.weight"}
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.9 if name in decays else 1), msg=name)


# --- gradients -------------------------------------------------------------------------------------------


def test_the_gradient_of_a_step_has_the_norm_of_the_bound(corpus: Path, tmp_path: Path) -> None:
    found: dict[float, dict[str, torch.Tensor]] = {}
    for bound in (0.0, 1000.0, 0.05):
        run = make_run(corpus, tmp_path, grad_clip=bound)
        steps = watch_steps(run, lambda run=run: gradients(run))
        run.step()
        run._collect()
        (found[bound],) = steps
        assert found[bound].keys() == dict(run.model.named_parameters()).keys()
        assert run.state.grad_norms == pytest.approx([total_norm(found[0.0])], rel=1e-5)  # before clipping
    assert total_norm(found[0.05]) == pytest.approx(0.05, rel=1e-5)
    scale = 0.05 / total_norm(found[0.0])
    assert scale < 0.5
    for name, whole in found[0.0].items():
        assert torch.equal(found[1000.0][name], whole), name
        torch.testing.assert_close(found[0.05][name], whole * scale, rtol=1e-4, atol=1e-9)


def test_no_gradient_is_left_for_the_next_step(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, dropout=0.0, grad_clip=0.0)
    steps = watch_steps(run, lambda: gradients(run))
    before = copy.deepcopy(run.model)
    run.step()
    run.model.load_state_dict(before.state_dict())
    run.step()
    run.task.loss(before, run.task.batch(1, 3, 0))[0].backward()
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(steps[1][name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_every_batch_of_an_accumulated_step_is_another(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(corpus, tmp_path, accumulate=3, seed=5)
    asked, batch = [], run.task.batch
    monkeypatch.setattr(run.task, "batch", lambda *call: asked.append(call) or batch(*call))
    for _ in range(2):
        run.step()
    assert asked == [(0, 3, 5), (1, 3, 5), (2, 3, 5), (3, 3, 5), (4, 3, 5), (5, 3, 5)]
    assert run.state.step == 2
    assert run.state.tokens == 2 * 3 * 3 * 16


def test_the_gradient_of_a_step_is_the_mean_over_its_batches(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, dropout=0.0, accumulate=2, grad_clip=0.0)
    model = copy.deepcopy(run.model)
    steps = watch_steps(run, lambda: gradients(run))
    run.step()
    run._collect()
    losses = [run.task.loss(model, run.task.batch(part, 3, 0))[0] for part in range(2)]
    assert run.state.losses == pytest.approx([sum(loss.item() for loss in losses) / 2], rel=1e-5)
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(steps[0][name], parameter.grad / 2, rtol=1e-4, atol=1e-7)


# --- precision -------------------------------------------------------------------------------------------

COMPUTES: dict[Precision, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "highest"),
    "bfloat16-products": (torch.float32, "medium"),
    "bfloat16": (torch.bfloat16, "highest"),
}
"""What a linear layer returns in training, and the precision of its float32 products."""


@pytest.mark.parametrize("precision", COMPUTES)
@pytest.mark.parametrize("reads", [{}, {"carry_state": True, "fresh_share": 0.3}], ids=["windows", "streams"])
def test_linear_layers_compute_in_the_precision(
    corpus: Path, tmp_path: Path, precision: Precision, reads: dict[str, Any]
) -> None:
    found: dict[bool, set[tuple[torch.dtype, str]]] = {True: set(), False: set()}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            found[module.training].add((output.dtype, torch.get_float32_matmul_precision()))

    config = run_config(corpus, precision=precision, steps=2, eval_every=1, **reads)
    with nn.modules.module.register_module_forward_hook(note):
        trained(config, tmp_path / "run")
    dtype, products = COMPUTES[precision]
    assert found == {True: {(dtype, products)}, False: {(torch.float32, products)}}  # training, evaluation
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", COMPUTES)
def test_losses_gradients_and_moments_are_in_float32(
    corpus: Path, tmp_path: Path, precision: Precision
) -> None:
    run = make_run(corpus, tmp_path, precision=precision)
    steps = watch_steps(run, lambda: gradients(run))
    assert run._gradients(0).dtype == torch.float32
    run.step()
    assert {gradient.dtype for gradient in steps[0].values()} == {torch.float32}
    moments = [m for of_one in run.optimizers[0].state.values() for m in of_one.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


# --- seeds -----------------------------------------------------------------------------------------------


def initial_weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def first_inputs(run: Run) -> torch.Tensor:
    return run._batches(0)[0].inputs


def fresh_inputs(run: Run) -> torch.Tensor:
    return run._batches(0)[1].inputs


def first_mask(run: Run) -> torch.Tensor:
    return run.model.dropout(torch.ones(5, 16))


STREAMS = {"carry_state": True, "fresh_share": 0.3}


@pytest.mark.parametrize(
    ("part", "reads"),
    [(initial_weights, {}), (first_mask, {}), (first_inputs, {}), (fresh_inputs, STREAMS)],
    ids=["weights", "dropout", "windows", "fresh windows"],
)
def test_the_seed_decides_every_draw(corpus: Path, tmp_path: Path, part: Any, reads: dict[str, Any]) -> None:
    found = []
    for seed, disturbance in ((1, 8), (1, 9), (2, 8)):
        torch.manual_seed(disturbance)  # what was drawn before a run does not matter
        found.append(part(make_run(corpus, tmp_path, seed=seed, **reads)))
    one, again, other = found
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_streams_do_not_depend_on_the_seed(corpus: Path, tmp_path: Path) -> None:
    one, other = (first_inputs(make_run(corpus, tmp_path, seed=seed, carry_state=True)) for seed in (1, 2))
    assert torch.equal(one, other)


def test_the_seed_of_generated_data_and_that_of_training_are_apart(tmp_path: Path) -> None:
    sizes = {"max_length": 12, "min_length": 4, "num_train": 40, "num_validation": 4, "num_test": 4}

    def made(data_seed: int, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        task = TASKS["listops"].config_type(**sizes, data_seed=data_seed)
        training = TrainConfig(seed=seed, batch_size=8, device="cpu")
        config = RunConfig(model=ModelConfig(d_model=8, num_layers=1), task=task, train=training)
        run = Run(config, tmp_path, RunLog())
        return run.task.sha256, first_inputs(run), initial_weights(run)

    (data, order, start), (data_2, order_2, start_2), (data_3, _, start_3) = (
        made(0, 0),
        made(0, 1),
        made(1, 0),
    )
    assert data == data_2 != data_3
    assert order.shape != order_2.shape or not torch.equal(order, order_2)
    assert not torch.equal(start, start_2)
    assert torch.equal(start, start_3)


# --- when ------------------------------------------------------------------------------------------------


class Calls(RunLog):
    """A log that keeps the steps at which it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: list[tuple[int, dict[str, Any]]] = []
        self.evaluated: list[tuple[int, bool]] = []

    def training(self, step: int, metrics: Any) -> None:
        super().training(step, metrics)
        self.reported.append((step, dict(metrics)))

    def evaluation(self, step: int, metrics: Any, is_best: bool) -> None:
        super().evaluation(step, metrics, is_best)
        self.evaluated.append((step, is_best))


def watched(
    config: RunConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Calls, list[int], list[Any]]:
    """Train; return the log, the steps of the saves, and the tokens that each evaluation was limited to."""
    log, saved, limits = Calls(), [], []
    save, evaluate = Run.save, TextTask.evaluate

    def note_save(run: Run) -> None:
        saved.append(run.state.step)
        save(run)

    def note_evaluation(task: TextTask, model: nn.Module, **options: Any) -> dict[str, float]:
        limits.append(options["max_tokens"])
        return evaluate(task, model, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", note_save)
        patch.setattr(TextTask, "evaluate", note_evaluation)
        train(config, run_dir, log=log)
    return log, saved, limits


def test_steps_of_reports_evaluations_and_checkpoints(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"log_every": 4, "eval_every": 3, "checkpoint_every": 2, "eval_tokens": 20}
    config = run_config(corpus, steps=7, final_eval_tokens=30, **every)
    log, saved, limits = watched(config, tmp_path / "run", monkeypatch)
    assert [step for step, _ in log.reported] == [4, 7]
    assert [step for step, _ in log.evaluated] == [3, 6, 7]
    assert saved == [2, 4, 6, 7]
    assert limits == [20, 20, 20, 30]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["val_tokens"] == 30
    assert [metrics["tokens"] for _, metrics in log.reported] == [4 * 48, 7 * 48]


def test_zero_is_only_at_the_end_and_one_evaluation_serves_both(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"log_every": 9, "eval_every": 0, "checkpoint_every": 0, "eval_tokens": 20}
    config = run_config(corpus, steps=7, final_eval_tokens=20, **every)
    log, saved, limits = watched(config, tmp_path / "run", monkeypatch)
    assert [step for step, _ in log.reported] == [7]
    assert [step for step, _ in log.evaluated] == [7]
    assert saved == [7]
    assert limits == [20]


def test_a_report_is_the_mean_since_the_one_before(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, add = [], Run._gradients

    def note(run: Run, part: int) -> torch.Tensor:
        losses.append(add(run, part).item())
        return torch.tensor(float(len(losses)))  # 1, 2, 3, ...

    monkeypatch.setattr(Run, "_gradients", note)
    config = run_config(corpus, steps=7, log_every=4, eval_every=3, checkpoint_every=2)
    log, _, _ = watched(config, tmp_path / "run", monkeypatch)
    assert [metrics["loss"] for _, metrics in log.reported] == [2.5, 6.0]  # of 1 to 4, and of 5 to 7


def test_best_and_last_hold_the_weights_of_their_steps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    val_losses = iter([3.0, 1.0, 1.0, 2.0, 2.0, 1.5, 1.5])

    def evaluate(_: TextTask, model: nn.Module, **__: Any) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"val_loss": next(val_losses)}

    monkeypatch.setattr(TextTask, "evaluate", evaluate)
    config = run_config(corpus, steps=4, eval_every=1, checkpoint_every=3)

    def check(step: int, val_loss: float, results: dict[str, Any]) -> None:
        held = {
            which: load_checkpoint(tmp_path / "run" / "checkpoints" / which) for which in ("best", "last")
        }
        assert {which: extra["step"] for which, (_, extra) in held.items()} == {"best": 2, "last": step}
        for which, index in (("best", 1), ("last", -1)):
            stored = weights(tmp_path / "run", which)
            assert all(torch.equal(value, seen[index][name]) for name, value in stored.items())
        assert any(not torch.equal(value, seen[-1][name]) for name, value in seen[1].items())
        assert (results["step"], results["val_loss"]) == (step, val_loss)
        assert results["best"] == {"step": 2, "val_loss": 1.0}  # the earliest of equals

    check(4, 2.0, trained(config, tmp_path / "run"))
    longer = config.override(train={"steps": 5})
    check(5, 1.5, trained(longer, tmp_path / "run", resume=True))  # lower than the last, not than the best


# --- resuming --------------------------------------------------------------------------------------------

MAY_CHANGE = {
    "steps",
    "eval_every",
    "eval_tokens",
    "final_eval_tokens",
    "checkpoint_every",
    "log_every",
    "compile",
    "device",
    "threads",
    "sequence_ranks",
    "timeout",
    "weights",
}
OTHERS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "accumulate": 2,
    "optimizer": "muon",
    "learning_rate": 2e-2,
    "min_learning_rate_ratio": 0.2,
    "warmup_steps": 2,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.9,
    "grad_clip": 2.0,
    "precision": "bfloat16",
    "compile": True,
    "carry_state": False,
    "fresh_share": 0.3,
    "eval_every": 1,
    "eval_tokens": 50,
    "final_eval_tokens": 60,
    "checkpoint_every": 1,
    "log_every": 1,
    "seed": 1,
    "device": "auto",
    "threads": 2,
    "sequence_ranks": 2,
    "timeout": 5,
    "weights": "sharded",
}
"""Another valid value of every training setting of the run below."""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_every_training_setting_is_kept_or_may_change(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = run_config(corpus, steps=3, carry_state=True, threads=1)
    assert OTHERS.keys() == {entry.name for entry in dataclasses.fields(TrainConfig)}
    run_dir = tmp_path / "run"
    trained(config, run_dir)
    saved = json.loads((run_dir / "checkpoints" / "last" / "trainer.json").read_text())["run"]
    assert saved["train"].keys() == OTHERS.keys() - MAY_CHANGE
    for name, other in OTHERS.items():
        assert getattr(config.train, name) != other
        changed = config.override(train={name: other})
        if name in MAY_CHANGE:
            continue
        with pytest.raises(ValueError, match=rf"resume: train\.{name} is .* can change"):
            trained(changed, run_dir, resume=True)
        assert read_config(run_dir).train == config.train
    changes = {name: OTHERS[name] for name in MAY_CHANGE - {"sequence_ranks"}}  # of which there is one here
    for name in sorted(changes.keys() - {"steps"}):
        trained(config.override(train={name: OTHERS[name]}), run_dir, resume=True)
    results = trained(config.override(train=changes), run_dir, resume=True)
    assert results["step"] == 4
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("task", TASKS)
def test_no_setting_of_model_or_task_may_change(task: str) -> None:
    config = RunConfig(task=TASKS[task].config_type())
    check_unchanged(config, config)
    for table in ("model", "task", "train"):
        settings = getattr(config, table)
        for name in (entry.name for entry in dataclasses.fields(settings)):
            changed = copy.copy(settings)
            object.__setattr__(changed, name, "another value")  # no check of values, which is not at stake
            other = copy.copy(config)
            object.__setattr__(other, table, changed)
            if table == "train" and name in MAY_CHANGE:
                check_unchanged(config, other)
                continue
            with pytest.raises(ValueError, match=rf"resume: {table}\.{name} is .* got 'another value'"):
                check_unchanged(config, other)


@dataclasses.dataclass(frozen=True)
class Timed(TaskConfig):
    """Settings of a task, one of which has the name of a training setting that may change."""

    steps: int = 1

    task = "timed"


def test_the_name_of_a_setting_that_may_change_is_one_of_training_alone() -> None:
    check_unchanged(RunConfig(task=Timed(1)), RunConfig(task=Timed(1), recipe="another"))
    with pytest.raises(ValueError, match=r"resume: task\.steps is 1 in this run, got 2"):
        check_unchanged(RunConfig(task=Timed(1)), RunConfig(task=Timed(2)))


def test_a_run_without_a_checkpoint_keeps_its_settings(corpus: Path, tmp_path: Path) -> None:
    """Its config.json is all that says which they are."""
    config = run_config(corpus)
    make_run(corpus, tmp_path / "run").begin(resume=False)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"resume: train\.seed is 0 in this run, got 1"):
        trained(config.override(train={"seed": 1}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
