"""Documents: whatever the file, each is marked, read from an empty state, and in one part only."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from minrnn.cli.main import main
from minrnn.cli.sample import prompt_ids
from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig, SequenceModel, generate
from minrnn.tasks import TextConfig, TextTask, documents, tokenizing, tokens
from minrnn.tasks.documents import INSTALL, Piece, read_pieces
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.progress import Bar
from minrnn.tasks.sources import find_corpus
from minrnn.tasks.tokens import TokenizedCorpus, tokenize
from minrnn.tasks.vocabulary import END_OF_TEXT, ByteVocabulary
from minrnn.training import RunConfig, load_recipe, read_config

END = 256
TEXTS = [f"Document {n}:\n{'word ' * (n % 7)}née {n * n}\n" for n in range(60)]

zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: the extra text")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra text")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))


def as_lines(texts: list[str], column: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, column: text}).encode() + b"\n" for n, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str], column: str = "text") -> None:
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, path, row_group_size=7)


ROW_WRITERS: dict[str, Callable[..., object]] = {
    ".jsonl": lambda path, *what: path.write_bytes(as_lines(*what)),
    ".ndjson": lambda path, *what: path.write_bytes(as_lines(*what).rstrip(b"\n")),
    ".JSONL.gz": lambda path, *what: path.write_bytes(gzip.compress(as_lines(*what))),
    ".jsonl.zst": lambda path, *what: path.write_bytes(
        b"".join(zstandard.compress(line) for line in as_lines(*what).splitlines(keepends=True))
    ),
    ".parquet": write_parquet,
}


def write_rows(folder: Path, suffix: str, texts: list[str] = TEXTS, column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"rows.1{suffix}"
    ROW_WRITERS[suffix](path, texts, column)
    return path


def write_folder(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def write_form(form: str, path: Path, texts: list[str] = TEXTS) -> Path:
    """Write documents as files of a folder or as rows."""
    return write_folder(path, texts) if form == "folder" else write_rows(path, form, texts)


def read(source: Path, **options: Any) -> TokenizedCorpus:
    return tokenize(find_corpus(str(source), **options), "bytes")


def split(ids: np.ndarray) -> list[str]:
    """Return the documents of a part, which begins and ends with a mark, as all of them do."""
    assert ids[0] == ids[-1] == END
    places = np.flatnonzero(ids == END)
    return [ByteVocabulary().decode(ids[i + 1 : j]) for i, j in pairwise(places)]


# reading


@pytest.mark.parametrize("suffix", ROW_WRITERS)
@pytest.mark.parametrize("column", ["text", "content"])
def test_rows_are_the_same_documents_in_every_format(suffix: str, column: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", suffix, column=column)
    pieces = list(read_pieces(path, column))
    assert [piece.text.decode() for piece in pieces] == TEXTS
    assert all(piece.is_first for piece in pieces)
    corpus = read(path, column=column)
    parts = split(corpus.train), split(corpus.val)
    assert [text for text in TEXTS if text in parts[0]] == parts[0]
    assert [text for text in TEXTS if text in parts[1]] == parts[1]
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS)
    assert parts[1] == [
        TEXTS[n] for n in (2, 6, 15, 26, 28, 30, 32, 33, 43)
    ]  # by their hashes, on every machine


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_files_of_a_folder_are_documents(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix = {bytes: "", gzip.compress: ".gz"}.get(compress, ".zst")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:03}.txt{suffix}").write_bytes(compress(text.encode()))
    (tmp_path / "texts" / f"picture{suffix}").write_bytes(compress(b"\0\1"))
    corpus = find_corpus(str(tmp_path / "texts"))
    assert corpus.left_out == 1
    found = tokenize(corpus, "bytes")
    train, val = split(found.train), split(found.val)
    assert (len(train), len(val)) == (54, 6)
    assert train == [text for text in TEXTS if text in train]
    assert sorted(train + val) == sorted(TEXTS)


def test_rows_beside_files_are_divided_by_row(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "all", TEXTS[:5])
    write_rows(folder, ".jsonl", TEXTS[5:30])
    write_rows(folder, ".parquet", TEXTS[30:])
    found = read(folder)
    train, val = split(found.train), split(found.val)
    assert val == [TEXTS[n] for n in (6, 15, 26, 28, 30, 32, 33, 43)]
    assert train == [text for text in TEXTS if text not in val]


def test_equal_documents_are_in_one_part(tmp_path: Path) -> None:
    found = read(write_rows(tmp_path / "rows", ".jsonl", TEXTS * 3))
    train, val = split(found.train), split(found.val)
    assert not set(train) & set(val)
    assert len(train) + len(val) == 3 * len(TEXTS)


def test_one_file_of_text_is_divided_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 98)
    found = read(tmp_path / "one.txt")
    assert found.train.tolist() == [END] + [ord("x")] * 89
    assert found.val.tolist() == [ord("x")] * 9 + [END]


def test_joined_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", ".jsonl")
    found = read(path, is_joined=True)
    assert np.concatenate([found.train, found.val]).tobytes() == path.read_bytes()
    assert found.train.dtype == np.uint8
    folder = write_folder(tmp_path / "texts")
    found = read(folder, is_joined=True)
    assert END not in found.train
    marked = read(folder)
    assert marked.train[marked.train != END].tolist() == found.train.tolist()
    with pytest.raises(ValueError, match="vocabulary must have an end of text, and none for a joined corpus"):
        tokenize(find_corpus(str(folder), is_joined=True), ByteVocabulary())


@pytest.mark.parametrize("piece_bytes", [7, 30, 1 << 20])
@pytest.mark.parametrize("read_bytes", [3, 1 << 20])
@pytest.mark.parametrize("name", ["rows.jsonl", "long.txt"])
def test_pieces_are_a_document_cut_after_words(
    name: str, read_bytes: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "some words and\nlines 中文中文中文中文中文中文中文中文 and more of them " * 3
    (tmp_path / "rows.jsonl").write_bytes(as_lines([long, "", "short one"]))
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    monkeypatch.setattr(documents, "READ_BYTES", read_bytes)
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    pieces = list(read_pieces(tmp_path / name, "text"))
    starts = [number for number, piece in enumerate(pieces) if piece.is_first]
    assert len(starts) == (1 if name == "long.txt" else 2)  # a document without text is none
    whole = pieces[: starts[1]] if len(starts) > 1 else pieces
    assert b"".join(piece.text for piece in whole).decode() == long
    assert [piece.offset for piece in whole] == np.cumsum([0, *(len(p.text) for p in whole[:-1])]).tolist()
    assert all(len(piece.text) <= piece_bytes for piece in pieces)
    for one, other in pairwise(whole):
        one.text.decode()
        if piece_bytes == 30 and any(byte in one.text[:-1] for byte in b" \n"):
            assert (one.text[-1:].isalpha() and other.text[:1] in (b" ", b"\n")) or one.text[-1] > 127
    if name == "long.txt":
        assert pieces[-1].place == len(long.encode())


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a.jsonl.gz": (gzip.compress(as_lines(TEXTS))[:-9], r"a\.jsonl\.gz is not a whole \.gz file"),
    "b.txt.gz": (b"no gzip at all", r"b\.txt\.gz is not a whole \.gz file"),
    "c.txt.zst": (b"nor zstandard", r"c\.txt\.zst is not a whole \.zst file"),
    "d.parquet": (b"PAR1 and no more", r"d\.parquet is not a whole Parquet file"),
    "e.jsonl": (as_lines(["fine"]) + b'{"text": "ha', r"e\.jsonl, line 2 is not valid JSON"),
    "f.jsonl": (b'{"text": 3}', r"f\.jsonl, line 1 must have text in 'text', got int"),
    "g.jsonl": (as_lines(TEXTS, "body"), r"g\.jsonl, line 1 must have text in 'text', got id, body; task\.t"),
    "h.jsonl": (b"[1]\n", r"h\.jsonl, line 1: it must be a table"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(cache_folder().rglob("*.bin"))


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", ".parquet")
    with pytest.raises(
        ValueError, match=r"must have text in 'body', got id, text; task\.text_column names an"
    ):
        read(path, column="body")
    with pytest.raises(ValueError, match=r"row 1 must have text in 'id', got int"):
        read(path, column="id")


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} needs {package}, which is not installed; .*\[text\]"):
        read(tmp_path / name)
    assert "minrnn[text]" in INSTALL


def test_null_texts_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": ""}\n{"text": "one"}\n')
    assert [piece.text for piece in read_pieces(tmp_path / "a.jsonl", "text")] == [b"one"]


# learning


def task_of(source: Path, **options: Any) -> TextTask:
    return TextTask(TextConfig(str(source), window=12, **options))


def model_of(task: TextTask, mixer: str = "mingru") -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=8, num_layers=2, mixer=mixer, conv_width=3)
    return SequenceModel(task.model_config(config)).double()


@torch.no_grad()
def nats(model: SequenceModel, ids: np.ndarray) -> float:
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    return cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:], reduction="sum").item()


def alone(ids: np.ndarray) -> list[np.ndarray]:
    """Cut before each mark; each part with the token that it predicts last."""
    places = [0, *(np.flatnonzero(ids[1:-1] == END) + 1), ids.size - 1]
    return [ids[i : j + 1] for i, j in pairwise(places)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_evaluation_is_that_of_each_document_alone(mixer: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", ".jsonl", TEXTS[:16])
    second = int(np.flatnonzero(task_of(path).val_tokens == END)[1])
    task = task_of(path, eval_chunk=4096 if mixer == "attention" else second)  # which begins a chunk
    model = model_of(task, mixer)
    metrics = task.evaluate(model)
    expected = [nats(model, part) for part in alone(task.val_tokens)]
    assert len(expected) == 3
    assert metrics["val_loss"] == pytest.approx(sum(expected) / metrics["val_tokens"], abs=1e-10)
    assert metrics["val_tokens"] == task.val_tokens.size - 1
    num = task.val_tokens.size - 1
    windows = [task.val_tokens[start : min(start + 12, num) + 1] for start in range(0, num, 12)]
    expected = [nats(model, part) for window in windows for part in alone(window)]
    assert metrics["val_loss_windowed"] == pytest.approx(sum(expected) / num, abs=1e-10)
    num_bytes = sum(len(text.encode()) for text in split(task.val_tokens))
    assert metrics["bits_per_byte"] * num_bytes == pytest.approx(metrics["val_loss"] * num / np.log(2))


def test_a_batch_is_reset_where_documents_start(tmp_path: Path) -> None:
    task = task_of(write_folder(tmp_path / "texts"))
    model = model_of(task)
    seen = 0
    for step in range(6):
        batch = task.batch(step, 4, 0)
        marks = batch.inputs == END
        marks[:, 0] = False
        assert (batch.reset is None and not marks.any()) or torch.equal(batch.reset, marks)
        seen += int(marks.sum())
        ids = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).numpy()
        expected = np.mean([sum(nats(model, part) for part in alone(row)) / 12 for row in ids])
        assert task.loss(model, batch)[0].item() == pytest.approx(expected, abs=1e-10)
    assert seen > 5


def test_streams_are_reset_at_their_first_step_too(tmp_path: Path) -> None:
    task = task_of(write_folder(tmp_path / "texts"))
    batches = [task.stream_batch(step, 3) for step in range(20)]
    assert [batch.fresh for batch in batches] == [True] + [False] * 19
    for batch in batches[1:]:
        marks = batch.inputs == END
        assert (batch.reset is None and not marks.any()) or torch.equal(batch.reset, marks)
    assert any(batch.reset is not None and batch.reset[:, 0].any() for batch in batches[1:])
    model, state = model_of(task), None
    for batch in batches:
        loss, state = task.loss(model, batch, state)
    row = torch.cat([batch.inputs for batch in batches], dim=1).numpy()
    assert np.isfinite(loss.item())
    last = torch.cat([batches[-1].inputs, batches[-1].targets[:, -1:]], dim=1)
    whole = np.concatenate([row, last[:, -1:].numpy()], axis=1)
    logits = [
        sum(nats(model, part) for part in alone(each)) - sum(nats(model, part) for part in alone(each[:-12]))
        for each in whole
    ]
    assert loss.item() == pytest.approx(np.mean(logits) / 12, abs=1e-10)


def test_what_runs_of_earlier_versions_did_stays(tmp_path: Path) -> None:
    """They recorded no such setting, and read their texts as one stream."""
    values = RunConfig().to_dict()
    assert values["task"].pop("documents") == "separate"
    assert RunConfig.from_record(values).task.documents == "joined"
    assert RunConfig.from_record({**values, "task": {}}).task.documents == "joined"
    assert RunConfig.from_record({}).task == TextConfig()
    with pytest.raises(ValueError, match=r"task\.name must be one of"):
        RunConfig.from_record({"task": {"name": "nothing"}})
    with pytest.raises(ValueError, match="name"):
        RunConfig.from_record({"task": {"name": []}})
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).task.documents == "joined"
    for name in ("shakespeare", "shakespeare-cpu", "shakespeare-best"):
        assert load_recipe(name).task.documents == "joined"


# sampling


def test_generation_ends_at_a_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(vocab_size=4, d_model=8, num_layers=1))
    prompt = torch.tensor([[0], [1], [2]])

    def draw(num_tokens: int, end: int | None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        return [row.tolist() for row in generate(model, prompt, num_tokens, generator=generator, end=end)]

    free = np.array(draw(40, None))
    firsts = [int(np.flatnonzero(row == 3)[0]) for row in free.T]
    assert len(set(firsts)) > 1
    ended = np.array(draw(40, 3))
    assert ended.shape[0] <= 40
    first = min(firsts)
    assert np.array_equal(ended[: first + 1], free[: first + 1])
    for row in ended.T:
        place = int(np.flatnonzero(row == 3)[0])
        assert (row[place:] == 3).all()
    assert (ended[-1] == 3).all()
    assert not (ended[:-1] == 3).all(axis=1).any()
    for end in (-1, 4):
        with pytest.raises(ValueError, match="generate: end must"):
            generate(model, prompt, 1, end=end)


def test_a_prompt_begins_a_document() -> None:
    assert prompt_ids(ByteVocabulary(), "ab") == [END, 97, 98]
    assert prompt_ids(ByteVocabulary(), "") == [END]
    assert prompt_ids(ByteVocabulary(is_marked=False), "ab") == [97, 98]
    assert prompt_ids(ByteVocabulary(is_marked=False), "") == [10]


def test_a_run_on_documents_trains_resumes_evaluates_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_rows(tmp_path / "rows", ".jsonl.zst", ["one two."] * 200 + ["ba " * 4] * 20)
    sizes = "--model.d-model 16 --model.num-layers 1 --train.steps 60 --train.batch-size 8 --task.window 16"
    train = (
        f"train demo --run run --task.source {source} {sizes} --train.learning-rate 0.02 --train.carry-state"
    )
    assert {piece.text[:1] for piece in read_pieces(source, "text") if piece.is_held_out} == {b"b"}
    assert main(train.split()) == 0
    assert main(["train", "--run", "run", "--resume", "--train.steps", "80"]) == 0
    assert main(["evaluate", "run"]) == 0
    capsys.readouterr()
    assert main(["sample", "run", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "one two.\n"  # to the end of a document, and no mark


# tokenizing


@pytest.fixture
def in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"PORTION_BYTES": 100, "COMMIT_BYTES": 300}.items():
        monkeypatch.setattr(tokenizing, name, size)


class Killed(BaseException):
    """The process ends."""


def kill_after(portions: int, function: Callable[[], object]) -> tuple[int, int]:
    """Call a function that is killed after it appended so many portions; return where it began."""
    begun: list[tuple[int, int]] = []
    append = tokenizing._Writer.append

    def counting(self: Any, portion: Any, ids: Any) -> None:
        begun.append(portion.end)
        append(self, portion, ids)
        if len(begun) == portions:
            self._train.flush()  # what is not committed may be on the disk or not
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing._Writer, "append", counting)
        with pytest.raises(Killed):
            function()
    return begun[0]


@pytest.mark.parametrize("form", ["folder", ".jsonl"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_neither_portions_nor_pieces_show(
    form: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_form(form, tmp_path / "rows")
    whole = tokenize(find_corpus(str(source)), vocabulary)
    shutil.rmtree(cache_folder())
    monkeypatch.setattr(tokenizing, "PORTION_BYTES", 900)  # at the end several are being encoded
    monkeypatch.setattr(documents, "PIECE_BYTES", 16)
    found = tokenize(find_corpus(str(source)), vocabulary)
    assert np.array_equal(found.train, whole.train)
    assert np.array_equal(found.val, whole.val)


def test_what_is_read_otherwise_has_tokens_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"a{n}", "content": f"b{n}"}) + "\n" for n in range(60)))
    for column, initial in (("text", "a"), ("content", "b")):
        corpus = read(path, column=column)
        assert {each[0] for each in split(corpus.train) + split(corpus.val)} == {initial}
    folder = write_folder(tmp_path / "texts")
    assert END in read(folder).train
    assert END not in read(folder, is_joined=True).train


@pytest.mark.parametrize("form", ["folder", ".jsonl"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_what_was_written_has_its_digest(
    form: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that another machine's cache is restored with, say, is verified and used."""
    source = write_form(form, tmp_path / "rows")
    corpus = find_corpus(str(source))
    written = tokenize(corpus, vocabulary)
    (checked,) = cache_folder().glob("tokens/*/*/checked.json")
    checked.unlink()
    monkeypatch.setattr(tokens, "write_tokens", None)
    assert tokenize(corpus, vocabulary).sha256 == written.sha256
    assert checked.exists()


@pytest.mark.usefixtures("in_small_portions")
@pytest.mark.parametrize("form", ["folder", *ROW_WRITERS])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_killed_twice_and_resumed_the_bytes_are_the_same(form: str, vocabulary: str, tmp_path: Path) -> None:
    source = write_form(form, tmp_path / "rows")
    corpus = find_corpus(str(source))
    whole = tokenize(corpus, vocabulary)
    (entry,) = cache_folder().glob("tokens/*/*")
    expected = {path.name: path.read_bytes() for path in entry.iterdir() if path.name != "checked.json"}
    shutil.rmtree(cache_folder())
    begun = []
    for portions in (7, 9, 1):
        begun.append(kill_after(portions, lambda: tokenize(corpus, vocabulary)))
        (folder,) = cache_folder().glob("tokens/*/.building-*")
        assert (folder / "progress.json").exists()
    assert begun == sorted(set(begun))
    assert tokenize(corpus, vocabulary).sha256 == whole.sha256
    (entry,) = cache_folder().glob("tokens/*/*")
    found = {path.name: path.read_bytes() for path in entry.iterdir() if path.name != "checked.json"}
    assert found == expected


@pytest.mark.usefixtures("in_small_portions")
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "progress.json").write_text("{"),
        lambda folder: (folder / "tokens.bin").write_bytes(b""),
        lambda folder: (folder / "validation.bin").unlink(),
        lambda folder: (folder / "progress.json").write_text('{"file":0,"pieces":0,"train":-2,"val":0}'),
    ],
)
def test_what_was_damaged_meanwhile_is_begun_anew(damage: Callable[[Path], object], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "texts")
    whole = read(source)
    shutil.rmtree(cache_folder())
    kill_after(9, lambda: read(source))
    (folder,) = cache_folder().glob("tokens/*/.building-*")
    damage(folder)
    assert read(source).sha256 == whole.sha256


@pytest.mark.usefixtures("in_small_portions")
def test_what_a_kill_left_of_an_earlier_state_goes(tmp_path: Path) -> None:
    """That of another text, which may be continued, stays for some days."""
    source, other = write_folder(tmp_path / "texts"), write_folder(tmp_path / "others")
    for each in (source, other):
        kill_after(9, lambda each=each: read(each))
    left = set(cache_folder().glob("tokens/*/.building-*"))
    assert len(left) == 2
    (source / "new.txt").write_text("more")
    read(source)
    (made,) = cache_folder().glob("tokens/*/*/tokens.json")
    assert set(cache_folder().glob("tokens/*/.building-*")) == {
        each for each in left if each.parent != made.parents[1]
    }


@pytest.mark.usefixtures("in_small_portions")
def test_what_was_learned_before_a_kill_is_not_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = find_corpus(str(write_folder(tmp_path / "texts")))
    kill_after(3, lambda: tokenize(corpus, "characters"))
    monkeypatch.setattr(tokenizing, "VOCABULARIES", {})
    assert "é" in tokenize(corpus, "characters").vocabulary.to_dict()["characters"]


@pytest.mark.parametrize("form", ["folder", ".jsonl", ".JSONL.gz"])
def test_a_disk_that_is_too_small_is_noticed_before(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["some text that goes on. " * 400] * 40
    source = write_form(form, tmp_path / "r", texts)
    needed = 2 * sum(map(len, texts))
    written = []
    monkeypatch.setattr(tokenizing._Writer, "append", lambda self, *_: written.append(1))
    for free in (0.5, 0.99, 1.1):  # for a while some of it is there twice
        usage = shutil.disk_usage(tmp_path)._replace(free=round(free * needed))
        monkeypatch.setattr(tokenizing.shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(
            OSError, match=r"cannot write .* need about 0\.0 GB, and the disk has 0\.0 GB left"
        ):
            read(source)
    assert not written
    corpus = find_corpus(str(source))
    assert tokenizing._estimate(corpus, ByteVocabulary()) == pytest.approx(needed, rel=0.05)


def test_a_second_process_waits_and_takes_what_the_first_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = find_corpus(str(write_folder(tmp_path / "texts")))
    monkeypatch.setattr(tokens, "_SILENT_WAIT", 0.0)
    said = io.StringIO()  # not capsys: what is written while it reads is lost
    monkeypatch.setattr(sys, "stderr", said)
    entered, go_on = threading.Event(), threading.Event()
    write, made = tokens.write_tokens, []

    def slowly(*arguments: Any) -> Any:
        entered.set()
        go_on.wait(60)
        made.append(1)
        return write(*arguments)

    monkeypatch.setattr(tokens, "write_tokens", slowly)
    found: list[TokenizedCorpus] = []
    threads = [threading.Thread(target=lambda: found.append(tokenize(corpus, "bytes"))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    while "waiting: the same text is being tokenized (in use by process" not in said.getvalue():
        assert threads[1].is_alive()
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert made == [1]
    assert found[0].sha256 == found[1].sha256


def test_long_work_tells_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now: Iterator[float] = iter([100.0, 100.5, 130.0, 140.0, 160.0])
    monkeypatch.setattr("minrnn.tasks.progress.time.monotonic", lambda: next(now))
    with Bar("tokenizing it", 10_000_000_000) as bar:
        for done in (1_000_000_000, 1_150_000_000, 1_200_000_000, 1_300_000_000):
            bar.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing it: 1,150 of 10,000 MB, 5.0 MB/s, 30 min left",
        "tokenizing it: 1,300 of 10,000 MB, 5.0 MB/s, 29 min left",
    ]


def test_marks_are_no_text(tmp_path: Path) -> None:
    """A document that quotes the mark has no mark inside."""
    text = f"before {END_OF_TEXT} after"
    found = read(write_rows(tmp_path / "rows", ".jsonl", [text] * 3))
    assert set(split(found.train if found.train.size else found.val)) == {text}


def test_pieces_name_their_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", ".parquet", TEXTS[:2])
    first, second = read_pieces(path, "text")
    assert isinstance(first, Piece)
    assert (first.origin, second.origin) == (f"{path}, row 1", f"{path}, row 2")
    assert second.place == path.stat().st_size
