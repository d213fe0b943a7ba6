"""Train a streaming denoiser of speech, with torch.nn.GRU and with MinGRU, and compare them.

    python examples/denoiser/denoise.py                    # the table of docs/examples/denoiser.md
    python examples/denoiser/denoise.py --models mingru:128 --seeds 0 --listen out
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import sounds
import torch
import tyro
from torch import Tensor, nn

from minrnn import MinGRU, MinLSTM

SIZE, HOP = 512, 256  # samples of a frame, and from one frame to the next: 23 and 12 ms
RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "mingru": MinGRU, "minlstm": MinLSTM}


class Denoiser(nn.Module):
    """A mask for every frame's spectrum, from this frame and those before it."""

    window: Tensor

    def __init__(self, kind: str, width: int, layers: int = 2) -> None:
        super().__init__()
        bins = SIZE // 2 + 1
        self.into = nn.Linear(bins, width)
        self.rnn = RNNS[kind](width, width, num_layers=layers, batch_first=True)
        self.out = nn.Linear(width, bins)
        # Applied before and after, and squares of half-overlapping windows sum to 1.
        self.register_buffer("window", torch.hann_window(SIZE).sqrt(), persistent=False)

    def forward(self, frames: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Clean frames `(B, T, SIZE)`; the state continues a sound."""
        spectra = torch.fft.rfft(frames * self.window)
        y, state = self.rnn(self.into(spectra.abs() ** 0.3), state)
        masks = self.out(y).sigmoid()
        return torch.fft.irfft(masks * spectra) * self.window, state

    def denoise(self, noisy: Tensor) -> Tensor:
        """Clean whole sounds `(B, samples)`, all frames in parallel."""
        samples = noisy.shape[-1]
        padded = nn.functional.pad(noisy, (HOP, HOP + -samples % HOP))
        frames, _ = self(padded.unfold(-1, SIZE, HOP))
        halves = nn.functional.pad(frames[..., :HOP], (0, 0, 0, 1)) + nn.functional.pad(
            frames[..., HOP:], (0, 0, 1, 0)
        )
        return halves.flatten(1)[:, HOP : HOP + samples]


class Stream:
    """A denoiser that takes HOP samples at a time and returns HOP samples, one hop later."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model.eval()
        self.before = torch.zeros(HOP)  # the samples of the last call
        self.tail = torch.zeros(HOP)  # the second half of the last frame
        self.state: Any = None

    @torch.inference_mode()
    def step(self, samples: Tensor) -> Tensor:
        """Take the next HOP samples; return the clean samples of the call before."""
        frame = torch.cat([self.before, samples])
        clean, self.state = self.model(frame.view(1, 1, SIZE), self.state)
        output = self.tail + clean[0, 0, :HOP]
        self.before, self.tail = samples, clean[0, 0, HOP:]
        return output


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio in dB, `(B,)` (Le Roux et al., arXiv 1811.02508)."""
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-8)
    signal, error = (scale * target).square().sum(-1), (scale * target - estimate).square().sum(-1)
    return 10 * torch.log10((signal + 1e-8) / (error + 1e-8))


def train(model: Denoiser, batches: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float) -> float:
    """Train on `steps` batches of noisy and clean sounds; return the seconds of the updates alone."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    seconds = 0.0
    for _ in range(steps):
        noisy, clean = next(batches)
        start = time.perf_counter()
        loss = -si_sdr(model.denoise(noisy), clean).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
    return seconds


@torch.inference_mode()
def improvement(model: Denoiser, noisy: Tensor, clean: Tensor) -> float:
    """Return by how many dB the model raises the ratio, on average."""
    return float((si_sdr(model.eval().denoise(noisy), clean) - si_sdr(noisy, clean)).mean())


def latency(model: Denoiser, frames: int = 500) -> float:
    """Return the median milliseconds of a step on one thread."""
    threads, stream, times = torch.get_num_threads(), Stream(model), []
    torch.set_num_threads(1)
    for samples in torch.randn(frames, HOP):
        start = time.perf_counter()
        stream.step(samples)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1000 * median(times)
