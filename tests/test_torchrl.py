"""torchrl's module around a minGRU: rollouts with resets inside, collectors, losses, vmap."""

import copy
from typing import Any

import pytest
import torch

from minrnn import MinGRU, MinLSTM

tensordict = pytest.importorskip("tensordict", reason="needs the extra torchrl")
torchrl = pytest.importorskip("torchrl", reason="needs the extra torchrl")
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule, TensorDictSequential  # noqa: E402
from torchrl.modules import set_recurrent_mode  # noqa: E402

from minrnn.integrations.torchrl import MinGRUModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NEXT = ("next", "state")


def module(**options: Any) -> MinGRUModule:
    torch.manual_seed(0)
    return MinGRUModule(3, 5, 2, in_keys=["x", "state"], out_keys=["y", NEXT], **options)


def rollout(*batch: int, rows: int = 2) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    content = {
        "x": torch.randn(*batch, 3, generator=generator),
        "is_init": torch.rand(*batch, 1, generator=generator) < 0.2,
        "state": torch.zeros(*batch, rows, 5),
    }
    return TensorDict(content, batch)


@pytest.mark.parametrize("options", [{}, {"candidate": "tanh"}, {"forget_bias": -3.0}, {"conv_width": 4}])
@pytest.mark.parametrize("batch", [(7,), (4, 9), (2, 3, 8)])
def test_a_rollout_is_its_steps_resets_included(batch: tuple[int, ...], options: dict[str, Any]) -> None:
    policy = module(**options)
    rows = policy.gru.num_layers
    assert rows == (5 if "conv_width" in options else 2)
    data = rollout(*batch, rows=rows)
    for name, value in options.items():
        assert name == "conv_width" or getattr(policy.gru, name) == value
    with set_recurrent_mode(True):
        found = policy(data.clone())
    state, outputs = data["state"][..., 0, :, :] + 1, []  # which the first step forgets, if it is a start
    data["is_init"][..., 0, :] = True
    for t in range(batch[-1]):
        step = data[..., t].clone().set("state", state)
        with set_recurrent_mode(False):
            step = policy(step)
        fresh = torch.where(step["is_init"].unsqueeze(-1), 0.0, state).reshape(-1, rows, 5).transpose(0, 1)
        expected, after = policy.gru(step["x"].reshape(-1, 1, 3), fresh.contiguous())
        torch.testing.assert_close(step["y"].reshape(-1, 5), expected.squeeze(1))
        torch.testing.assert_close(step[NEXT].reshape(-1, rows, 5), after.transpose(0, 1))
        outputs.append(step["y"])
        state = step[NEXT]
    torch.testing.assert_close(found["y"], torch.stack(outputs, -2))
    torch.testing.assert_close(found[NEXT][..., -1, :, :], state)
    assert not found[NEXT][..., :-1, :, :].any()
    assert found.batch_size == data.batch_size


def test_the_state_is_carried_from_rollout_to_rollout() -> None:
    policy, data = module(), rollout(4, 10)
    data["is_init"][:, 5:] = False
    with set_recurrent_mode(True):
        whole = policy(data.clone())
        first = policy(data[:, :5].clone())
        second = data[:, 5:].clone()
        second["state"][:, 0] = first[NEXT][:, -1]
        second = policy(second)
    torch.testing.assert_close(second["y"], whole["y"][:, 5:])


def test_a_batch_without_a_state_starts_from_zeros() -> None:
    policy, data = module(), rollout(2, 6)
    with set_recurrent_mode(True):
        torch.testing.assert_close(policy(data.clone().exclude("state"))["y"], policy(data.clone())["y"])


def test_gradients_do_not_cross_a_start() -> None:
    policy, data = module(), rollout(1, 6)
    data["is_init"][:] = False
    data["is_init"][0, 3] = True
    data["x"].requires_grad_()
    with set_recurrent_mode(True):
        policy(data)["y"][0, 4].sum().backward()
    grad = data["x"].grad
    assert grad is not None
    assert not grad[0, :3].any()
    assert grad[0, 3:5].all()


def test_ensembles_by_vmap() -> None:
    """As losses of torchrl run several value networks at once."""
    first, second, data = module(), module(forget_bias=2.0), rollout(2, 6)
    stacked = TensorDict.from_modules(first, second, as_module=False)
    skeleton = copy.deepcopy(first)

    def run(parameters: Any, rows: Any) -> Any:
        with parameters.to_module(skeleton), set_recurrent_mode(True):
            return skeleton(rows)["y"]

    found = torch.vmap(run, (0, None))(stacked, data)
    with set_recurrent_mode(True):
        expected = torch.stack([each(data.clone())["y"] for each in (first, second)])
    torch.testing.assert_close(found, expected)


def test_a_collector_and_a_loss() -> None:
    pytest.importorskip("gymnasium", reason="needs the extra rl")
    from torchrl.collectors import Collector
    from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.manual_seed(0)
    net = MinGRUModule(4, 8, in_key="observation", out_key="y", conv_width=4)
    env = TransformedEnv(GymEnv("CartPole-v1"), Compose(InitTracker(), net.make_tensordict_primer()))
    head = TensorDictModule(torch.nn.Linear(8, 2), ["y"], ["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(net, head),
        in_keys=["logits"],
        distribution_class=torchrl.modules.OneHotCategorical,
        return_log_prob=True,
    )
    critic = TensorDictSequential(net, ValueOperator(torch.nn.Linear(8, 1), in_keys=["y"]))
    loss = ClipPPOLoss(actor, critic)
    collector = Collector(env, actor, frames_per_batch=60, total_frames=60)
    (data,) = collector
    collector.shutdown()
    assert data["is_init"].sum() > 1, "an episode should have ended inside the rollout"
    with set_recurrent_mode(True):
        GAE(gamma=0.99, lmbda=0.95, value_network=critic)(data)
        again = actor.get_dist(data.clone())
        torch.testing.assert_close(again.log_prob(data["action"]), data["action_log_prob"])
        losses = loss(data)
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in loss.parameters())


@pytest.mark.parametrize("conv_width", [0, 4])
def test_a_module_has_the_arguments_of_its_layers(conv_width: int) -> None:
    options: dict[str, Any] = {"bias": False, "dropout": 0.5, "device": "meta", "conv_width": conv_width}
    gru = MinGRUModule(3, 5, 2, in_key="x", out_key="y", **options).gru
    rnn = gru.rnn if conv_width else gru
    assert (rnn.bias, rnn.dropout, rnn.num_layers) == (False, 0.5, 2)
    assert all(parameter.is_meta for parameter in gru.parameters())


def test_layers_may_be_given() -> None:
    layer = MinLSTM(3, 5, 2, batch_first=True)
    policy = MinGRUModule(gru=layer, in_keys=["x", "state"], out_keys=["y", NEXT])
    assert policy.gru is layer
    with set_recurrent_mode(True):
        assert policy(rollout(2, 6))["y"].shape == (2, 6, 5)


def test_bad_arguments_are_refused() -> None:
    keys: dict[str, Any] = {"in_key": "x", "out_key": "y"}
    with pytest.raises(TypeError, match="input_size and hidden_size, or gru, must be given"):
        MinGRUModule(3, **keys)
    with pytest.raises(ValueError, match="gru must be given without arguments"):
        MinGRUModule(3, 5, gru=MinGRU(3, 5, batch_first=True), **keys)
    with pytest.raises(ValueError, match="gru must be given without arguments"):
        MinGRUModule(gru=MinGRU(3, 5, batch_first=True), conv_width=2, **keys)
    with pytest.raises(ValueError, match="MinGRUModule: conv_width must be at least 0, got -1"):
        MinGRUModule(3, 5, conv_width=-1, **keys)
    with pytest.raises(ValueError, match="batch_first=True"):
        MinGRUModule(gru=MinGRU(3, 5), **keys)
    with pytest.raises(TypeError, match="must be a MinGRU or MinLSTM, got GRU"):
        MinGRUModule(gru=torch.nn.GRU(3, 5, batch_first=True), **keys)  # type: ignore[arg-type]
    policy = MinGRUModule(3, 5, **keys)
    with pytest.raises(TypeError, match="one form"):
        policy.make_python_based()
    with set_recurrent_mode(True), pytest.raises(ValueError, match="must be time, got none"):
        policy(TensorDict({"x": torch.zeros(3), "is_init": torch.zeros(1, dtype=torch.bool)}))
    with pytest.raises(KeyError, match="must have the key 'x'"):
        policy(TensorDict({"is_init": torch.zeros(2, 1, dtype=torch.bool)}, [2]))
