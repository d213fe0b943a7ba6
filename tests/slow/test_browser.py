"""The page of examples/browser, in Chromium: the tokens are Python's, and nothing goes wrong unsaid.

It needs Chromium, node, and what `npm install` puts beside the page.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import decision_model, language_model
from torch import Tensor

import minrnn
from minrnn import ModelConfig, SequenceModel, export_sequence, export_step, generate
from minrnn.cli.sample import prompt_ids
from minrnn.mixers import MIXERS
from minrnn.models.generation import choose
from minrnn.tasks.vocabulary import END_OF_TEXT, ByteVocabulary, CharacterVocabulary, Vocabulary

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "examples" / "browser"
DRIVER = REPOSITORY / "tests" / "browser" / "drive.mjs"
CHROMIUM, NODE = shutil.which("chromium"), shutil.which("node")

MISSING = [
    *(["node (Debian's package nodejs)"] if NODE is None else []),
    *(["chromium (Debian's package)"] if CHROMIUM is None else []),
    *(["examples/browser/node_modules (npm install)"] if not (PAGE / "node_modules").is_dir() else []),
    *(["onnxscript (the extra export)"] if find_spec("onnxscript") is None else []),
]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"the page needs {', '.join(MISSING)}"),
    pytest.mark.timeout(1200),  # an export takes a minute on a busy machine
]

TEXT = (
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind; er hat den Knaben wohl in dem"
    " Arm, er faßt ihn sicher, er hält ihn warm. «Mein Sohn, was birgst du so bang dein Gesicht?» — Siehst, "
    "Vater, du den Erlkönig nicht? Den König mit Kron und Schweif? «Mein Sohn, es ist ein Nebelstreif.»\n"
)
CHARACTERS = "".join(sorted(set(TEXT)))
VOCABULARIES: list[Vocabulary] = [
    ByteVocabulary(),
    CharacterVocabulary(CHARACTERS),
    ByteVocabulary(is_marked=False),
    CharacterVocabulary(CHARACTERS, is_marked=False),
]
PROMPT, LENGTH = "Mein Sohn", 200

Visit = dict[str, Any]


@cache
def learned(mixer: str, vocabulary: Vocabulary, text: str = TEXT) -> SequenceModel:
    """Return a small model that has read a text, beginning and end, until it knows it."""
    torch.manual_seed(0)
    options = {"window": 8} if mixer == "attention" else {}
    config = ModelConfig(vocab_size=vocabulary.size, d_model=32, num_layers=2, mixer=mixer, **options)
    model = SequenceModel(config)
    ids = prompt_ids(vocabulary, text)
    ids = torch.tensor([ids * 2 + ids[:1]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.tensor(torch.inf)
    for _ in range(1000):
        if loss < 0.2:
            break
        optimizer.zero_grad()
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    return model.eval()


def tokens_of(model: SequenceModel, vocabulary: Vocabulary, prompt: str, length: int = LENGTH) -> list[int]:
    """Return what Python writes."""
    ids = torch.tensor([prompt_ids(vocabulary, prompt)])
    return [int(token) for token in generate(model, ids, length, temperature=0, end=vocabulary.end_of_text)]


def text_of(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return vocabulary.decode([token for token in tokens if token != vocabulary.end_of_text])


def save(model: SequenceModel, path: Path, vocabulary: Vocabulary | None = None) -> Path:
    metadata = {} if vocabulary is None else {"vocabulary": vocabulary.to_dict()}
    export_step(model, metadata=metadata).save(path)
    return path


class Quiet(SimpleHTTPRequestHandler):
    """What `python -m http.server` answers with, without its log."""

    def log_message(self, *arguments: object) -> None:
        """Keep the tests quiet."""


class Site:
    """The page, served on this machine from a folder of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def visit(self, *actions: dict[str, Any]) -> Visit:
        """Open the page, do something, and return what it showed and what went wrong."""
        request = {"page": str(PAGE), "url": self.url, "chromium": CHROMIUM, "visits": [actions]}
        done = subprocess.run(
            [str(NODE), str(DRIVER)], input=json.dumps(request), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (visit,) = json.loads(done.stdout)
        return visit


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    for file in PAGE.iterdir():
        (folder / file.name).symlink_to(file)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
        thread.join()


def greedy(prompt: str = PROMPT, length: int = LENGTH, **more: Any) -> dict[str, Any]:
    """Return the action of writing a text of the most likely tokens."""
    return {"fill": {"prompt": prompt, "temperature": 0, "length": length}, "click": "write", **more}


# --- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "vocabulary"),
    list(zip(MIXERS, cycle(VOCABULARIES), strict=False)),
    ids=lambda value: getattr(value, "kind", value),
)
def test_tokens_are_pythons(mixer: str, vocabulary: Vocabulary, site: Site, tmp_path: Path) -> None:
    """From a prompt and from none, with the state of the text before forgotten."""
    model = learned(mixer, vocabulary)
    save(model, site.folder / "model.onnx", vocabulary)
    picture = tmp_path / "page.png"
    visit = site.visit(greedy(), greedy(""), greedy(screenshot=str(picture)))
    assert visit["problems"] == []
    first, *texts = visit["seen"]
    assert (first["status"], first["can"]) == ("Ready.", ["write"])
    for text, prompt in zip(texts, (PROMPT, "", PROMPT), strict=True):
        expected = tokens_of(model, vocabulary, prompt)
        assert text["tokens"] == expected
        assert len(set(expected)) > 5  # a model that repeats itself would prove little
        assert (text["given"], text["output"]) == (prompt, text_of(vocabulary, expected))
        assert text["progress"].startswith(f"{len(expected)} tokens, ")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("vocabulary", VOCABULARIES[:2], ids=lambda vocabulary: vocabulary.kind)
def test_a_text_ends(vocabulary: Vocabulary, site: Site) -> None:
    model = learned("mingru", vocabulary, TEXT[:41])
    save(model, site.folder / "model.onnx", vocabulary)
    visit = site.visit(greedy("Wer reitet"))
    expected = tokens_of(model, vocabulary, "Wer reitet")
    assert expected[-1] == vocabulary.end_of_text
    assert len(expected) < LENGTH
    (_, text) = visit["seen"]
    assert (text["tokens"], text["status"]) == (expected, "The text has ended.")
    assert text["output"] == text_of(vocabulary, expected)
    assert visit["problems"] == []


def test_the_commands_of_the_page(site: Site, tmp_path: Path) -> None:
    """A run is trained and exported as a user does it; the page writes what `minrnn sample` writes."""
    source, run = tmp_path / "text.txt", tmp_path / "run"
    source.write_text(TEXT * 40, encoding="utf-8")
    small = ["--model.d-model=32", "--model.num-layers=1", "--train.steps=60", "--train.eval-every=60"]
    command("train", "demo", f"--task.source={source}", f"--run={run}", "--task.window=64", *small)
    command("export", str(run), str(site.folder / "model.onnx"))
    wanted = command(
        "sample", str(run), f"--prompt={PROMPT}", f"--tokens={LENGTH}", "--temperature=0", "--device=cpu"
    )
    visit = site.visit(greedy())
    assert visit["problems"] == []
    assert PROMPT + visit["seen"][1]["output"] + "\n" == wanted
    assert "257 tokens (bytes)" in visit["seen"][0]["model"]


def command(*arguments: str) -> str:
    """Run minrnn in a process of its own, and return what it prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(minrnn.__file__).parents[1]),
        "PYTHONIOENCODING": "utf-8",
    }
    line = [sys.executable, "-m", "minrnn", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the page -----------------------------------------------------------------------------------------------


def test_a_seed_gives_one_text_and_stop_stops(site: Site) -> None:
    vocabulary = VOCABULARIES[2]  # in which no text ends by itself
    save(learned("mingru", vocabulary), site.folder / "model.onnx", vocabulary)
    drawn = {"prompt": PROMPT, "temperature": 1.5, "length": 60, "seed": 3}
    visit = site.visit(
        {"fill": drawn, "click": "write"},
        {"fill": {"seed": 4}, "click": "write"},
        {"fill": {"seed": 3}, "click": "write"},
        {"fill": {"top-k": 1}, "click": "write"},
        {"fill": {"temperature": 5, "top-k": 0, "length": 1_000_000}, "click": "write", "tokens": 10},
        {"click": "stop"},
        greedy(length=30),
    )
    assert visit["problems"] == []
    _, first, other, again, likely, running, stopped, after = visit["seen"]
    assert first["tokens"] == again["tokens"] != other["tokens"]
    model = learned("mingru", vocabulary)
    assert likely["tokens"] == tokens_of(model, vocabulary, PROMPT, 60)
    assert (running["can"], running["status"]) == (["stop"], "Writing …")
    assert (stopped["can"], stopped["status"]) == (["write"], "Stopped.")
    hot = running["tokens"] + stopped["tokens"]  # many of these bytes are no UTF-8
    assert stopped["output"] == text_of(vocabulary, hot)
    assert len(hot) < 1_000_000
    assert after["tokens"] == tokens_of(model, vocabulary, PROMPT, 30)


MARK = {"end_of_text": END_OF_TEXT}


def with_vocabulary(path: Path, vocabulary: dict[str, str]) -> bytes:
    """Return a file with another vocabulary in its metadata; an empty one is none."""
    import onnx

    model = onnx.load(path)
    (entry,) = model.metadata_props
    known = {**json.loads(entry.value), "vocabulary": vocabulary or None}
    entry.value = json.dumps(known)
    return bytes(model.SerializeToString())


def test_wrong_files_get_one_line_and_the_model_stays(site: Site, tmp_path: Path) -> None:
    vocabulary = VOCABULARIES[1]
    good = save(learned("mingru", vocabulary), site.folder / "model.onnx", vocabulary)
    wrong = {
        "text.onnx": "an ONNX file",
        "short.onnx": "cut short",
        "empty.onnx": "minrnn export",
        "policy.onnx": "got a policy's step",
        "sequence.onnx": "got a language model's sequence",
        "none.onnx": "bytes or characters, as the file holds no other, got none",
        "bpe.onnx": "bytes or characters, as the file holds no other, got bpe",
        "size.onnx": f"must have 257 logits, one for each token, got {len(CHARACTERS) + 1}",
        "batch.onnx": "got a batch of 3; export without --batch",
    }
    (tmp_path / "text.onnx").write_text(TEXT)
    (tmp_path / "short.onnx").write_bytes(good.read_bytes()[:-1000])
    (tmp_path / "empty.onnx").touch()
    export_step(decision_model()).save(tmp_path / "policy.onnx")
    export_sequence(language_model()).save(tmp_path / "sequence.onnx")
    model = learned("mingru", vocabulary)
    export_step(model, batch=3, metadata={"vocabulary": vocabulary.to_dict()}).save(tmp_path / "batch.onnx")
    described = {"none": {}, "bpe": {"kind": "bpe", "sha256": "0" * 64}, "size": {"kind": "bytes", **MARK}}
    for name, other in described.items():
        (tmp_path / f"{name}.onnx").write_bytes(with_vocabulary(good, other))
    visit = site.visit(
        *({"file": str(tmp_path / name)} for name in wrong),
        greedy(length=30),
        greedy("Erlkönig 7"),
        {"file": str(good)},
    )
    assert visit["problems"] == []
    *answers, text, unknown, last = visit["seen"][1:]
    for (name, reason), answer in zip(wrong.items(), answers, strict=True):
        assert answer["failed"], name
        assert answer["status"].startswith(f"{name}: the ")
        assert reason in answer["status"]
        assert "\n" not in answer["status"]
        assert answer["can"] == ["write"]
    assert text["tokens"] == tokens_of(model, vocabulary, PROMPT, 30)
    assert unknown["failed"]
    assert unknown["status"] == (
        f'Writing: the prompt must use the model\'s {len(CHARACTERS)} characters only, got "7"'
    )
    assert not last["failed"]


def test_what_is_not_beside_the_page_is_named(site: Site, tmp_path: Path) -> None:
    vocabulary = VOCABULARIES[0]
    (site.folder / "node_modules").unlink()
    visit = site.visit({"file": str(save(learned("mingru", vocabulary), tmp_path / "good.onnx", vocabulary))})
    first, second = visit["seen"]
    assert first["status"] == "model.onnx: it is not beside the page; choose a file"
    assert second["status"].startswith("good.onnx: onnxruntime-web is missing: run `npm install`")
    assert all(seen["failed"] and seen["can"] == [] for seen in visit["seen"])
    assert any("404" in problem for problem in visit["problems"])


# --- drawing ------------------------------------------------------------------------------------------------

DRAW = """
import { choose, randomNumbers } from %s;
const input = await new Response(process.stdin).json();
const random = randomNumbers(input.seed);
const logits = Float32Array.from(input.logits, Number);
const drawn = [];
for (let n = 0; n < input.draws; n += 1) drawn.push(choose(logits, { ...input, random }));
console.log(JSON.stringify(drawn));
"""


def draw(logits: Tensor, **settings: Any) -> Any:
    """Return what the page draws; the reason, if it refuses to."""
    program = DRAW % json.dumps((PAGE / "sampling.js").as_uri())
    request = {"seed": 0, "draws": 1, "topK": 0, "logits": [str(x) for x in logits.tolist()], **settings}
    done = subprocess.run(
        [str(NODE), "--input-type=module", "--eval", program],
        input=json.dumps(request).replace('"nan"', '"NaN"'),
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 4), (1.0, 1)])
def test_draws_have_pythons_probabilities(temperature: float, top_k: int) -> None:
    """Over 40,000 draws each: both are within five standard deviations of the same."""
    draws, logits = 40_000, torch.randn(9, generator=torch.Generator().manual_seed(0))
    ours = draw(logits, draws=draws, temperature=temperature, topK=top_k)
    theirs = choose(
        logits.repeat(draws, 1),
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    found, wanted = (np.bincount(np.asarray(drawn), minlength=9) / draws for drawn in (ours, theirs))
    np.testing.assert_allclose(found, wanted, atol=5 * (0.5 / draws) ** 0.5)
    assert ((found == 0) == (wanted == 0)).all()


def test_the_extremes_of_drawing() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0, -3.0])
    assert draw(logits, temperature=0, draws=3) == [1, 1, 1]
    assert set(draw(logits, temperature=1e-300, draws=100)) == {1, 2}
    assert draw(logits, temperature=1.0, draws=50) == draw(logits, temperature=1.0, draws=50)
    assert draw(logits, temperature=9.0, draws=50) != draw(logits, temperature=9.0, draws=50, seed=1)
    assert "logits are not finite" in draw(torch.tensor([0.0, float("nan")]), temperature=1.0)
