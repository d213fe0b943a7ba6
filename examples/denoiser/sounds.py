"""Sounds to train a denoiser on: speech of espeak-ng in many voices, and noises made with numpy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

RATE = 22050  # samples a second, as espeak-ng writes them

RECORDING, RECORDINGS = 10 * RATE, 6  # samples of a noise, and how many there are of each kind

Sound = NDArray[np.float32]

# A voice is a language, a variant of the speaker, words a minute, and a pitch from 0 to 99.
TRAIN_VOICES = [
    ("en-us", "m1", 160, 45), ("en-us", "f2", 175, 60), ("en-us", "m7", 190, 30),
    ("en-us", "klatt2", 165, 50), ("en-gb", "f4", 150, 55), ("en-gb", "m3", 180, 40),
    ("en-gb", "f1", 200, 65), ("en-gb", "croak", 170, 35), ("de", "m2", 160, 45),
    ("de", "f3", 185, 60), ("de", "Andy", 170, 50), ("de", "linda", 150, 55),
    ("fr", "m4", 170, 40), ("fr", "f2", 160, 65), ("fr", "robert", 190, 50),
    ("fr", "anika", 175, 50), ("es", "m5", 175, 45), ("es", "f5", 165, 60),
    ("es", "pedro", 190, 50), ("es", "belinda", 155, 55),
]  # fmt: skip
TEST_VOICES = [
    ("en-us", "Diogo", 170, 55), ("en-gb", "Annie", 165, 45), ("en-us", "Alicia", 195, 50),
    ("en-gb", "m6", 155, 60), ("it", "m8", 180, 35), ("it", "steph", 160, 55),
    ("nl", "Gene", 170, 45), ("nl", "aunty", 185, 60),
]  # fmt: skip

SENTENCES = {
    "en": [
        "The kettle had been boiling for some time before anyone heard it.",
        "Please move the ladder away from the window, and close the gate.",
        "Seven yellow boats were waiting for the tide to turn.",
        "She measured the shelf twice and still cut it too short.",
        "Next Thursday the library opens an hour later than usual.",
        "A small dog followed us from the station to the bridge.",
    ],
    "de": [
        "Der Zug nach Hamburg fährt heute von einem anderen Gleis.",
        "Im Garten stehen drei alte Apfelbäume und eine Bank.",
        "Bitte schalten Sie das Licht aus, wenn Sie als Letzter gehen.",
        "Gestern hat es den ganzen Tag geregnet, und der Keller ist nass.",
    ],
    "fr": [
        "Le marché commence à huit heures devant la petite église.",
        "Nous avons oublié les clés de la voiture sur la table.",
        "Il faut ajouter un peu de sel et remuer doucement.",
        "La rivière est plus haute que l'année dernière.",
    ],
    "es": [
        "La tienda de la esquina cierra a las nueve de la noche.",
        "Mañana vamos a pintar la puerta de color verde.",
        "El camino hasta la montaña es largo pero muy bonito.",
        "Compramos pan, queso y un kilo de naranjas.",
    ],
}
TEST_SENTENCES = {
    "en": [
        "Our neighbor keeps bees, and every summer he brings us honey.",
        "The last bus leaves at midnight from behind the theater.",
        "Can you read the number on the back of the machine?",
    ],
    "it": ["Il treno per Torino parte tra dieci minuti.", "Questa sera ceniamo in terrazza con gli amici."],
    "nl": [
        "De fiets staat achter het huis naast de schuur.",
        "Morgen wordt het zonnig en een beetje warmer.",
    ],
}


def speak(text: str, language: str, variant: str, speed: int, pitch: int) -> Sound:
    """Return a sentence as espeak-ng speaks it, at most 1 in magnitude."""
    program = shutil.which("espeak-ng")
    if program is None:
        sys.exit("denoise.py: espeak-ng is missing; install it, as with: apt-get install espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        voice = ["-v", f"{language}+{variant}", "-s", str(speed), "-p", str(pitch)]
        subprocess.run([program, *voice, "-w", str(path), text], check=True)
        with wave.open(str(path), "rb") as file:
            if file.getframerate() != RATE:
                sys.exit(
                    f"denoise.py: espeak-ng must write {RATE} samples a second, not {file.getframerate()}"
                )
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return np.divide(samples, 32768, dtype=np.float32)


def speech(voices: Sequence[tuple[str, str, int, int]], sentences: dict[str, list[str]]) -> list[Sound]:
    """Return every sentence of its language in every voice."""
    return [speak(text, *voice) for voice in voices for text in sentences[voice[0].partition("-")[0]]]


def write_wav(path: Path, sound: NDArray[Any]) -> None:
    """Write a mono file of 16-bit samples."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype(np.int16).tobytes())


def colored(size: int, rng: Generator, power: float) -> NDArray[np.float64]:
    """Return noise whose power falls with frequency as 1 / f**power."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.fft.rfftfreq(size, 1 / RATE)
    return np.fft.irfft(spectrum / np.maximum(frequencies, 20.0) ** (power / 2), size)


def white(size: int, rng: Generator) -> NDArray[np.float64]:
    """All frequencies alike."""
    return rng.standard_normal(size)


def pink(size: int, rng: Generator) -> NDArray[np.float64]:
    """Less power at high frequencies, as of traffic far away."""
    return colored(size, rng, rng.uniform(0.8, 1.8))


def hum(size: int, rng: Generator) -> NDArray[np.float64]:
    """The mains and its harmonics."""
    time, base = np.arange(size) / RATE, rng.choice([50.0, 60.0])
    waves = [
        rng.exponential() / n * np.sin(2 * np.pi * (n * base * time + rng.random())) for n in range(1, 25)
    ]
    return np.sum(waves, axis=0) + 0.01 * rng.standard_normal(size)


def strokes(
    size: int, rng: Generator, rate: float, low: float, high: float, decay: float
) -> NDArray[np.float64]:
    """Return decaying oscillations that start at random times, `rate` a second."""
    sound, time = np.zeros(size), np.arange(int(5 * decay * RATE)) / RATE
    for start in rng.integers(0, size, rng.poisson(rate * size / RATE) + 1):
        ring = np.sin(2 * np.pi * rng.uniform(low, high) * time) + 0.5 * rng.standard_normal(time.size)
        tail = (rng.exponential() * np.exp(-time / (decay * rng.uniform(0.5, 1.5))) * ring)[: size - start]
        sound[start : start + tail.size] += tail
    return sound


def keyboard(size: int, rng: Generator) -> NDArray[np.float64]:
    """Somebody types: some clicks a second."""
    return strokes(size, rng, 8, 1500, 5000, 0.006) + 0.002 * rng.standard_normal(size)


def rain(size: int, rng: Generator) -> NDArray[np.float64]:
    """Hundreds of drops a second, and a hiss."""
    return strokes(size, rng, 300, 1000, 9000, 0.002) + 0.1 * colored(size, rng, 0.3)


def siren(size: int, rng: Generator) -> NDArray[np.float64]:
    """A tone with harmonics that rises and falls."""
    time = np.arange(size) / RATE
    pitch = rng.uniform(500, 900) * 2 ** (
        0.5 * np.sin(2 * np.pi * (rng.uniform(0.3, 1.5) * time + rng.random()))
    )
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    return np.sum([np.sin(n * phase) / n**1.5 for n in range(1, 6)], axis=0) + 0.02 * rng.standard_normal(
        size
    )


def engine(size: int, rng: Generator) -> NDArray[np.float64]:
    """Brown noise in bursts, as of a motor."""
    turns = rng.uniform(15, 40) * np.arange(size) / RATE + 0.2 * np.sin(np.arange(size) / RATE)
    return colored(size, rng, 2.0) * (0.3 + np.abs(np.sin(np.pi * turns)) ** 3)


Noise = Callable[[int, Generator], NDArray[np.float64]]
TRAIN_NOISES = (white, pink, hum, keyboard)
TEST_NOISES = (rain, siren, engine)


def babble(speakers: Sequence[Sound], size: int, rng: Generator) -> Sound:
    """Return five voices at once."""
    chosen = rng.choice(len(speakers), 5, replace=False)
    return np.sum([np.roll(np.resize(speakers[i], size), rng.integers(size)) for i in chosen], axis=0)


def recordings(noise: Noise, rng: Generator) -> list[Sound]:
    """Return RECORDINGS noises of a kind."""
    return [noise(RECORDING, rng).astype(np.float32) for _ in range(RECORDINGS)]


def several(noises: Sequence[Noise], speakers: Sequence[Sound], rng: Generator) -> list[Sound]:
    """Return recordings of each kind, and of voices at once."""
    made = [sound for noise in noises for sound in recordings(noise, rng)]
    return made + [babble(speakers, RECORDING, rng) for _ in range(RECORDINGS)]


def cut(sound: Sound, size: int, rng: Generator) -> Sound:
    """Return a random piece of a sound, with zeros around it where it is too short."""
    start = rng.integers(0, abs(len(sound) - size) + 1)
    if len(sound) >= size:
        return sound[start : start + size]
    return np.pad(sound, (start, size - len(sound) - start))


def mixtures(
    count: int, voices: Sequence[Sound], noises: Sequence[Sound], size: int, rng: Generator
) -> tuple[Sound, Sound]:
    """Return noisy and clean sounds, both `(count, size)`, with 5 dB more noise to 10 dB more speech."""
    noisy, clean = np.zeros((2, count, size), np.float32)
    for row in range(count):
        voice = cut(voices[int(rng.integers(len(voices)))], size, rng)
        noise = cut(noises[int(rng.integers(len(noises)))], size, rng)
        level = 10 ** rng.uniform(-1.5, -1.0)
        clean[row] = voice * level / rms(voice)
        noisy[row] = clean[row] + noise * level / rms(noise) * 10 ** (-rng.uniform(-5, 10) / 20)
    return noisy, clean


def rms(sound: NDArray[Any]) -> float:
    """Return the root of the mean square, at least 1e-4."""
    return max(float(np.sqrt(np.mean(np.square(sound)))), 1e-4)
