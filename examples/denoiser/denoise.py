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
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import sounds
import torch
import tyro
from torch import Tensor, nn

from minrnn import MinGRU, MinLSTM

SIZE, HOP = 512, 256  # samples of a frame, and from one frame to the next: 23 and 12 ms
RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "mingru": MinGRU, "minlstm": MinLSTM}
RATE = 6e-3  # of 3e-3, 6e-3 and 12e-3 the best for nn.GRU and for MinGRU on other mixtures of the training's


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
    """Return the scale-invariant signal-to-distortion ratio in dB, `(B,)`.

    Source: Le Roux et al., "SDR - half-baked or well done?" (arXiv 1811.02508).
    """
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-8)
    signal, error = (scale * target).square().sum(-1), (scale * target - estimate).square().sum(-1)
    return 10 * torch.log10((signal + 1e-8) / (error + 1e-8))


def train(model: Denoiser, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> float:
    """Train on `steps` batches of noisy and clean sounds; return the CPU seconds of the updates alone."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    seconds = 0.0
    for _ in range(steps):
        noisy, clean = next(batches)
        start = time.process_time()
        loss = -si_sdr(model.denoise(noisy), clean).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
    return seconds


@torch.inference_mode()
def improvement(model: Denoiser, noisy: Tensor, clean: Tensor) -> float:
    """Return by how many dB the model raises the ratio, on average."""
    return float((si_sdr(model.eval().denoise(noisy), clean) - si_sdr(noisy, clean)).mean())


def latencies(models: dict[str, Denoiser], frames: int = 500) -> dict[str, float]:
    """Return the median milliseconds of each model's step on one thread, with the models in turns."""
    threads, streams = torch.get_num_threads(), {name: Stream(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    torch.set_num_threads(1)
    for samples in torch.randn(frames, HOP):
        for name, stream in streams.items():
            start = time.perf_counter()
            stream.step(samples)
            times[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {name: 1000 * median(found) for name, found in times.items()}


class Data:
    """Training mixtures, drawn anew for every batch, and fixed test mixtures by kind of noise."""

    def __init__(self, seconds: float, tests: int) -> None:
        rng = np.random.default_rng(0)
        self.samples = int(seconds * sounds.RATE)
        self.voices = sounds.speech(sounds.TRAIN_VOICES, sounds.SENTENCES)
        self.noises = sounds.several(sounds.TRAIN_NOISES, self.voices, rng)
        voices = sounds.speech(sounds.TEST_VOICES, sounds.TEST_SENTENCES)
        noises = {"seen kinds": sounds.several(sounds.TRAIN_NOISES, voices, rng)}
        noises |= {noise.__name__: sounds.recordings(noise, rng) for noise in sounds.TEST_NOISES}
        self.tests = {
            name: as_tensors(sounds.mixtures(tests, voices, some, 3 * sounds.RATE, rng))
            for name, some in noises.items()
        }

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noisy and clean sounds, `(size, samples)`, without end."""
        rng = np.random.default_rng([1, seed])
        while True:
            yield as_tensors(sounds.mixtures(size, self.voices, self.noises, self.samples, rng))


def as_tensors(pair: tuple[sounds.Sound, sounds.Sound]) -> tuple[Tensor, Tensor]:
    """Convert noisy and clean sounds."""
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def listen(folder: Path, model: Denoiser, name: str, tests: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write the first sound of every test: noisy, clean, and as the model streams it."""
    folder.mkdir(parents=True, exist_ok=True)
    for noise, (noisy, clean) in tests.items():
        stream, hops = Stream(model), nn.functional.pad(noisy[0], (0, HOP + -noisy.shape[1] % HOP)).split(HOP)
        denoised = torch.cat([stream.step(samples) for samples in hops])[HOP:]
        for kind, sound in (("noisy", noisy[0]), ("clean", clean[0]), (name, denoised)):
            sounds.write_wav(
                folder / f"{noise.replace(' ', '-')}-{kind.replace(':', '-')}.wav", sound.numpy()
            )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: means and deviations over the seeds, a row for each model."""
    tests = list(records[0]["improvement"])
    lines = [
        f"| model | parameters | {' | '.join(tests)} | ms a frame | CPU seconds |",
        "|" + "---|" * (len(tests) + 4),
    ]
    for model in dict.fromkeys(record["model"] for record in records):
        rows = [record for record in records if record["model"] == model]
        gains = [spread([row["improvement"][test] for row in rows]) for test in tests]
        step, seconds = (mean(row[key] for row in rows) for key in ("milliseconds", "seconds"))
        lines.append(
            f"| {model} | {rows[0]['parameters']:,} | {' | '.join(gains)} | {step:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def spread(numbers: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    return f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def main(
    models: tuple[str, ...] = ("gru:128", "mingru:128", "mingru:201"),
    seeds: tuple[int, ...] = (0,),
    steps: int = 250,
    batch: int = 16,
    seconds: float = 2.0,
    tests: int = 48,
    output: Path | None = None,
    listening: Path | None = None,
) -> None:
    """Train denoisers and print their improvement of the signal-to-distortion ratio (SI-SDR) in dB.

    Args:
        models: kinds (gru, lstm, mingru, minlstm) and widths.
        seeds: of the weights and of the order of the data.
        steps: training steps of each model.
        batch: sounds of a step.
        seconds: length of each.
        tests: sounds of each test.
        output: a JSON file for the results.
        listening: a folder for sounds before and after.
    """
    data = Data(seconds, tests)
    records: list[dict[str, Any]] = []
    for seed in seeds:
        trained: dict[str, Denoiser] = {}
        for name in models:
            torch.manual_seed(seed)
            kind, _, width = name.partition(":")
            model = trained[name] = Denoiser(kind, int(width))
            took = train(model, data.batches(batch, seed), steps)
            record = {"model": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
            record |= {"improvement": {test: improvement(model, *pair) for test, pair in data.tests.items()}}
            records.append({**record, "seconds": took})
            print(json.dumps(records[-1]), flush=True)
            if listening is not None:
                listen(listening, model, name, data.tests)
        for name, milliseconds in latencies(trained).items():
            (record,) = [r for r in records if (r["model"], r["seed"]) == (name, seed)]
            record["milliseconds"] = milliseconds
    print(table(records))
    if output is not None:
        machine = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        }
        output.write_text(
            json.dumps({"steps": steps, "machine": machine, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    tyro.cli(main)
