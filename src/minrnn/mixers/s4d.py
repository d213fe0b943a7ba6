"""S4D: a diagonal state space, trained as a convolution and stepped as a recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.arguments import read_choice, read_flag, read_number, read_size
from minrnn.mixers.graphs import may_vary, refuse_export
from minrnn.mixers.mixer import Mixer, PartForm, State
from minrnn.ops.devices import widest_float
from minrnn.ops.transforms import without_autocast


def _lin(d_state: int) -> Tensor:
    return math.pi * torch.arange(d_state // 2, dtype=torch.float64, device="cpu")


def _inv(d_state: int) -> Tensor:
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    return d_state / math.pi * (d_state / (2 * n + 1) - 1)


def _legs(d_state: int) -> Tensor:
    root = (2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1).sqrt()
    skew = torch.outer(root, root).triu(1) / 2
    eigenvalues = torch.linalg.eigvalsh(1j * (skew - skew.mT))  # +w and -w
    return eigenvalues[d_state // 2 :]


FREQUENCIES: dict[str, Callable[[int], Tensor]] = {
    # S4D-Lin: pi n: a Fourier basis.
    "lin": _lin,
    # S4D-Inv: N / pi (N / (2 n + 1) - 1): close to legs, in closed form.
    "inv": _inv,
    # S4D-LegS: the eigenvalues of HiPPO-LegS's normal part.
    "legs": _legs,
}
"""The initial Im A: d_state -> `(d_state / 2,)`; the initial Re A is -1/2 (section 4 of the paper)."""


class S4DMixer(Mixer):
    """A diagonal complex state space for each channel, followed by the paper's activation and mixing layer.

        h[t] = exp(dt A) h[t-1] + (exp(dt A) - 1) / A x[t]      (d_state / 2 complex numbers a channel)
        u[t] = 2 Re <C, h[t]> + D x[t]
        y[t] = GLU(W gelu(u[t]) + b)                            (d_model -> 2 d_hidden -> d_hidden)

    The states are the halves of conjugate pairs. A = -exp(log_decay) + i frequency and dt = exp(log_dt) are
    learned for each channel; they are discretized by the zero-order hold; B is 1, because only B * C matters.
    The state space has d_model channels with d_state numbers each; d_hidden is the width of the mixing layer
    only, with which the source's layer ends. The projection back to d_model is the block's.

    A call of one step computes the recurrence. A longer one computes a convolution, by FFT, with the impulse
    response, plus the response to the initial state; sequences that start at a reset are convolved
    separately. No tensor of size T * d_state is made for a channel: powers of exp(dt A) are products of two
    short tables, and sums over them are matrix products. The tables and each step are computed in float64
    on devices that have it, because the phase error of the t-th power is t times that of the first.
    As with every convolution by FFT, rounding errors, and values that are not finite, spread over the whole
    sequence.

    The state is h `(B, d_model, d_state / 2, 2)`: real and imaginary parts, float32 at least.

    Args:
        d_model: channels of the input and of the state space.
        d_hidden: channels of the output.
        d_state: N of the paper: real numbers in each channel's state; even.
        initialization: of A: "lin" (S4D-Lin), "inv" (S4D-Inv) or "legs" (S4D-LegS).
        dt_min, dt_max: the range of the initial step sizes dt, which are log-uniform.
        bias: whether the mixing has a bias.

    Raises:
        ValueError: d_state is not even and positive, the initialization is unknown, or not
            0 < dt_min <= dt_max.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv
    2206.11893), sections 3 and 4; activation and mixing as in the layer published with it.
    """

    state_names = ("h",)

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        d_state: int = 64,
        initialization: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, d_hidden)
        d_model, d_hidden = self.d_model, self.d_hidden  # Python's: numpy's may overflow
        self.d_state = d_state = read_size("S4DMixer", "d_state", d_state)
        if d_state % 2:
            raise ValueError(f"S4DMixer: d_state must be even, got {d_state}")
        initialization = read_choice("S4DMixer", "initialization", initialization, FREQUENCIES)
        dt_min, dt_max = read_number("S4DMixer", "dt_min", dt_min), read_number("S4DMixer", "dt_max", dt_max)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"S4DMixer: dt must have 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_decay = nn.Parameter(torch.full((d_model, d_state // 2), math.log(0.5)))
        frequency = FREQUENCIES[initialization](d_state).to(self.log_decay)
        self.frequency = nn.Parameter(frequency.repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = nn.Linear(d_model, 2 * d_hidden, bias=read_flag("S4DMixer", "bias", bias))

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        return (((self.d_model, self.d_state // 2, 2), torch.promote_types(dtype, torch.float32)),)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        if x.shape[0] == 0:  # torch has no FFT of an empty batch: add a row of zeros
            y, (h,) = self.mix(*_with_a_row(x, state, reset))
            return y[:0], (h[:0],)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):  # it would compute kernels in 16 bits
            h0 = None if state is None else state[0].to(dtype)
            u, h = self._run(x.to(dtype), h0, reset)
            u = (u + self.D.to(dtype) * x).to(x.dtype)
        return functional.glu(self.output(functional.gelu(u)), dim=-1), (h.to(dtype),)

    def _run(self, x: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the state space's outputs, without D x, and the state after the last step."""
        run = self._step if x.shape[1] == 1 else self._convolve
        return run(x, h0, reset)

    def _discretize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dt A, the discretized B, and C; each `(d_model, d_state / 2, 2)`, pairs of wide floats.

        B is (exp(dt A) - 1) / A, of which nothing cancels: cos w - 1 = -2 sin(w / 2)^2. The arithmetic is
        that of real numbers, because other runtimes, to which a step is exported, have no complex ones.
        """
        wide = widest_float(self.log_dt.device)
        decay, frequency = self.log_decay.to(wide).exp(), self.frequency.to(wide)
        dt = self.log_dt.to(wide).exp().unsqueeze(1)
        real, imag = -dt * decay, dt * frequency
        above_real = torch.expm1(real) * imag.cos() - 2 * (imag / 2).sin().square()
        above_imag = real.exp() * imag.sin()
        below = decay.square() + frequency.square()
        B_real = (frequency * above_imag - decay * above_real) / below
        B_imag = -(decay * above_imag + frequency * above_real) / below
        return torch.stack([real, imag], -1), torch.stack([B_real, B_imag], -1), self.C.to(wide)

    def _step(self, x: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Advance the state h0 `(B, d_model, d_state / 2, 2)` by the recurrence; x is `(B, 1, d_model)`."""
        rate, B_bar, C = self._discretize()
        h = B_bar * x[:, 0, :, None, None]
        if h0 is not None:
            size, angle = rate[..., 0].exp(), rate[..., 1]
            real, imag = size * angle.cos(), size * angle.sin()
            h0 = h0 if reset is None else h0.masked_fill(reset[..., None, None], 0)
            before, turned = h0[..., 0], h0[..., 1]
            h = h + torch.stack([real * before - imag * turned, real * turned + imag * before], -1)
        u = 2 * (C[..., 0] * h[..., 0] - C[..., 1] * h[..., 1]).sum(-1)
        return u.unsqueeze(1).to(x.dtype), h

    def _convolve(self, x: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute repeated steps over x `(B, T, d_model)` by convolution."""
        response = self._response(x.shape[1], x.dtype)
        x = x.permute(2, 0, 1).contiguous()  # (d_model, B, T): an FFT along an inner axis takes twice as long
        h0 = None if h0 is None else torch.view_as_complex(h0.contiguous()).transpose(0, 1)
        if reset is None:
            u, carried = convolve(x, response.to_impulse()), h0
        else:
            u = convolve_sequences(x, response.to_impulse(), reset)
            number = reset.cumsum(dim=1)  # (B, T): of each step's sequence; 0 is the one carried in
            x = x.masked_fill(number < number[:, -1:], 0)
            carried = None if h0 is None else h0.masked_fill(number[:, -1:] > 0, 0)
        if h0 is not None:
            free = response.to_state(h0)
            u = u + (free if reset is None else free.masked_fill(number > 0, 0))
        h = response.last_state(x, carried)
        return u.permute(1, 2, 0), torch.view_as_real(h.transpose(0, 1).contiguous())

    def _response(self, length: int, dtype: torch.dtype) -> _Response:
        return _Response(*map(torch.view_as_complex, self._discretize()), length=length, dtype=dtype)


def _with_a_row(
    x: Tensor, state: State | None, reset: Tensor | None
) -> tuple[Tensor, State | None, Tensor | None]:
    def extend(part: Tensor) -> Tensor:
        return torch.cat([part, part.new_zeros(1, *part.shape[1:])])

    return (
        extend(x),
        None if state is None else tuple(map(extend, state)),
        None if reset is None else extend(reset),
    )


class _Response:
    """The response of every channel's state space to an impulse, a state and an input, over `length` steps.

    The t-th power of exp(rate), t = q * chunk + r, is outer[q] * inner[r]. A chunk has at least as many steps
    as the state has numbers, so that a state for each chunk takes no more memory than the input.

    Args:
        rate, B_bar, C: see `S4DMixer._discretize`; complex.
        length: T.
        dtype: of inputs and results.
    """

    def __init__(self, rate: Tensor, B_bar: Tensor, C: Tensor, *, length: int, dtype: torch.dtype) -> None:
        self.rate, self.B_bar, self.C, self.length, self.dtype = rate, B_bar, C, length, dtype
        self.varies = may_vary(length)
        self.chunk = 2 * rate.shape[1]
        if self.varies:
            self.num_chunks = length // self.chunk + 2  # never 1, which would be a graph of its own
        else:
            while self.chunk * self.chunk < length:
                self.chunk *= 2
            self.chunk = min(length, self.chunk)
            self.num_chunks = -(-length // self.chunk)
        self.inner = _real(_powers(rate, self.chunk), dtype)  # (D, chunk, N)
        self.outer = _powers(rate * self.chunk, self.num_chunks)  # (D, num_chunks, N / 2)

    def to_impulse(self) -> Tensor:
        """The convolution's kernel, `(D, T)`: 2 Re <C, exp(rate t) B_bar>."""
        factor = 2 * (self.C * self.B_bar).unsqueeze(1) * self.outer
        return self._cut((_real(factor.conj(), self.dtype) @ self.inner.mT).flatten(1))

    def to_state(self, h0: Tensor) -> Tensor:
        """The output from a state h0 `(D, B, N / 2)` without input: 2 Re <C, exp(rate (t + 1)) h0>."""
        D, B, _ = h0.shape
        factor = (2 * self.C * self.rate.exp()).unsqueeze(1) * self.outer
        chunks = h0.unsqueeze(2) * factor.unsqueeze(1).to(h0.dtype)  # (D, B, num_chunks, N / 2)
        free = _real(chunks.conj(), self.dtype).flatten(1, 2) @ self.inner.mT
        return self._cut(free.reshape(D, B, self.num_chunks * self.chunk))

    def last_state(self, x: Tensor, h0: Tensor | None) -> Tensor:
        """The state after x `(D, B, T)`: sum_t exp(rate (T - 1 - t)) B_bar x[t] + exp(rate T) h0."""
        D, B, T = x.shape
        ends = self._chunks(x).flatten(1, 2) @ self.inner.flip(1)
        ends = torch.view_as_complex(ends.reshape(D, B, self.num_chunks, self.rate.shape[1], 2))
        weights = (self.outer.flip(1) * self.B_bar.unsqueeze(1)).to(ends.dtype)
        h = (ends * weights.unsqueeze(1)).sum(2)
        return h if h0 is None else h + (self.rate * T).exp().unsqueeze(1).to(h0.dtype) * h0

    # A compiler cannot relate the chunks' total to T; selecting by index needs no such relation.

    def _cut(self, x: Tensor) -> Tensor:
        """The first `length` steps of x, which has all chunks."""
        if self.varies:
            return x.index_select(-1, torch.arange(self.length, device=x.device))
        return x[..., : self.length]

    def _chunks(self, x: Tensor) -> Tensor:
        """x padded with zeros at the start, in chunks: `(D, B, num_chunks, chunk)`."""
        missing = self.num_chunks * self.chunk - self.length
        if self.varies:
            starts = self.chunk * torch.arange(self.num_chunks, device=x.device) - missing
            place = starts.unsqueeze(1) + torch.arange(self.chunk, device=x.device)
            return x[..., place.clamp(min=0)].masked_fill(place < 0, 0)
        return functional.pad(x, (missing, 0)).unflatten(-1, (self.num_chunks, self.chunk))


def _powers(rate: Tensor, count: int) -> Tensor:
    """exp(rate t) for t = 0 .. count - 1, `(D, count, N / 2)`."""
    t = torch.arange(count, dtype=rate.real.dtype, device=rate.device)
    return torch.exp(rate.unsqueeze(1) * t.unsqueeze(1))


def _real(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex numbers as pairs, `(..., n)` -> `(..., 2 n)`: Re <x*, y> is then the pairs' inner product."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2).to(dtype)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve causally: y[t] = sum_s kernel[t - s] x[s], s = 0 .. t.

    Args:
        x: `(D, B, T)`.
        kernel: `(D, T)`.

    Returns:
        y, `(D, B, T)`.
    """
    T = x.shape[-1]
    wanted = 2 * T - 1  # with less, the end would wrap around to the start
    unit = 1
    while not may_vary(T) and 8 * unit < wanted:
        unit *= 2
    length = -(-wanted // unit) * unit  # 5 to 8 times a power of two: an FFT of large prime factors is slow
    spectrum = torch.fft.rfft(x, length) * torch.fft.rfft(kernel, length).unsqueeze(1)
    return torch.fft.irfft(spectrum, length)[..., :T]


def convolve_sequences(x: Tensor, kernel: Tensor, reset: Tensor) -> Tensor:
    """Convolve each sequence of every row separately, as `convolve` would.

    Sequences are padded to the longest of those whose lengths round up to the same power of two, so that
    there are at most 1 + log2(T) convolutions, and less than twice the steps.

    Args:
        x: `(D, B, T)`.
        kernel: `(D, T)`.
        reset: `(B, T)`, bool: where a sequence starts.

    Returns:
        y, `(D, B, T)`.
    """
    refuse_export(
        "S4DMixer: reset must be None in an exported program: its values say how many sizes there are"
    )
    D, B, T = x.shape
    begins = torch.cat([torch.ones_like(reset[:, :1]), reset[:, 1:]], dim=1).flatten()
    starts = begins.nonzero().flatten()  # (sequences,), along rows laid end to end
    lengths = torch.diff(starts, append=starts.new_tensor([B * T]))
    magnitude = torch.frexp(
        (lengths - 1).to(widest_float(x.device))
    ).exponent  # of a length n, that of the power of two >= n
    steps, pieces = [], []
    for size in magnitude.unique():
        chosen = magnitude == size
        offset = torch.arange(int(lengths[chosen].max()), device=x.device)
        inside = offset < lengths[chosen, None]  # (sequences, longest)
        step = torch.where(inside, starts[chosen, None] + offset, 0)
        padded = x.flatten(1)[:, step].masked_fill(~inside, 0)
        pieces.append(convolve(padded, kernel[:, : len(offset)])[:, inside])
        steps.append(step[inside])
    y = torch.empty_like(x).flatten(1).index_copy(1, torch.cat(steps), torch.cat(pieces, dim=1))
    return y.reshape(D, B, T)
