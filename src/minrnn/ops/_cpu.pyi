"""The types of the compiled extension (csrc/*bind.cpp), whose submodules are described as classes.

Written by hand, so that they are there without a compiler; tests/test_install.py compares them with the
extension.
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

isa: str
threads_by: str  # the function that starts threads; empty: there is none

def prefer_huge_pages(address: int, nbytes: int, /) -> None: ...

class _Scan(ModuleType):
    gates: dict[str, tuple[int, bool]]  # the number of pre-activations, and whether there is a signed form
    candidates: tuple[str, ...]
    dtypes: tuple[str, ...]

    @staticmethod
    def forward(
        dtype: int,
        gate: int,
        candidate: int,
        signed: bool,
        reverse: bool,
        threads: int,
        shape: tuple[int, int, int],
        pre: Sequence[Tensor],
        start: tuple[Tensor | None, Tensor | None],
        h: Tensor,
        /,
    ) -> None: ...
    @staticmethod
    def backward(
        dtype: int,
        gate: int,
        candidate: int,
        signed: bool,
        reverse: bool,
        threads: int,
        shape: tuple[int, int, int],
        pre: Sequence[Tensor],
        start: tuple[Tensor | None, Tensor | None],
        dh: Tensor,
        h: Tensor,
        dpre: Sequence[Tensor],
        dh0: Tensor,
        /,
    ) -> None: ...
    @staticmethod
    def prefix(
        dtype: int,
        gate: int,
        candidate: int,
        signed: bool,
        reverse: bool,
        threads: int,
        shape: tuple[int, int, int],
        pre: Sequence[Tensor],
        start: tuple[Tensor | None, Tensor | None],
        end: Tensor,
        decay: Tensor,
        /,
    ) -> None: ...
    @staticmethod
    def backward_prefix(
        dtype: int,
        gate: int,
        candidate: int,
        signed: bool,
        reverse: bool,
        threads: int,
        shape: tuple[int, int, int],
        pre: Sequence[Tensor],
        start: tuple[Tensor | None, Tensor | None],
        dh: Tensor,
        end: Tensor,
        decay: Tensor,
        /,
    ) -> None: ...

_Optional = Tensor | None
_Sequences = tuple[Tensor, Tensor, _Optional, Tensor, Tensor, _Optional]  # u, delta_pre, z, B, C, reset
_Constants = tuple[Tensor, _Optional, _Optional, _Optional]  # A, D, delta_bias, h0

class _Selective(ModuleType):
    @staticmethod
    def num_groups(batch: int, channels: int, /) -> int: ...
    @staticmethod
    def forward(
        full: bool,
        threads: int,
        shape: tuple[int, int, int, int, int],
        sequences: _Sequences,
        constants: _Constants,
        outputs: tuple[Tensor, Tensor, _Optional],
        /,
    ) -> None: ...
    @staticmethod
    def backward(
        full: bool,
        threads: int,
        shape: tuple[int, int, int, int, int],
        sequences: _Sequences,
        constants: _Constants,
        saved: tuple[Tensor, Tensor, Tensor],
        dsequences: tuple[Tensor, Tensor, _Optional],
        dsums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        /,
    ) -> None: ...

_Weights = tuple[_Optional, _Optional]  # weight and bias
_Norm = tuple[int, float, _Weights]  # kind, eps, scale
_Mode = tuple[int, int, bool]  # gate, candidate, signed; a negative gate: an activation
_State = tuple[_Optional, _Optional, _Optional, _Optional]  # window and h, each before and after the step

class _FusedStep:
    def __init__(self, d_model: int, /) -> None: ...
    def embed(self, count: int, weight: Tensor, /) -> None: ...
    def project(self, parts: Sequence[tuple[int, _Weights]], norm: _Norm, /) -> None: ...
    def add_branch(
        self,
        norm: _Norm,
        conv_width: int,
        conv: _Weights,
        wide: int,
        D: int,
        up: _Weights,
        down: _Weights,
        mode: _Mode,
        num_pre: int,
        activation: int,
        residual: bool,
        /,
    ) -> None: ...
    def output(self, norm: _Norm, out: int, part: _Weights, /) -> None: ...
    def run(
        self,
        num_rows: int,
        threads: int,
        tokens: Sequence[int],
        numbers: Sequence[Tensor],
        states: Sequence[_State],
        pool_rows: int,
        rows: Sequence[int],
        y: Tensor,
        /,
    ) -> bool: ...

class _Decode(ModuleType):
    FusedStep: type[_FusedStep]

scan: _Scan
selective: _Selective
decode: _Decode
