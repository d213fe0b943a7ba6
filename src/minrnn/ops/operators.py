"""Base classes of the package's operators.

`Operator` makes a pair of registered operators, forward and backward, from one declaration: schemas, engines,
shapes and derivatives. They support autograd of any order, forward mode, torch.func's transforms, the older
vmap of torch.autograd, torch.compile and torch.export. `Composite` is a composition of torch's operations
with a faster path for eager tensors.

Eager calls of an operator use an autograd.Function, whose overhead is a quarter of a registered operator's.
Traced and transformed calls use the registered operator, which compilers and transforms can see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from minrnn.ops.batching import fold_batch, for_any_size, for_old_vmap, one_by_one, unfold_batch
from minrnn.ops.registry import Functions, implementations, register
from minrnn.ops.torch_private import (
    SingleLevelFunction,
    below_autograd,
    enable_single_level_autograd_function,
    is_batched,
    set_forward_mode,
)
from minrnn.ops.transforms import (
    have_tangents,
    is_plain,
    is_traced,
    is_transformed,
    join,
    separate,
)

__all__ = ["Composite", "Operator", "needs_gradients"]

_LIBRARY = torch.library.Library("minrnn", "FRAGMENT")

Tensors = Sequence[Any]
"""Tensors, None for absent ones."""


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # any() takes five times as long, a noticeable part of a single step
            if x is not None and x.requires_grad:
                return True
    return False


class Operator(ABC):
    """The operators `minrnn::<name>` and `minrnn::<name>_backward`, declared by a subclass.

    A call, `operator(tensors, mode)`, is differentiable. `tensors` is the sequence of all input tensors, the
    last of which has no gradient; `mode` holds the other arguments. If there are several outputs, the last
    one is saved for backward and has no gradient. Arguments are not checked.
    """

    name: ClassVar[str]
    schema: ClassVar[str]
    """The schema of forward, without the name."""
    backward_schema: ClassVar[str]
    """The schema of backward, which returns the gradients of all tensors but the last, empty for absent
    ones."""
    modules: ClassVar[Mapping[str, str]]
    """The modules that implement it, by engine name in ENGINES."""
    shared: ClassVar[frozenset[int]] = frozenset()
    """The indices of tensors without a batch axis: backward sums their gradients over the batch."""

    def __init__(self) -> None:
        found = implementations(self.modules, self._engine_functions)
        for operator, schema in ((self.name, self.schema), (f"{self.name}_backward", self.backward_schema)):
            _LIBRARY.define(f"{operator}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        register(_LIBRARY, self.name, found)
        self.forward_op = getattr(torch.ops.minrnn, self.name).default
        self.backward_op = getattr(torch.ops.minrnn, f"{self.name}_backward").default
        self._recorded = _recorded(self)
        self._recorded_at_level = _at_level(self._recorded)
        self._register(self.name, self.fake, self._differentiable, self._batched)
        self._register(
            f"{self.name}_backward", self.fake_backward, self._twice_differentiable, self._batched_backward
        )

    # -- Declared by subclasses

    @abstractmethod
    def pack(self, tensors: Tensors, mode: Any, record: bool) -> tuple[Any, ...]:
        """Return the arguments of forward; `record` tells whether backward will be called."""

    @abstractmethod
    def unpack(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
        """Return (tensors, mode) from the arguments of forward: the inverse of `pack`."""

    @abstractmethod
    def pack_backward(self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Any) -> tuple[Any, ...]:
        """Return the arguments of backward: the outputs' gradients, forward's last output, its arguments."""

    @abstractmethod
    def unpack_backward(self, arguments: Sequence[Any]) -> tuple[Tensors, Any, tuple[Any, ...], Any]:
        """Return (gradients, kept, tensors, mode): the inverse of `pack_backward`."""

    @abstractmethod
    def fake(self, *arguments: Any) -> Any:
        """Return uninitialized outputs of forward."""

    @abstractmethod
    def fake_backward(self, *arguments: Any) -> list[Tensor]:
        """Return uninitialized outputs of backward."""

    @abstractmethod
    def differentiable_gradients(
        self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Any
    ) -> list[Tensor]:
        """Compute the outputs of backward by differentiable operations."""

    @abstractmethod
    def tangents(self, tangents: Tensors, kept: Tensor, tensors: Tensors, mode: Any) -> tuple[Tensor, ...]:
        """Compute the tangents of the differentiable outputs; an input tangent of None is zero."""

    def engine_functions(self, module: ModuleType) -> Functions:
        """Return an engine's implementations of forward and backward."""
        return module.forward, module.backward

    def trim(self, outputs: Any, mode: Any) -> Any:
        """Convert the outputs of a call with `record` to those of a call without."""
        return outputs

    # -- Calls

    def __call__(self, tensors: Tensors, mode: Any) -> Any:
        """Compute the outputs, differentiably."""
        if is_traced() or is_transformed():
            return self.forward_op(*self.pack(tensors, mode, False))
        if needs_gradients(*tensors):
            return self._recorded.apply(mode, *tensors)
        return self.compute(self.pack(tensors, mode, False))

    def compute(self, arguments: tuple[Any, ...]) -> Any:
        """Call forward without autograd, whose check for gradients takes a quarter of a step's time."""
        with below_autograd():
            return self.forward_op(*arguments)

    def differentiate(self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Any) -> list[Tensor]:
        """Call backward without autograd."""
        with below_autograd():
            return self.backward_op(*self.pack_backward(gradients, kept, tensors, mode))

    def gradients(self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Any) -> list[Tensor | None]:
        """Compute the gradients of all tensors, None for absent ones and for the last.

        The engine's fused pass computes them, unless they will be differentiated themselves.
        """
        if torch.is_grad_enabled() or is_transformed():  # create_graph=True; a transform; forward mode
            found = self.backward_op(*self.pack_backward(gradients, kept, tensors, mode))
        else:
            found = self.differentiate(gradients, kept, tensors, mode)
        of_inputs: list[Tensor | None] = []
        for x, d in zip(tensors, found, strict=False):  # Tensor.to costs time even where it does nothing
            of_inputs.append(None if x is None else d if d.dtype is x.dtype else d.to(x.dtype))
        return [*of_inputs, None]

    # -- Implementations of the registered operators

    def _register(
        self,
        operator: str,
        fake: Callable[..., Any],
        differentiable: Callable[..., Any],
        batched: Callable[..., tuple[Any, Any]],
    ) -> None:
        torch.library.register_fake(f"minrnn::{operator}", fake, lib=_LIBRARY)
        _LIBRARY.impl(operator, differentiable, "Autograd")
        torch.library.register_vmap(f"minrnn::{operator}", for_any_size(batched), lib=_LIBRARY)
        _LIBRARY.impl(operator, for_old_vmap(batched), "Batched")

    def _engine_functions(self, module: ModuleType) -> Functions:
        """Return the engine's functions, made to skip the engine for an empty batch."""
        compute, differentiate = self.engine_functions(module)

        def forward(*arguments: Any) -> Any:
            first = arguments[0]
            rows = (first[0] if isinstance(first, list) else first).shape[0]
            return compute(*arguments) if rows else self.fake(*arguments)

        def backward(gradient: Tensor, *arguments: Any) -> list[Tensor]:
            if gradient.shape[0]:
                return differentiate(gradient, *arguments)
            return [d.zero_() for d in self.fake_backward(gradient, *arguments)]

        return forward, backward

    def _differentiable(self, *arguments: Any) -> Any:
        """Forward, for the dispatch key Autograd.

        Nested transforms call it at each level with that level's tensors, so that no tangent is lost;
        torch.autograd.Function.jvp would keep the innermost level's only.
        """
        tensors, mode = self.unpack(arguments)
        if needs_gradients(*tensors):
            return self.trim(self._recorded_at_level.apply(mode, *tensors), mode)
        if have_tangents(*tensors):
            primals, tangents = separate(tensors[:-1])
            primals.append(tensors[-1])
            outputs = self.forward_op(*self.pack(primals, mode, False))
            if isinstance(outputs, Tensor):
                return join(outputs, *self.tangents(tangents, outputs, primals, mode))
            found = self.tangents(tangents, outputs[-1], primals, mode)
            return *(join(*pair) for pair in zip(outputs, found, strict=False)), outputs[-1]
        return self.compute(arguments)

    def _twice_differentiable(self, *arguments: Any) -> list[Tensor]:
        """Backward, for the dispatch key Autograd."""
        gradients, kept, tensors, mode = self.unpack_backward(arguments)
        if needs_gradients(*gradients, kept, *tensors) or have_tangents(*gradients, kept, *tensors):
            return self.differentiable_gradients(gradients, kept, tensors, mode)
        with below_autograd():
            return self.backward_op(*arguments)

    def _batched(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Forward, for torch.func.vmap: the mapped dimension is merged with the batch."""
        tensors, mode = self.unpack(arguments)
        dims, _ = self.unpack(in_dims)
        if any(dims[index] is not None for index in self.shared):
            return one_by_one(self.forward_op, info, in_dims, arguments)
        folded = fold_batch(info, tensors, dims, self.shared)
        return unfold_batch(info, self.forward_op(*self.pack(folded, mode, False)))

    def _batched_backward(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Backward, for torch.func.vmap: many gradients at once."""
        if self.shared:  # the sums over the batch must not run over the mapped dimension
            return one_by_one(self.backward_op, info, in_dims, arguments)
        gradients, kept, tensors, mode = self.unpack_backward(arguments)
        gradient_dims, kept_dim, dims, _ = self.unpack_backward(in_dims)
        count = len(gradients)
        *found, kept = fold_batch(info, (*gradients, *tensors, kept), (*gradient_dims, *dims, kept_dim))
        folded = self.pack_backward(found[:count], kept, found[count:], mode)
        return unfold_batch(info, self.backward_op(*folded))


def _recorded(operator: Operator) -> type[Any]:
    """Make the autograd.Function of an operator: apply(mode, *tensors) -> outputs."""

    class Recorded(SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, mode: Any, *tensors: Any) -> Any:
            outputs = operator.compute(operator.pack(tensors, mode, True))
            kept = outputs
            if not isinstance(outputs, Tensor):
                kept = outputs[-1]
                ctx.mark_non_differentiable(kept)
            ctx.mode = mode
            ctx.save_for_backward(kept, *tensors)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            kept, *tensors = ctx.saved_tensors
            return None, *operator.gradients(gradients, kept, tensors, ctx.mode)

        @staticmethod
        def jvp(ctx: Any, _mode: None, *tangents: Any) -> Any:
            kept, *tensors = ctx.saved_tensors
            found = operator.tangents(tangents, kept, tensors, ctx.mode)
            return found[0] if len(found) == 1 else (*found, None)

    return Recorded


def _at_level(function: type[Any]) -> Any:
    """Extend an autograd.Function for an operator's Autograd kernel, at any level of nested transforms.

    A Function's forward disables recording at all levels; this one enables it for the levels below, which run
    inside it. Its jvp is for tensors with gradients and tangents at the same level, as in
    torch.autograd.forward_ad, so that the tensors saved for backward have tangents too. In other cases it
    would lose the levels below.
    """

    class AtLevel(function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch.enable_grad(), set_forward_mode(True):
                outputs = function.forward(ctx, *arguments)
            ctx.save_for_forward(*ctx.to_save)
            return outputs

        @classmethod
        def apply(cls, *arguments: Any) -> Any:
            with enable_single_level_autograd_function():
                return super().apply(*arguments)

    return AtLevel


# ----------------------------------------------------------------------------------------------------------
# Compositions with a faster eager path


class Composite(ABC):
    """A composition of torch's operations with a faster path for eager, plain tensors (see `is_plain`).

    The caller decides: it calls `composite(settings, *tensors)` for these, and `compose` otherwise.
    """

    def __init__(self) -> None:
        self._recorded = _recorded_composite(self)

    @abstractmethod
    def compose(self, settings: Any, *tensors: Any) -> Tensor:
        """Compute the output by torch's operations; this defines the result."""

    @abstractmethod
    def compute(self, settings: Any, tensors: Sequence[Any], *, record: bool) -> tuple[Tensor, list[Tensor]]:
        """Compute the output by the faster path, and, with `record`, the tensors that `gradients` needs."""

    @abstractmethod
    def gradients(
        self,
        settings: Any,
        needs: Sequence[bool],
        gradient: Tensor,
        tensors: Sequence[Any],
        kept: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Compute the gradients of the tensors that need one, None for the others."""

    def __call__(self, settings: Any, *tensors: Tensor | None) -> Tensor:
        """Compute the output, differentiably."""
        if needs_gradients(*tensors):
            return self._recorded.apply(settings, *tensors)
        return self.compute(settings, tensors, record=False)[0]


def _recorded_composite(composite: Composite) -> type[Any]:
    """Make the autograd.Function of a composite: apply(settings, *tensors) -> output."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, settings: Any, *tensors: Any) -> Tensor:
            output, kept = composite.compute(settings, tensors, record=True)
            ctx.settings, ctx.count = settings, len(tensors)
            ctx.save_for_backward(*tensors, *kept)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # torch.utils.checkpoint allows one access
            tensors, kept = saved[: ctx.count], saved[ctx.count :]
            needs = ctx.needs_input_grad[1:]
            # With create_graph=True, and for batched gradients, nothing may be written in place.
            if torch.is_grad_enabled() or not is_plain(gradient) or is_batched(gradient):
                return None, *_differentiate(composite, ctx.settings, needs, gradient, tensors)
            return None, *composite.gradients(ctx.settings, needs, gradient, tensors, kept)

    return Recorded


def _differentiate(
    composite: Composite, settings: Any, needs: Sequence[bool], gradient: Tensor, tensors: Sequence[Any]
) -> list[Tensor | None]:
    """Recompute the composition and differentiate it by torch's autograd."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that no gradient flows from one argument to another that it was computed from.
        aliases = [x if x is None else x.view_as(x) for x in tensors]
        output = composite.compose(settings, *aliases)
        wanted: list[Any] = [x for x, needed in zip(aliases, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]
