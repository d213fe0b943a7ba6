"""Learning to act: which steps a batch holds, what it tells of them, and the one loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minrnn.mixers import MIXERS
from minrnn.models import NOTHING_DONE, DecisionModel, ModelConfig, Policy, Steps
from minrnn.tasks import Batch, DecisionsConfig, DecisionsTask, decisions
from minrnn.tasks.decisions import best_return
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.task import Whole
from minrnn.training import RunConfig, RunLog, TrainConfig, load_trained, read_config, read_metrics, train

S, A = 3, 2


def make_episodes(lengths: tuple[int, ...] = (30, 7, 1, 25, 12, 40), *, discrete: bool = False) -> Episodes:
    """Episodes whose observations tell where they stand: (episode, time, index), and whose actions do too."""
    N, E = sum(lengths), len(lengths)
    ends = np.cumsum(lengths).astype(np.int64)
    episode = np.repeat(np.arange(E), lengths)
    time = np.arange(N) - np.repeat(ends - lengths, lengths)
    seen = np.stack([episode, time, np.arange(N)], axis=1).astype(np.float32)
    actions: NDArray[Any] = (np.arange(N) % 3).astype(np.int64)
    if not discrete:
        actions = np.stack([np.sin(np.arange(N)), np.full(N, 0.5)], axis=1).astype(np.float32)
    return Episodes(
        seen,
        actions,
        (1 + episode).astype(np.float32),
        ends,
        np.zeros(E, bool),
        "Pendulum-v1",
        {"name": "made"},
    )


def make_task(
    *, lengths: tuple[int, ...] | None = None, discrete: bool = False, **settings: Any
) -> DecisionsTask:
    mixer = settings.pop("mixer", "mingru")
    episodes = (
        make_episodes(discrete=discrete) if lengths is None else make_episodes(lengths, discrete=discrete)
    )
    config = DecisionsConfig(**{"window": 5, **settings}).resolved(ModelConfig(mixer=mixer))
    return DecisionsTask(config, episodes)


def place(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Episode, time and index of each step."""
    assert isinstance(batch.inputs, Steps)
    episode, time, index = batch.inputs.observations.long().unbind(-1)
    return episode, time, index


def check(task: DecisionsTask, batch: Batch) -> None:
    """A batch tells of each step what the data say of it, and where an episode begins."""
    assert isinstance(batch.inputs, Steps)
    episode, time, index = place(batch)
    data, inputs = task.episodes, batch.inputs
    assert torch.equal(inputs.times, time)
    assert torch.equal(inputs.returns, torch.from_numpy(data.returns_to_go())[index])
    actions = torch.from_numpy(data.actions)
    assert torch.equal(batch.targets, actions[index])
    nothing = torch.full_like(actions[:1], NOTHING_DONE if data.is_discrete else 0)
    before = torch.where(
        (time == 0).view(*time.shape, *[1] * (actions.dim() - 1)), nothing, actions[index - 1]
    )
    assert torch.equal(inputs.previous, before)
    starts = time == 0
    if batch.fresh:
        starts[:, 0] = False
    assert torch.equal(torch.zeros_like(starts) if batch.reset is None else batch.reset, starts)
    within = (time[:, 1:] == time[:, :-1] + 1) & (episode[:, 1:] == episode[:, :-1])
    assert (within | (time[:, 1:] == 0)).all()  # what follows is the next step, or another episode's first


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("carry", [False, True])
def test_batches_hold_what_the_data_say(carry: bool, discrete: bool) -> None:
    task = make_task(carry=carry, discrete=discrete)
    for step in range(30):
        batch = task.batch(step, 4, seed=7)
        assert batch.num_targets == 20
        check(task, batch)
        again = task.batch(step, 4, seed=7)
        assert torch.equal(batch.targets, again.targets)
    for batch in task.evaluation_batches():
        check(task, batch)


def test_held_out_episodes_are_never_trained_on() -> None:
    task = make_task(carry=False)
    assert sorted([*task.train_episodes, *task.val_episodes]) == list(range(6))
    assert len(task.val_episodes) == 1
    trained = {int(e) for step in range(50) for e in place(task.batch(step, 8, 0))[0].flatten()}
    assert trained == set(task.train_episodes.tolist())
    seen = [place(batch)[2].flatten().tolist() for batch in task.evaluation_batches()]
    (held_out,) = task.val_episodes
    first, last = task.episodes.starts[held_out], task.episodes.ends[held_out]
    assert sorted(index for part in seen for index in part) == list(range(first, last))


def test_windows_are_drawn_in_proportion_to_length() -> None:
    task = make_task(carry=False, window=2, lengths=(400, 100, 3, 3))
    counts = np.zeros(4)
    for step in range(200):
        counts += np.bincount(place(task.batch(step, 64, 0))[0].flatten(), minlength=4)
    steps = np.where(np.isin(np.arange(4), task.train_episodes), task.episodes.lengths, 0)
    assert counts / counts.sum() == pytest.approx(steps / steps.sum(), abs=0.02)


def test_streams_go_on_where_they_stopped_and_meet_every_step_once_a_pass() -> None:
    task = make_task(carry=True, lengths=(30, 7, 25, 12, 40, 6))
    steps = int(task.episodes.lengths[task.train_episodes].sum())
    per_pass = steps // 3 // 5
    passes = []
    for number in range(2):
        batches = [task.batch(number * per_pass + k, 3, seed=1) for k in range(per_pass)]
        assert [batch.fresh for batch in batches] == [True] + [False] * (per_pass - 1)
        episode, time, index = (torch.cat(parts, dim=1) for parts in zip(*map(place, batches), strict=True))
        goes_on = (episode[:, 1:] == episode[:, :-1]) & (time[:, 1:] == time[:, :-1] + 1)
        assert (goes_on | (time[:, 1:] == 0)).all()
        assert len(set(index.flatten().tolist())) == index.numel() > steps - 3 * 5
        passes.append(index)
    assert not torch.equal(passes[0], passes[1])  # another order
    other = task.batch(0, 3, seed=2)
    assert not torch.equal(place(other)[2], passes[0][:, :5])


def test_sequences_too_long_for_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"window must be at most the \d+ steps to train on, got 500"):
        make_task(carry=False, window=500)
    with pytest.raises(ValueError, match=r"batch_size must leave each stream task.window = 5 .* use at most"):
        make_task(carry=True).batch(0, 64, 0)
    with pytest.raises(ValueError, match=r"at least 2 episodes, .* got 1"):
        make_task(lengths=(9,))
    with pytest.raises(ValueError, match="step must be at least 0"):
        make_task().batch(-1, 2, 0)


# --- what a policy is made of ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_left_to_the_mixer(mixer: str) -> None:
    """Attention is Decision Transformer; recurrences carry their state, and need no table of times."""
    task = make_task(mixer=mixer)
    config = task.decision_config(task.model_config(ModelConfig(d_model=8, mixer=mixer)))
    if mixer == "attention":
        assert (config.tokens, config.window, config.max_steps) == ("interleaved", 5, 1000)
    else:
        assert (config.tokens, config.window, config.max_steps) == ("joined", 0, 0)
    assert config.environment == "Pendulum-v1"
    train = task.train_episodes
    best = best_return(task.episodes.returns[train], task.episodes.lengths[train], 0.1)
    assert config.target_return == pytest.approx(best)


@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.integers(1, 1000)), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
)
def test_the_return_asked_for_is_that_of_the_best_steps(
    episodes: list[tuple[float, int]], share: float
) -> None:
    """It is the mean over the best `share` of all steps, each with its episode's return."""
    returns, lengths = (np.array(column) for column in zip(*episodes, strict=True))
    found = best_return(returns, lengths, share)
    steps = np.sort(np.repeat(returns, lengths))[::-1]
    count = share * len(steps)
    whole = int(count)
    total = steps[:whole].sum() + (count - whole) * (steps[whole] if whole < len(steps) else 0.0)
    assert found == pytest.approx(total / count, rel=1e-9, abs=1e-6)
    assert found <= returns.max() + 1e-6
    assert best_return(returns, lengths, 1.0) == pytest.approx(np.average(returns, weights=lengths), abs=1e-6)


def test_times_are_as_many_as_the_longest_episode_has() -> None:
    task = make_task(mixer="attention", lengths=(1500, 20))
    assert task.decision_config(ModelConfig(mixer="attention")).max_steps == 1500
    with pytest.raises(ValueError, match=r"timesteps must be 0 \(none\) or at least 40, .* got 39"):
        make_task(timesteps=39).make_model(ModelConfig(d_model=8))


def test_carried_attention_is_bounded() -> None:
    task = make_task(mixer="attention", carry=True)
    assert task.model_config(ModelConfig(mixer="attention")).window == 15
    assert task.model_config(ModelConfig(mixer="attention", window=7)).window == 7
    with pytest.raises(ValueError, match=r"model.window must be bounded .* got 0"):
        task.model_config(ModelConfig(mixer="attention", window=0))
    assert make_task(mixer="attention").model_config(ModelConfig(mixer="attention")).window is None


def test_statistics_are_those_of_the_training_episodes() -> None:
    task = make_task()
    model = task.make_model(ModelConfig(d_model=8))
    steps = np.isin(task.episodes.observations[:, 0], task.train_episodes)
    seen = task.episodes.observations[steps].astype(np.float64)
    assert model.observation_mean.numpy() == pytest.approx(seen.mean(axis=0), rel=1e-5)
    assert model.observation_std.numpy() == pytest.approx(seen.std(axis=0), rel=1e-5)
    assert model.action_bound.tolist() == [1.0, 1.0]
    assert model.config.return_scale == pytest.approx(task.episodes.returns[task.train_episodes].max())
    wide = dataclasses.replace(task.episodes, actions=3 * task.episodes.actions)
    made = DecisionsTask(task.config, wide).make_model(ModelConfig(d_model=8))
    assert made.action_bound.numpy() == pytest.approx(np.abs(wide.actions[steps]).max(axis=0))
    flat = dataclasses.replace(task.episodes, observations=np.ones_like(task.episodes.observations))
    assert (
        DecisionsTask(task.config, flat).make_model(ModelConfig(d_model=8)).observation_std.tolist()
        == [1] * S
    )


def test_what_the_configuration_says_goes_before_the_data() -> None:
    task = make_task(
        environment="Hopper-v5", target_return=12.0, tokens="interleaved", carry=False, timesteps=50
    )
    config = task.decision_config(ModelConfig(d_model=8))
    assert (config.environment, config.target_return, config.tokens) == ("Hopper-v5", 12.0, "interleaved")
    assert (config.window, config.max_steps) == (5, 50)
    assert "to reach a return of 12.0" in task.describe()
    clone = make_task(tokens="observation", window=1, carry=False)
    assert clone.decision_config(ModelConfig()).target_return is None
    assert "return of" not in clone.describe().splitlines()[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1 step, got 0"),
        ({"timesteps": -1}, r"timesteps must be at least 0 \(none\), got -1"),
        ({"target_return": float("inf")}, "target_return must be finite"),
        ({"tokens": "two"}, "tokens must be one of interleaved, joined, observation, got 'two'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionsConfig(**settings)


def test_what_a_policy_lacks_is_refused() -> None:
    task = make_task()
    for settings in ({"vocab_size": 7}, {"tie_embeddings": True}):
        with pytest.raises(ValueError, match="a policy has no vocabulary"):
            task.model_config(ModelConfig(**settings))
    with pytest.raises(ValueError, match=r"task\.carry says whether"):
        task.stream_batch(0, 4)
    with pytest.raises(ValueError, match="config must be resolved"):
        DecisionsTask(DecisionsConfig(), make_episodes())
    with pytest.raises(ValueError, match=r"task\.data must name the episodes"):
        DecisionsTask(DecisionsConfig().resolved(ModelConfig()))


# --- loss and evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("carry", [False, True])
def test_evaluation_is_the_loss_of_the_held_out_steps(carry: bool, discrete: bool) -> None:
    task = make_task(carry=carry, discrete=discrete, lengths=(30,) * 25)
    torch.manual_seed(0)
    model = task.make_model(ModelConfig(d_model=8, num_layers=1, dropout=0.5))
    found = task.evaluate(model)
    assert model.training
    assert found["val_tokens"] == 60
    assert task.evaluate(model) == found
    model.eval()
    losses, state = [], None
    for batch in task.evaluation_batches():
        loss, state = task.loss(model, batch, state)
        losses += [loss.item()] * batch.num_targets
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert ("accuracy" in found) == discrete
    assert task.unit == ("nats an action" if discrete else "squared error of an action")
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        task.evaluate(model, max_tokens=-1)


class Half(Whole):
    """The share of one of two processes, which does not hear of the other."""

    def mine(self, index: int) -> bool:
        return index % 2 == 0


@pytest.mark.parametrize("carry", [False, True])
def test_windows_are_shared_out_and_streams_are_not(carry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's batch continues the one before."""
    monkeypatch.setattr(decisions, "EVAL_STEPS", 10)
    task = make_task(carry=carry, lengths=(30,) * 125)
    model = task.make_model(ModelConfig(d_model=8, num_layers=1))
    whole, half = task.evaluate(model), task.evaluate(model, split=Half())
    assert len(list(task.evaluation_batches())) > 1
    assert half["val_loss"] == whole["val_loss"] if carry else half["val_loss"] < whole["val_loss"]
    assert half["val_tokens"] == whole["val_tokens"]


def test_a_part_of_the_evaluation_is_its_first_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "EVAL_STEPS", 10)
    task = make_task(lengths=(30,) * 25)
    model = task.make_model(ModelConfig(d_model=8, num_layers=1))
    assert task.evaluate(model, max_tokens=1)["val_tokens"] == 20
    assert task.evaluate(model, max_tokens=21)["val_tokens"] == 40


# --- the one loop ----------------------------------------------------------------------------------------


def run_config(mixer: str, **task: Any) -> RunConfig:
    return RunConfig(
        "decisions",
        ModelConfig(d_model=16, num_layers=1, conv_width=0, mixer=mixer),
        DecisionsConfig(data="made", window=5, **task),
        TrainConfig(
            steps=30,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=2,
            eval_every=15,
            log_every=5,
            device="cpu",
        ),
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_find", lambda config: make_episodes((40,) * 12))


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_learns_by_the_one_loop(mixer: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    results = train(run_config(mixer), run_dir, log=RunLog())
    saved = read_config(run_dir)
    assert saved == saved.resolved() != run_config(mixer)
    losses = [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < losses[0]
    trained = load_trained(run_dir, "best", torch.device("cpu"))
    assert isinstance(trained.model, DecisionModel)
    assert trained.vocabulary is None
    assert Policy(trained.model).act(np.zeros(S, np.float32)).shape == (A,)
    again = train(saved, run_dir, resume=True, log=RunLog())
    assert again["val_loss"] == results["val_loss"]


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_stopped_and_resumed_is_uninterrupted(mixer: str, tmp_path: Path) -> None:
    config = run_config(mixer)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
    # A schedule that does not depend on when it ends, so that 13 steps are the first 13 of 30.
    steady = dataclasses.replace(config.train, min_learning_rate_ratio=1.0)
    train(dataclasses.replace(config, train=steady), tmp_path / "whole", log=RunLog())
    train(
        dataclasses.replace(config, train=dataclasses.replace(steady, steps=13)),
        tmp_path / "run",
        log=RunLog(),
    )
    train(dataclasses.replace(config, train=steady), tmp_path / "run", resume=True, log=RunLog())
    one, other = (
        load_trained(tmp_path / name, "last", torch.device("cpu")).model.state_dict()
        for name in ("whole", "run")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tokens", ["interleaved", "joined", "observation"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_every_kind_of_policy_goes_on_after_a_step(
    mixer: str, discrete: bool, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient reaches every parameter, so that there are moments of each, which resuming asks for."""
    monkeypatch.setattr(decisions, "_find", lambda config: make_episodes((40,) * 12, discrete=discrete))
    config = run_config(mixer, tokens=tokens)
    for steps in (1, 3):
        train(
            dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)),
            tmp_path / "run",
            resume=steps > 1,
            log=RunLog(),
        )


@pytest.mark.usefixtures("made")
def test_settings_of_policies_are_read_strictly() -> None:
    config = run_config("mingru", tokens="interleaved", carry=False)
    assert RunConfig.from_dict(config.to_dict()) == config
    values = config.to_dict()
    values["task"]["tokens"] = "three"
    with pytest.raises(ValueError, match=r"task.tokens must be one of interleaved, joined, observation"):
        RunConfig.from_dict(values)
    with pytest.raises(ValueError, match=r"unknown key 'task\.timestep'; did you mean 'timesteps'"):
        RunConfig.from_dict({"task": {"name": "decisions", "timestep": 3}})


# --- against arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("carry", [False, True])
def test_the_loss_is_that_of_the_held_out_episodes_each_read_alone(
    carry: bool, discrete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of whole episodes, or in one stream that is reset where the next one begins."""
    monkeypatch.setattr(decisions, "EVAL_ROWS", 1)
    monkeypatch.setattr(decisions, "EVAL_STEPS", 7)
    task = make_task(carry=carry, discrete=discrete, lengths=(30,) * 25, window=30)
    torch.manual_seed(0)
    model = task.make_model(ModelConfig(d_model=8, num_layers=1)).double().eval()
    data, to_go = task.episodes, task.episodes.returns_to_go()
    errors, right = [], 0
    for number in task.val_episodes:
        at = slice(data.starts[number], data.ends[number])
        actions = torch.from_numpy(data.actions[at])
        nothing = torch.full_like(actions[:1], NOTHING_DONE if discrete else 0)
        steps = Steps(
            torch.from_numpy(to_go[at])[None],
            torch.from_numpy(data.observations[at])[None],
            torch.cat([nothing, actions[:-1]])[None],
            torch.arange(30)[None],
        )
        predicted = model(steps)[0][0].detach()  # (30, A)
        if discrete:
            errors.append(-predicted.log_softmax(-1)[range(30), actions])
            right += int((predicted.argmax(-1) == actions).sum())
        else:
            errors.append((predicted - actions) ** 2)
    found = task.evaluate(model)
    assert len(errors) == 2
    assert found["val_loss"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert found.get("accuracy", right / 60) == right / 60


def test_an_episode_that_begins_where_a_batch_does_forgets_the_one_before() -> None:
    task = make_task(carry=True, lengths=(10,) * 8, window=5)
    seen = set()
    for step in range(14):
        batch = task.batch(step, 2, seed=0)
        check(task, batch)
        starts = place(batch)[1][:, 0] == 0
        if starts.any() and not batch.fresh:
            assert batch.reset is not None
            assert torch.equal(batch.reset[:, 0], starts)
            seen.add(step)
    assert seen


def test_every_window_is_drawn_and_the_last_one_too() -> None:
    task = make_task(carry=False, lengths=(6, 6, 6), window=5)
    drawn = {int(place(task.batch(step, 16, 0))[2][row, 0]) for step in range(20) for row in range(16)}
    steps = np.concatenate(
        [np.arange(task.episodes.starts[e], task.episodes.ends[e]) for e in task.train_episodes]
    )
    assert drawn == set(steps[: len(steps) - 4].tolist())
