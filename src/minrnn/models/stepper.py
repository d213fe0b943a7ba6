"""A model's single step in one call of the compiled engine."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.calls import callers, is_own, passed
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.mingru import MinGRU, MinGRUMixer
from minrnn.mixers.minlstm import MinLSTM, MinLSTMMixer
from minrnn.models.block import ACTIVATIONS, MLP, Block, BlockState
from minrnn.models.dropout import Dropout
from minrnn.ops import CANDIDATES, GATES
from minrnn.ops.chain import Affine, Branch, BranchState, Chain, Links, NoChainError, Norm, serves
from minrnn.ops.torch_private import has_any_global_hook

ModelState = tuple[BlockState, ...]
"""One state per block."""


class Stepper:
    """Computes a model's single steps, as long as its blocks are minGRU's or minLSTM's and nobody watches.

    The model is read once, and anew when a part of it is another one or lies elsewhere: what was read holds
    as long as reading it again would give the same. The numbers in its tensors may change. A copy has read
    nothing.
    """

    def __init__(self) -> None:
        self._last: tuple[Reading, Chain | None] | None = None

    def step(
        self, read: Callable[[Reading], Links], inputs: Sequence[Tensor], state: ModelState | None
    ) -> tuple[Tensor, ModelState] | None:
        """Compute a step, or leave it to torch.

        Args:
            read: finds what the model's chain is made of; its branches are those of its blocks.
            inputs: the chain's.
            state: the blocks'.

        Returns:
            The chain's y and the state after it; None where torch has to compute them.
        """
        if not serves(inputs[0]) or has_any_global_hook():
            return None
        if self._last is None or not _holds(*self._last):
            self._last = _read(read)
        if self._last is None:
            return None
        reading, chain = self._last
        states = reading.states(state)
        if chain is None or states is None or not chain.takes(inputs, states):
            return None
        stepped = chain.step(inputs, states)
        if stepped is None:
            return None
        y, after = stepped
        return y, tuple((() if window is None else (window,), (h,)) for window, h in after if h is not None)

    def __reduce__(self) -> tuple[type[Stepper], tuple[()]]:
        return Stepper, ()


def _read(read: Callable[[Reading], Links]) -> tuple[Reading, Chain | None] | None:
    """Read a model, and make its chain; None in place of what has to be tried again."""
    reading = Reading()
    try:
        return reading, Chain(read(reading))
    except OtherKindError:
        return reading, None
    except NoChainError:  # by what no reading sees: hooks, a dtype, a device
        return None


def _holds(reading: Reading, chain: Chain | None) -> bool:
    return reading.holds() and (chain is None or chain.holds())


class OtherKindError(Exception):
    """A part of a model is none that a chain has, or does more than its class says."""


class Reading:
    """What was found in a model, and whether it would be found again."""

    def __init__(self) -> None:
        self._found: tuple[list[Mapping[str, Any]], list[str], list[Any]] = ([], [], [])
        self._modules: tuple[list[nn.Module], list[type]] = ([], [])
        self._calls: tuple[list[type], list[Callable[[type], Any]], list[Any]] = ([], [], [])
        self._hooks: list[Mapping[int, Any]] = []
        self._blocks: list[tuple[int, bool]] = []  # windows of each block, and whether there is an MLP

    def holds(self) -> bool:
        """Whether all that was found is there as it was."""
        places, names, values = self._found
        modules, types = self._modules
        kinds, callers_of, calls = self._calls
        return (
            all(map(operator.is_, map(_get, places, names, repeat(_ABSENT)), values))
            and not any(self._hooks)
            and list(map(type, modules)) == types
            and list(map(operator.call, callers_of, kinds)) == calls
        )

    def states(self, state: ModelState | None) -> list[BranchState] | None:
        """Take a state apart into what each branch that was found carries; None if it cannot."""
        states = []
        for index, (num_windows, has_mlp) in enumerate(self._blocks):
            carried = _NOTHING
            if state is not None:
                windows, mixers = state[index]
                if type(mixers) is not tuple or len(mixers) != 1 or len(windows) != num_windows:
                    return None
                carried = BranchState(windows[0] if windows else None, *mixers)
            states += [carried, _NOTHING] if has_mlp else [carried]
        return states

    def blocks(self, model: nn.Module) -> list[Branch]:
        """Find the branches of the model's `blocks`."""
        blocks = self.module(model, "blocks", nn.ModuleList)
        branches: list[Branch] = []
        for index in range(len(blocks)):
            block = self.module(blocks, str(index), Block)
            self.no_dropout(block)
            along, within = self._along_time(block), self._within_step(block)
            branches += [along] if within is None else [along, within]
            self._blocks.append((along.conv is not None, within is not None))
        self.require(self._look(blocks._modules, str(len(blocks))) is _ABSENT)  # or there is one more
        return branches

    def norm(self, parent: nn.Module, name: str) -> Norm:
        """Find a norm."""
        norm = self.module(parent, name, nn.LayerNorm, nn.RMSNorm, nn.Identity)
        if type(norm) is nn.Identity:
            return Norm("none", 0.0, Affine())
        eps, shape = self.setting(norm, "eps"), self.setting(norm, "normalized_shape")
        self.require(len(shape) == 1)
        if type(norm) is nn.LayerNorm:
            return Norm("layer", eps, self.affine(norm), *shape)
        if eps is None:  # torch's default
            eps = torch.finfo(torch.float32).eps
        return Norm("rms", eps, Affine(self.tensor(norm, "weight")), *shape)

    def linear(self, parent: nn.Module, name: str) -> Affine:
        """Find a linear layer."""
        return self.affine(self.module(parent, name, nn.Linear))

    def affine(self, module: nn.Module, suffix: str = "") -> Affine:
        """Find a module's weight and bias."""
        return Affine(self.tensor(module, "weight" + suffix), self.tensor(module, "bias" + suffix))

    def tensor(self, module: nn.Module, name: str) -> Any:
        """Find a parameter, or what stands in its place: a buffer, or any attribute; it may be None."""
        return self._attribute(name, module._parameters, module._buffers, module.__dict__)

    def module(self, parent: nn.Module, name: str, *kinds: type) -> Any:
        """Find a part, of which a call has to be a call of its class's `forward` and of nothing else.

        Raises:
            OtherKindError: it is of none of these kinds.
            NoChainError: it has hooks.
        """
        module = self._attribute(name, parent._modules, parent.__dict__)
        if module is not None:
            self._look_at_calls(module)
        self.require(type(module) in kinds)
        if module is not None:
            kind: Any = type(module)
            self.require(is_own(kind))
            for passed_on in passed(kind)[1:]:  # a __call__ of its own has no effect
                self.require(self._look(module.__dict__, passed_on) is _ABSENT)
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            if any(self._hooks):
                raise NoChainError(f"{name} has hooks")
        return module

    def no_dropout(self, parent: nn.Module) -> None:
        """Go on only if the dropout of a model or block is in evaluation mode, in which it does nothing."""
        self.require(not self.setting(self.module(parent, "dropout", Dropout), "training"))

    def setting(self, module: nn.Module, name: str) -> Any:
        """Find an attribute of the module's own."""
        return self._attribute(name, module.__dict__)

    def require(self, condition: bool) -> None:
        """Go on only if something holds that does not change.

        Raises:
            OtherKindError: it does not.
        """
        if not condition:
            raise OtherKindError

    def _along_time(self, block: Block) -> Branch:
        norm, conv = self.norm(block, "mixer_norm"), self.module(block, "conv", CausalConv, type(None))
        mixer = self.module(block, "mixer", MinGRUMixer, MinLSTMMixer)
        rnn = self.module(mixer, "rnn", MinGRU, MinLSTM)
        self.require(self.setting(rnn, "num_layers") == 1 and not self.setting(rnn, "bidirectional"))
        gate, candidate = self.setting(rnn, "gate"), self.setting(rnn, "candidate")
        signed = self.setting(rnn, "signed")
        self.require(
            gate in GATES and candidate in CANDIDATES and signed in (False, GATES[gate].can_be_signed)
        )
        up, down = Affine(self.tensor(rnn, "weight_ih_l0")), self.linear(block, "down")
        if self.setting(rnn, "bias"):
            up = self.affine(rnn, "_ih_l0")
        self._check_size(up, 1, self.setting(mixer, "d_model"))
        self._check_size(down, 1, self.setting(mixer, "d_hidden"))
        return Branch(
            norm,
            None if conv is None else self._convolution(conv),
            up,
            gate,
            candidate,
            down,
            self.setting(block, "residual"),
            signed,
        )

    def _convolution(self, conv: CausalConv) -> Affine:
        found = self.affine(conv)
        self._check_size(found, 0, self.setting(conv, "width"))
        return found

    def _check_size(self, part: Affine, axis: int, size: int) -> None:
        """Go on only if a matrix has the size that a module says."""
        if part.weight is None or part.weight.dim() != 2 or part.weight.shape[axis] != size:
            raise NoChainError(f"a weight must have {size} numbers along axis {axis}")

    def _within_step(self, block: Block) -> Branch | None:
        mlp = self.module(block, "mlp", MLP, type(None))
        if mlp is None:
            return None
        activation, residual = self.setting(mlp, "activation"), self.setting(block, "residual")
        self.require(activation in ACTIVATIONS)
        up, down = self.linear(mlp, "up"), self.linear(mlp, "down")
        return Branch(self.norm(block, "mlp_norm"), None, up, activation, "positive", down, residual)

    def _look_at_calls(self, module: nn.Module) -> None:
        """Note what the module's class is, and what its calls are."""
        kind: Any = type(module)
        modules, types = self._modules
        modules.append(module)
        types.append(kind)
        kinds, callers_of, calls = self._calls
        if kind not in kinds:
            kinds.append(kind)
            callers_of.append(callers(kind))
            calls.append(callers(kind)(kind))

    def _attribute(self, name: str, *places: Mapping[str, Any]) -> Any:
        """Look a name up in one place after the other, as torch does."""
        for place in places:
            value = self._look(place, name)
            if value is not _ABSENT:
                return value
        raise OtherKindError

    def _look(self, place: Mapping[str, Any], name: str) -> Any:
        value = place.get(name, _ABSENT)
        places, names, values = self._found
        places.append(place)
        names.append(name)
        values.append(value)
        return value


_NOTHING = BranchState()
_ABSENT = object()
_get: Callable[[Mapping[str, Any], str, Any], Any] = dict.get  # type: ignore[assignment]
