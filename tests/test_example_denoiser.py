"""The streaming denoiser: a stream computes what training does, and sounds are what their names say."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_scripts import imported, run
from torch import Tensor

KINDS = ("gru", "lstm", "mingru", "minlstm")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with imported("denoiser/denoise.py") as module:
        yield module


@pytest.fixture(scope="module")
def sounds(script: ModuleType) -> ModuleType:
    return script.sounds


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- the model -------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("extra", [0, 1, 100, 255])
def test_a_stream_equals_the_whole(script: ModuleType, kind: str, extra: int) -> None:
    torch.manual_seed(0)
    model = script.Denoiser(kind, 16).eval()
    sound = noise(20 * script.HOP + extra)
    stream = script.Stream(model)
    padded = torch.nn.functional.pad(sound, (0, script.HOP + -extra % script.HOP))
    streamed = torch.cat([stream.step(samples) for samples in padded.split(script.HOP)])
    whole = model.denoise(sound[None])[0]
    torch.testing.assert_close(streamed[script.HOP :][: len(sound)], whole, rtol=0, atol=1e-5)
    assert whole.shape == sound.shape
    assert whole.abs().max() > 0.1


@every_kind
def test_later_samples_change_nothing_earlier(script: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    model = script.Denoiser(kind, 16)
    sound = noise(1, 12 * script.HOP)
    changed = sound.clone()
    changed[:, 8 * script.HOP :] += 1
    before, after = model.denoise(sound), model.denoise(changed)
    settled = 7 * script.HOP  # a sample is in two frames, of which the second ends a hop later
    torch.testing.assert_close(before[:, :settled], after[:, :settled])
    assert not torch.allclose(
        before[:, settled : settled + script.HOP], after[:, settled : settled + script.HOP]
    )


@pytest.mark.parametrize("kind", ["gru", "mingru"])
def test_the_state_carries_across_frames(script: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    model = script.Denoiser(kind, 16)
    frames = noise(2, 6, script.SIZE)
    changed = frames.clone()
    changed[:, 0] *= 3
    assert not torch.equal(model(frames)[0][:, -1], model(changed)[0][:, -1])


@pytest.mark.parametrize("samples", [700, 1024, 1025])
def test_a_mask_of_ones_returns_the_sound(script: ModuleType, samples: int) -> None:
    model = script.Denoiser("mingru", 4)
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.fill_(40.0)
    sound = noise(2, samples)
    torch.testing.assert_close(model.denoise(sound), sound, rtol=0, atol=1e-5)


def test_training_improves(script: ModuleType) -> None:
    """A tone in noise, in a few steps."""
    time = torch.arange(4000) / script.sounds.RATE
    tone = (2 * torch.pi * 440 * time).sin().expand(4, -1)
    pair = (tone + 0.5 * noise(4, 4000), tone)
    torch.manual_seed(0)
    model = script.Denoiser("mingru", 16)
    before = script.improvement(model, *pair)
    assert script.train(model, iter([pair] * 40), 40) > 0
    assert script.improvement(model, *pair) > before + 3


def test_steps_are_timed(script: ModuleType) -> None:
    models = {kind: script.Denoiser(kind, 4) for kind in ("gru", "mingru")}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = script.latencies(models, frames=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found.keys() == models.keys()
    assert min(found.values()) > 0


def test_the_ratio_is_known(script: ModuleType) -> None:
    target = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    error = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # at right angles
    for scale in (0.5, 1.0, 7.0):
        ratio = script.si_sdr(scale * (target + 0.1 * error), target)
        torch.testing.assert_close(ratio, torch.tensor([20.0]), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            script.si_sdr(scale * target + scale * error, 3 * target), torch.tensor([0.0])
        )


def test_an_improvement_is_a_difference_of_ratios(script: ModuleType) -> None:
    model = script.Denoiser("mingru", 4)
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.zero_()  # half of the sound: no change of its form
    clean = noise(3, 2048)
    assert abs(script.improvement(model, clean + 0.3 * noise(6, 2048)[3:], clean)) < 1e-2


def test_the_table(script: ModuleType) -> None:
    rows = [
        {
            "model": name,
            "parameters": 1234,
            "improvement": {"rain": gain},
            "seconds": 9.6,
            "milliseconds": 0.5,
        }
        for name, gain in (("gru:8", 1.0), ("mingru:8", 4.0), ("gru:8", 2.0))
    ]
    assert script.table(rows).splitlines()[2:] == [
        "| gru:8 | 1,234 | 1.5 ± 0.7 | 0.50 | 10 |",
        "| mingru:8 | 1,234 | 4.0 | 0.50 | 10 |",
    ]


# --- the sounds ------------------------------------------------------------------------------------------


def test_the_test_shares_no_voice_sentence_or_kind_with_training(sounds: ModuleType) -> None:
    assert not set(sounds.TRAIN_VOICES) & set(sounds.TEST_VOICES)
    assert not {voice[1] for voice in sounds.TRAIN_VOICES} & {voice[1] for voice in sounds.TEST_VOICES}
    texts, others = (
        {text for some in sentences.values() for text in some}
        for sentences in (sounds.SENTENCES, sounds.TEST_SENTENCES)
    )
    assert not texts & others
    assert not set(sounds.TRAIN_NOISES) & set(sounds.TEST_NOISES)
    for voices, sentences in (
        (sounds.TRAIN_VOICES, sounds.SENTENCES),
        (sounds.TEST_VOICES, sounds.TEST_SENTENCES),
    ):
        assert {voice[0].partition("-")[0] for voice in voices} == set(sentences)


def test_noises_are_noises(sounds: ModuleType) -> None:
    for kind in (*sounds.TRAIN_NOISES, *sounds.TEST_NOISES):
        one, again, other = (kind(20_000, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert one.shape == (20_000,), kind
        assert np.isfinite(one).all(), kind
        assert np.array_equal(one, again), kind
        assert not np.array_equal(one, other), kind
        assert one.std() > 1e-4, kind


def power(sound: np.ndarray, rate: int, low: float, high: float) -> float:
    spectrum, frequencies = np.abs(np.fft.rfft(sound)) ** 2, np.fft.rfftfreq(len(sound), 1 / rate)
    return float(spectrum[(frequencies >= low) & (frequencies < high)].mean())


def test_noises_have_the_spectra_of_their_names(sounds: ModuleType, rng: np.random.Generator) -> None:
    found = {}
    for kind in (*sounds.TRAIN_NOISES, *sounds.TEST_NOISES):
        sound = kind(88_200, rng)
        found[kind.__name__] = [power(sound, sounds.RATE, *band) for band in ((30, 400), (4000, 8000))]
    assert 0.8 < np.divide(*found["white"]) < 1.25
    for low in ("pink", "hum", "engine"):
        assert found[low][0] > 10 * found[low][1], low
    for high in ("keyboard", "rain"):
        assert found[high][0] < found[high][1], high
    brown = sounds.colored(2**18, rng, 2.0)
    bands = [power(brown, sounds.RATE, frequency, 1.2 * frequency) for frequency in (500, 5000)]
    assert 80 < np.divide(*bands) < 125


def test_strokes_come_and_go(sounds: ModuleType, rng: np.random.Generator) -> None:
    """Of a keyboard's ten seconds most are quiet."""
    sound = np.abs(sounds.keyboard(10 * sounds.RATE, rng))
    assert sound.max() > 50 * np.median(sound)
    assert 20 < len(np.unique(np.flatnonzero(sound > 0.1 * sound.max()) // (sounds.RATE // 20))) < 160


def test_babble_is_of_several_voices(sounds: ModuleType, rng: np.random.Generator) -> None:
    tones = [np.sin(np.arange(3000) * step).astype(np.float32) for step in (0.05, 0.1, 0.2, 0.4, 0.8)]
    spectrum = np.abs(np.fft.rfft(sounds.babble(tones, 30_000, rng)))
    for step in (0.05, 0.1, 0.2, 0.4, 0.8):
        line = round(step * 30_000 / (2 * np.pi))
        assert spectrum[line - 20 : line + 20].max() > 0.3 * spectrum.max()


def test_a_piece_is_of_the_sound(sounds: ModuleType, rng: np.random.Generator) -> None:
    sound = np.arange(1, 101, dtype=np.float32)
    starts = {int(sounds.cut(sound, 95, rng)[0]) for _ in range(100)}
    assert starts == {1, 2, 3, 4, 5, 6}
    padded = [sounds.cut(sound, 103, rng) for _ in range(60)]
    assert all(len(piece) == 103 and piece.sum() == sound.sum() for piece in padded)
    assert {int(np.argmax(piece > 0)) for piece in padded} == {0, 1, 2, 3}


def test_mixtures_have_the_ratios_that_they_say(sounds: ModuleType, rng: np.random.Generator) -> None:
    voices, noises = [noise(900).numpy()], [rng.uniform(-1, 1, 5000).astype(np.float32)]
    noisy, clean = sounds.mixtures(400, voices, noises, 800, rng)
    assert noisy.shape == clean.shape == (400, 800)
    assert noisy.dtype == clean.dtype == np.float32
    ratios = 10 * np.log10(np.square(clean).mean(1) / np.square(noisy - clean).mean(1))
    assert -5.01 < ratios.min() < -4.5
    assert 9.5 < ratios.max() < 10.01
    levels = np.log10(np.sqrt(np.square(clean).mean(1)))
    assert -1.5 <= levels.min() + 1e-6 < -1.4 < -1.1 < levels.max() <= -1.0 + 1e-6


def test_a_written_sound_is_read_as_it_was(sounds: ModuleType, tmp_path: Path) -> None:
    sounds.write_wav(tmp_path / "a.wav", np.array([0.5, -0.25, 2.0, -2.0]))
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        assert (file.getframerate(), file.getnchannels()) == (sounds.RATE, 1)
        read = np.frombuffer(file.readframes(10), np.int16) / 32767
    np.testing.assert_allclose(read, [0.5, -0.25, 1, -1], atol=1e-4)


def test_spectrograms_are_drawn(sounds: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra plots")
    for name, scale in (("loud", 0.5), ("silent", 0.0)):
        sounds.write_wav(tmp_path / f"{name}.wav", scale * noise(5000).numpy())
    names = (tmp_path / "loud.wav", tmp_path / "silent.wav")
    done = run("denoiser/picture.py", *names, "--output", tmp_path / "both.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


# --- the script ------------------------------------------------------------------------------------------

TINY = ("--steps", "2", "--batch", "2", "--seconds", "0.3", "--tests", "2", "--models", "gru:4", "mingru:4")


def test_without_espeak_one_line_says_what_to_install(tmp_path: Path) -> None:
    done = run("denoiser/denoise.py", *TINY, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "denoise.py: espeak-ng is missing; install it, as with: apt-get install espeak-ng\n"


@pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="no espeak-ng, which speaks: apt-get install it"
)
def test_the_script_runs(tmp_path: Path) -> None:
    done = run("denoiser/denoise.py", *TINY, "--output", tmp_path / "r.json", "--listening", tmp_path / "wav")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert [(r["model"], r["seed"]) for r in results["records"]] == [("gru:4", 0), ("mingru:4", 0)]
    assert set(results["records"][0]["improvement"]) == {"seen kinds", "rain", "siren", "engine"}
    assert len({r["parameters"] for r in results["records"]}) == 2
    assert done.stdout.rstrip().splitlines()[-1].startswith("| mingru:4 | ")
    names = {path.name for path in (tmp_path / "wav").iterdir()}
    assert {"rain-noisy.wav", "rain-clean.wav", "rain-gru-4.wav", "seen-kinds-mingru-4.wav"} <= names
