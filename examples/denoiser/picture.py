"""Draw the spectrograms of sounds one above the other.

    python examples/denoiser/picture.py out/rain-noisy.wav out/rain-mingru-128.wav out/rain-clean.wav \
        --output denoiser.png
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw(paths: list[Path], output: Path) -> None:
    """Write the picture; a row is named after its file."""
    figure = Figure(figsize=(7, 1.7 * len(paths) + 0.4), layout="constrained")
    for axes, path in zip(figure.subplots(len(paths), sharex=True, squeeze=False)[:, 0], paths, strict=True):
        with wave.open(str(path), "rb") as file:
            sound, rate = np.frombuffer(file.readframes(file.getnframes()), np.int16), file.getframerate()
        with np.errstate(divide="ignore"):  # of silence
            axes.specgram(sound / 32768, NFFT=512, Fs=rate, noverlap=256, vmin=-110, vmax=-30)
        axes.set(title=path.stem, ylabel="Hz")
    axes.set_xlabel("seconds")
    figure.savefig(output, dpi=90)


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sounds", nargs="+", type=Path, help="WAV files of 16-bit samples, one channel")
    parser.add_argument("--output", type=Path, required=True, help="PNG, SVG or PDF")
    options = parser.parse_args()
    draw(options.sounds, options.output)


if __name__ == "__main__":
    main()
