"""Exported programs compute what their modules compute, step by step and with any batch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import V, decision_model, draw, first_states, follow, language_model, relative, run_elsewhere
from torch import Tensor, nn

from minrnn import MinGRU, export_sequence, export_step
from minrnn.export import FORMATS, Exported, format_of
from minrnn.export.buffers import keep_state
from minrnn.export.converting import check
from minrnn.export.models import interface_of
from minrnn.export.states import Layout
from minrnn.mixers import MIXERS
from minrnn.models import Policy
from minrnn.models.decision import NOTHING_DONE, TOKENS, DecisionModel, Steps

HAVE_ONNX = pytest.mark.skipif(
    None in map(find_spec, ("onnx", "onnxruntime", "onnxscript")),
    reason="onnx is not installed: the extra export",
)


@pytest.fixture(scope="module")
def step() -> Exported:
    """A minGRU language model's step, of any batch."""
    return export_step(language_model(), metadata={"vocabulary": {"kind": "bytes"}})


# --- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("options", "windows"), [({}, ["conv"]), ({"conv_width": 0}, [])], ids=str)
def test_a_state_is_stacked_and_separated(mixer: str, options: dict[str, int], windows: list[str]) -> None:
    model = language_model(mixer, **options)
    layout = Layout(model.blocks, next(model.parameters()))
    _, state = model(torch.randint(V, (3, 6)))
    torch.testing.assert_close(layout.separate(layout.stack(state)), state, rtol=0, atol=0)
    assert [part.name for part in layout.parts] == [*windows, *MIXERS[mixer].state_names]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("form", ["step", "sequence"])
def test_the_empty_state_is_none(mixer: str, form: str) -> None:
    """A call with the first values of the metadata is a call of the model without a state."""
    model = language_model(mixer)
    module, ports, outputs, _ = interface_of(model, form, None)
    tokens = torch.randint(V, (3, 1) if form == "step" else (3, 7))
    states = [
        torch.full([3 if axis == "batch" else int(axis) for axis in port.axes], port.carried.initial).to(
            port.example.dtype
        )
        for port in ports
        if port.carried is not None
    ]
    given = tokens.squeeze(1) if form == "step" else tokens
    with torch.no_grad():
        logits, *after = module(given, *states)
        expected, state = model(tokens)
    torch.testing.assert_close(logits.reshape(expected.shape), expected)
    assert len(after) == len(outputs) - 1 == len(states)
    if mixer == "attention":  # without a state it returns those tokens alone that it has read
        return
    for part, (windows, carried) in zip(zip(*after, strict=True), state, strict=True):
        for ours, theirs in zip(part, (*windows, *carried), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_state_that_grows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"AttentionMixer's grows from .* attention needs a window of 2 or more"
    ):
        export_step(language_model("attention", window=0))


def test_blocks_of_different_mixers_are_refused() -> None:
    model = language_model()
    model.blocks[1] = language_model("lstm").blocks[0]
    with pytest.raises(ValueError, match="the blocks' states must have one form"):
        export_step(model)


# --- policies -----------------------------------------------------------------------------------------------

POLICIES: dict[str, dict[str, Any]] = {
    **{tokens: {"tokens": tokens} for tokens in TOKENS if tokens != "observation"},
    "observation": {"tokens": "observation", "target_return": None, "return_scale": 1.0},
    "timed": {"max_steps": 20},
    "discrete": {"discrete": True},
    "timed observation": {
        "tokens": "observation",
        "target_return": None,
        "return_scale": 1.0,
        "max_steps": 20,
        "discrete": True,
    },
}


def play(model: DecisionModel, batch: int, length: int) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Return what a policy observes, and its actions by `Policy.act`."""
    generator = torch.Generator().manual_seed(3)
    policy, steps, actions = Policy(model), [], []
    for _ in range(length):
        obs = 3 * torch.randn(batch, 5, generator=generator)
        reward = torch.randn(batch, generator=generator) if actions else torch.zeros(batch)
        steps.append({"obs": obs, "reward": reward} if model.config.conditioned else {"obs": obs})
        actions.append(policy.act(obs, reward))
    return steps, actions


class Eager:
    """An interface in place of an exported program, run without tracing."""

    def __init__(self, model: Any, form: str = "step") -> None:
        self.module, self.inputs, self.outputs, _ = interface_of(model, form, None)

    def describe(self) -> str:
        return json.dumps({"inputs": [port.describe() for port in self.inputs]})

    def __call__(self, inputs: Any) -> Any:
        with torch.no_grad():
            return self.module(*inputs)


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_a_policys_step_is_act(options: dict[str, Any]) -> None:
    model = decision_model(**options)
    steps, actions = play(model, 4, 9)
    eager = Eager(model)
    assert eager.outputs[0] == "actions"
    assert [port.name for port in eager.inputs][: len(steps[0])] == list(steps[0])
    for ours, theirs in zip(follow(eager, eager, steps), actions, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_policys_target_is_its_first_return() -> None:
    model = decision_model()
    for policy, target in ((model, 30.0), (Policy(model), 30.0), (Policy(model, target_return=7.0), 7.0)):
        interface = interface_of(policy, "step", None)
        (port,) = (port for port in interface.inputs if port.name == "return_in")
        assert port.carried is not None
        assert port.carried.initial == target == interface.metadata["target_return"]


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_a_policys_sequence_is_the_model(options: dict[str, Any]) -> None:
    model = decision_model(**options)
    B, T = 3, 6
    generator = torch.Generator().manual_seed(0)
    obs, returns = torch.randn(B, T, 5, generator=generator), torch.randn(B, T, generator=generator)
    if model.config.discrete:
        previous = torch.randint(NOTHING_DONE, 3, (B, T), generator=generator)
    else:
        previous = torch.randn(B, T, 3, generator=generator)
    times = torch.arange(T).expand(B, T)
    given = {"obs": obs, "returns": returns, "previous": previous, "times": times}
    eager = Eager(model, "sequence")
    given |= first_states(eager, B)  # type: ignore[arg-type]
    actions, *_ = eager([given[port.name] for port in eager.inputs])
    with torch.no_grad():
        expected, _ = model(Steps(returns, obs, previous, times))
    assert torch.equal(actions, expected.argmax(-1) if model.config.discrete else expected)


def test_a_policy_that_reads_a_window_again_is_refused() -> None:
    with pytest.raises(ValueError, match="reads its last 4 steps again for every action"):
        export_step(decision_model(window=4))


# --- a state in buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mingru", "lstm", "aaren", "attention"])
def test_a_state_in_buffers_is_the_passed_one_and_is_cleared_by_reset(mixer: str) -> None:
    model = language_model(mixer)
    kept = keep_state(interface_of(model, "step", 2))
    assert [port.name for port in kept.inputs] == ["tokens", "reset"]
    assert kept.outputs == ("logits",)
    tokens, reset = torch.randint(V, (2, 8)), torch.zeros(2, 8, dtype=torch.bool)
    reset[1, 5] = True
    with torch.no_grad():
        ours = [kept.module(tokens[:, t], reset[:, t])[0] for t in range(8)]
        expected, _ = model(tokens)
        expected[1:, 5:], _ = model(tokens[1:, 5:])
    torch.testing.assert_close(torch.stack(ours, 1), expected)


def test_buffers_need_a_fixed_batch_and_a_model() -> None:
    for given in ({}, {"inputs": {"x": torch.zeros(1)}, "outputs": ["y"]}):
        with pytest.raises(ValueError, match="keeps_state needs one of minrnn's models and a fixed batch"):
            export_step(language_model() if not given else nn.Identity(), keeps_state=True, **given)


# --- programs -----------------------------------------------------------------------------------------------


def test_a_step_holds_neither_operators_of_minrnn_nor_loops(step: Exported) -> None:
    targets = {str(node.target) for node in step.program.graph.nodes}
    assert not [name for name in targets if "minrnn" in name or "scan" in name]
    assert step.free == {"batch"}
    assert not step.is_stateful
    assert not step.has_complex


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_one_program_serves_any_batch(step: Exported, batch: int) -> None:
    model = language_model()
    tokens = torch.randint(V, (batch, 20), generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected, _ = model(tokens)
    run: Any = step.program.module()
    ours = follow(step, lambda given: run(*given), [{"tokens": tokens[:, t]} for t in range(20)])
    assert relative(torch.stack(ours, 1), expected) < 1e-5


def test_a_file_says_what_it_takes_and_returns(step: Exported) -> None:
    known = json.loads(step.describe())
    assert known["inputs"] == [
        {"name": "tokens", "dtype": "int64", "shape": ["batch"]},
        {
            "name": "conv_in",
            "dtype": "float32",
            "shape": [2, "batch", 3, 16],
            "initial": 0.0,
            "next": "conv_out",
        },
        {"name": "h_in", "dtype": "float32", "shape": [2, "batch", 16], "initial": 0.0, "next": "h_out"},
    ]
    assert known["outputs"] == [
        {"name": "logits", "dtype": "float32", "shape": ["batch", V]},
        {"name": "conv_out", "dtype": "float32", "shape": [2, "batch", 3, 16]},
        {"name": "h_out", "dtype": "float32", "shape": [2, "batch", 16]},
    ]
    assert (known["form"], known["kind"], known["mixer"]) == ("step", "language model", "mingru")
    assert known["vocabulary"] == {"kind": "bytes"}


class Net(nn.Module):
    """A user's module around one of our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = MinGRU(4, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return self.head(y), h


def example(T: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, T, 4), "h_in": torch.randn(2, 2, 8)}


def test_a_users_module_is_exported_for_sequences() -> None:
    torch.manual_seed(0)
    net = Net()
    axes = {"x": {0: "batch", 1: "time"}, "h_in": {1: "batch"}}
    exported = export_sequence(net, example(5), ["y", "h_out"], dynamic=axes)
    assert net.training
    assert sum(str(node.target) == "scan" for node in exported.program.graph.nodes) == 2
    for batch, T in ((1, 1), (3, 70)):
        inputs = draw(exported, {"batch": batch, "time": T})
        with torch.no_grad():
            for ours, theirs in zip(exported.call(*inputs), net(*inputs), strict=True):
                assert relative(ours, theirs) < 1e-6


def test_a_sequence_by_convolution_has_any_length_at_a_fixed_batch() -> None:
    model = language_model("s4d")
    exported = export_sequence(model, batch=2)
    module, *_ = interface_of(model, exported.form, None)
    for T in (2, 150):
        inputs = draw(exported, {"time": T})
        with torch.no_grad():
            for ours, theirs in zip(exported.call(*inputs), module(*inputs), strict=True):
                assert relative(ours, theirs) < 1e-5


def test_misuse_is_one_line() -> None:
    net, x = Net(), example(5)
    for call, arguments, message in (
        (export_step, {}, "inputs must be given for a module that is no model of minrnn's, got Net without"),
        (export_step, {"outputs": ["y"]}, "outputs and dynamic go with inputs, got no inputs"),
        (export_step, {"inputs": x}, "inputs go with outputs and a module"),
        (export_step, {"inputs": x, "outputs": ["y"], "dynamic": {"z": {0: "batch"}}}, "name inputs, got z"),
        (export_step, {"inputs": x, "outputs": ["y"], "dynamic": {"x": {0: "rows"}}}, "got 0: 'rows'"),
        (export_step, {"inputs": x, "outputs": ["y"], "dynamic": {"x": {3: "batch"}}}, "got 3: 'batch'"),
        (export_sequence, {"inputs": x, "outputs": ["y"]}, "the module's 2 tensors, got 1 names"),
        (export_step, {"inputs": x, "outputs": ["y", "h"]}, "must be of one step, got a sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(net, **arguments)  # type: ignore[operator]


def test_a_mixer_that_torch_unrolls_says_why_it_has_no_sequences() -> None:
    with pytest.raises(NotImplementedError, match="LSTMMixer: T must be fixed in an exported program"):
        export_sequence(language_model("lstm"))


# --- files --------------------------------------------------------------------------------------------------


def test_the_suffix_is_the_format(step: Exported, tmp_path: Path) -> None:
    assert format_of(Path("a.b.onnx")).title == "ONNX"
    with pytest.raises(
        ValueError, match=r"must end in .onnx, .pte, .pt2, got 'model.onx'; did you mean '.onnx'"
    ):
        format_of(Path("model.onx"))
    with pytest.raises(ValueError, match="must end in"):
        step.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Turned(nn.Module):
    """A module that computes with complex numbers inside."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.complex(x, x) * torch.complex(x, -x)).real


def test_what_a_format_cannot_hold_is_said(step: Exported) -> None:
    kept = export_step(decision_model(), batch=1, keeps_state=True)
    assert kept.is_stateful
    timed = replace(step, inputs=(replace(step.inputs[0], axes=("time",)),))
    for suffix, program, message in (
        (".onnx", kept, "cannot keep a state between calls"),
        (
            ".onnx",
            export_step(Turned(), {"x": torch.ones(2)}, ["y"]),
            "has no complex numbers, with which S4D",
        ),
        (".pte", step, "needs a fixed batch"),
        (".pte", timed, "needs a longest sequence"),
        (".pt2", replace(step, form="sequence"), "needs a fixed batch for sequences"),
    ):
        with pytest.raises(ValueError, match=f"{suffix} {message}"):
            FORMATS[suffix].convert(program)


def test_a_missing_extra_is_named(step: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = replace(step, inputs=tuple(replace(port, axes=tuple(port.example.shape)) for port in step.inputs))
    for suffix, module, extra in ((".onnx", "onnx", "export"), (".pte", "executorch.exir", "executorch")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            RuntimeError, match=rf"{suffix} needs {module} \(pip install 'minrnn\[{extra}\]'\)"
        ):
            fixed.save(tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_written(step: Exported) -> None:
    exact = step.call(*step.examples)
    check(".onnx", step, lambda _: [x.numpy() for x in exact])
    for off, wrong in ((1e-5, False), (1e-2, True)):
        found = [exact[0], exact[1], exact[2] + off]
        if wrong:
            with pytest.raises(RuntimeError, match="the file's h_out differs from the program's"):
                check(".onnx", step, lambda _, found=found: found)
        else:
            check(".onnx", step, lambda _, found=found: found)
    for bad in (exact[0][None], exact[0][:1], exact[0] * torch.nan):
        with pytest.raises(RuntimeError, match="logits differs"):
            check(".onnx", step, lambda _, bad=bad: [bad, *exact[1:]])


@HAVE_ONNX
def test_an_onnx_step_runs_where_torch_is_not(step: Exported, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "step.onnx"
    path.write_bytes(b"old")
    step.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import] == [20]
    assert {node.domain for node in model.graph.node} == {""}
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    known = json.loads(step.describe())
    assert shapes == [port["shape"] for port in (*known["inputs"], *known["outputs"])]
    for batch in (1, 3, 64):
        inputs = draw(step, {"batch": batch})
        found, metadata = run_elsewhere(path, inputs)
        assert metadata == known
        for ours, theirs in zip(found, step.call(*inputs), strict=True):
            assert relative(ours, theirs) < 1e-5
