"""A model's single step in one call of the compiled engine."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from minrnn.mixers.calls import calling, is_own
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.mingru import MinGRU, MinGRUMixer
from minrnn.mixers.minlstm import MinLSTM, MinLSTMMixer
from minrnn.models.block import MLP, Block, BlockState
from minrnn.models.dropout import Dropout
from minrnn.ops.chain import Affine, Branch, BranchState, Chain, Links, NoChainError, Norm, serves

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
        if not serves(inputs[0]) or _has_any_global_hook():
            return None
        if self._last is None or not _holds(*self._last):
            self._last = _read(read)
        if self._last is None:
            return None
        reading, chain = self._last
        states = reading.states(state)
        if chain is None or states is None or not chain.takes(inputs, states):
            return None
        y, after = chain.step(inputs, states)
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
        self._calls: tuple[list[type], list[tuple[Any, Any]]] = ([], [])
        self._hooks: list[Mapping[int, Any]] = []
        self._has_mlp: list[bool] = []

    def holds(self) -> bool:
        """Whether all that was found is there as it was."""
        places, names, values = self._found
        modules, types = self._modules
        kinds, calls = self._calls
        return (
            all(map(operator.is_, map(_get, places, names), values))
            and not any(self._hooks)
            and list(map(type, modules)) == types
            and list(map(calling, kinds)) == calls
        )

    def states(self, state: ModelState | None) -> list[BranchState] | None:
        """Take a state apart into what each branch that was found carries; None if it cannot."""
        states = []
        for index, has_mlp in enumerate(self._has_mlp):
            carried = _NOTHING
            if state is not None:
                windows, mixers = state[index]
                if type(mixers) is not tuple or len(mixers) != 1:
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
            branches.append(self._along_time(block))
            mlp = self._within_step(block)
            branches += [] if mlp is None else [mlp]
            self._has_mlp.append(mlp is not None)
        self.require(self._look(blocks._modules, str(len(blocks))) is None)  # or there is one more
        return branches

    def norm(self, parent: nn.Module, name: str) -> Norm:
        """Find a norm."""
        norm = self.module(parent, name, *_NORMS)
        eps = self.setting(norm, "eps")
        if eps is None:  # what torch takes for an RMSNorm; an Identity has none
            eps = torch.finfo(torch.float32).eps
        return Norm(_NORMS[type(norm)], eps, self.affine(norm))

    def linear(self, parent: nn.Module, name: str) -> Affine:
        """Find a linear layer."""
        return self.affine(self.module(parent, name, nn.Linear))

    def affine(self, module: nn.Module, suffix: str = "") -> Affine:
        """Find a module's weight and bias."""
        parameters = module._parameters
        return Affine(self._look(parameters, "weight" + suffix), self._look(parameters, "bias" + suffix))

    def module(self, parent: nn.Module, name: str, *kinds: type) -> Any:
        """Find a part, of which a call has to be a call of its class's `forward` and of nothing else.

        Raises:
            OtherKindError: it is of none of these kinds.
            NoChainError: it has hooks.
        """
        module = self._look(parent._modules, name)
        if module is not None:
            self._look_at_calls(module)
        self.require(type(module) in kinds)
        if module is not None:
            self.require(is_own(type(module)))
            self.require(self.setting(module, "forward") is None)
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            if any(self._hooks):
                raise NoChainError(f"{name} has hooks")
        return module

    def no_dropout(self, parent: nn.Module) -> None:
        """Go on only if the dropout of a model or block is in evaluation mode, in which it does nothing."""
        self.require(not self.setting(self.module(parent, "dropout", Dropout), "training"))

    def setting(self, module: nn.Module, name: str) -> Any:
        """Find an attribute of the module's own; None where there is none."""
        return self._look(module.__dict__, name)

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
        return Branch(
            norm,
            None if conv is None else self.affine(conv),
            self.affine(rnn, "_ih_l0"),
            self.setting(rnn, "gate"),
            self.setting(rnn, "candidate"),
            self.linear(block, "down"),
            self.setting(block, "residual"),
        )

    def _within_step(self, block: Block) -> Branch | None:
        mlp = self.module(block, "mlp", MLP, type(None))
        if mlp is None:
            return None
        activation, residual = self.setting(mlp, "activation"), self.setting(block, "residual")
        up, down = self.linear(mlp, "up"), self.linear(mlp, "down")
        return Branch(self.norm(block, "mlp_norm"), None, up, activation, "positive", down, residual)

    def _look_at_calls(self, module: nn.Module) -> None:
        """Note what the module's class is, and what its calls are."""
        modules, types = self._modules
        modules.append(module)
        types.append(type(module))
        kinds, calls = self._calls
        if type(module) not in kinds:
            kinds.append(type(module))
            calls.append(calling(type(module)))

    def _look(self, place: Mapping[str, Any], name: str) -> Any:
        value = place.get(name)
        places, names, values = self._found
        places.append(place)
        names.append(name)
        values.append(value)
        return value


_NORMS: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms", nn.Identity: "none"}
_NOTHING = BranchState()
_get: Callable[[Mapping[str, Any], str], Any] = dict.get  # type: ignore[assignment]
