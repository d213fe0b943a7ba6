"""What minrnn uses of torch beyond its documented interface stands in one file, and is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import minrnn
from minrnn.ops import torch_private

PACKAGE = Path(minrnn.__file__ or "").parent
HOME = PACKAGE / "ops" / "torch_private.py"


def private_uses(tree: ast.Module) -> list[str]:
    """Name the private parts of torch that a file imports or reaches by attributes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if any(part.startswith("_") for part in name.split("."))]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            text = ast.unparse(node)
            if text.split(".")[0] in ("torch", "forward_ad", "Tensor", "functional"):
                found.append(text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if parts[0] == "torch" and any(p.startswith("_") for p in parts) and " " not in node.value:
                found.append(node.value)
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_no_other_file_uses_private_parts_of_torch(path: Path) -> None:
    found = private_uses(ast.parse(path.read_text(encoding="utf-8")))
    assert bool(found) == (path == HOME), found


def test_private_uses_are_seen() -> None:
    text = (
        "from torch._C import x\nfrom torch.autograd import forward_ad\ntorch._C._get()\nforward_ad._level\n"
        "torch.nn.Module\nimport_module('torch._ops')"
    )
    assert set(private_uses(ast.parse(text))) == {
        "torch._C.x",
        "torch._ops",
        "forward_ad._level",
        "torch._C._get",
        "torch._C",
    }


@pytest.mark.parametrize("name", torch_private.__all__)
def test_each_is_there(name: str) -> None:
    assert getattr(torch_private, name) is not None


def test_each_does_what_its_name_says() -> None:
    """Called once here, so that a torch that has changed one fails by its name."""
    x = torch.ones(2, 3)
    assert torch_private.jit_tracing_state() is None
    assert not torch_private.functorch_is_active()
    assert torch.func.vmap(lambda y: y * torch_private.functorch_is_active())(x).equal(x)
    assert not torch_private.forward_mode_is_active()
    with forward_ad.dual_level():
        assert torch_private.forward_mode_is_active()
    assert not torch_private.has_dispatch_modes()
    with torch.device("meta"):  # a TorchFunctionMode
        assert torch_private.has_dispatch_modes()
    assert torch_private.computes_on_onednn(torch.bfloat16) in (True, False)
    assert torch_private.computes_on_onednn(torch.float16) in (True, False)
    assert not torch_private.is_batched(x)
    assert not torch_private.has_any_global_hook()
    y = x.clone().requires_grad_()
    with torch_private.below_autograd():
        assert not (y * 2).requires_grad
    seen: list[tuple[bool, int]] = []
    seconds: list[float] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, a: Tensor) -> Tensor:
            return a * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            seen.append((torch_private.is_batched(gradient), torch_private.old_vmap_level()))
            return gradient * 2

    torch.autograd.grad(Watch.apply(y), y, torch.ones(4, 2, 3), is_grads_batched=True)
    assert seen == [(True, 1)]
    with torch_private.timing_compilation(seconds.append):
        torch.compile(torch.neg, backend="eager")(x)
    torch.compile(torch.abs, backend="eager")(x)
    assert len(seconds) == 1
    assert seconds[0] > 0
    assert all(issubclass(error, Exception) for error in torch_private.compile_errors())
    storage = x.untyped_storage()
    before = torch_private.storage_use_count(storage)
    view = x[0]
    assert torch_private.storage_use_count(storage) == before + 1, view
