"""Data sets by name, streamed from a hub in this process: documents, cache, kills, errors."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serving

from minrnn.cli.main import main
from minrnn.tasks import TextConfig, TextTask, tokenizing
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.hub import UnreachableError
from minrnn.tasks.sources import find_corpus
from minrnn.tasks.tokens import TokenizedCorpus, tokenize

datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra datasets")

END = 256
TEXTS = [f"Document {n}:\n{'word ' * (n % 7)}née {n * n}\n" for n in range(60)]
SUBSETS = """configs:
- config_name: one
  data_files: one.jsonl
- config_name: two
  data_files: two.jsonl
"""
SIZES = """dataset_info:
- config_name: one
  features:
  - name: id
    dtype: int64
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 2
    num_examples: 1
"""


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Keep the tests out of the user's cache and away from the real hub."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as running:
        settings = {
            "huggingface_hub.constants.ENDPOINT": running.url,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": running.url
            + "/{repo_id}/resolve/{revision}/{filename}",
            "huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "hub"),
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            "datasets.config.HF_ENDPOINT": running.url,
            "datasets.config.HF_HUB_OFFLINE": False,
            "datasets.config.HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(name, value)
        yield running


def as_lines(texts: list[str], column: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, column: text}).encode() + b"\n" for n, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow

    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=7)


def publish(hub: Hub, folder: Path, files: dict[str, list[str]], name: str = "me/some") -> str:
    """Write files of a data set and serve them; return the source."""
    for file, texts in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            write_parquet(path, texts)
        else:
            lines = as_lines(texts)
            path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    hub.repositories[name] = folder
    return f"hf://datasets/{name}"


def in_subsets(hub: Hub, folder: Path, card: str) -> str:
    source = publish(hub, folder, {"one.jsonl": ["uno"], "two.jsonl": ["due", "tre"]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return source


def in_shards(texts: list[str] = TEXTS, count: int = 4) -> dict[str, list[str]]:
    return {f"data/train-0000{n}-of-0000{count}.parquet": texts[15 * n : 15 * n + 15] for n in range(count)}


def read(source: str, vocabulary: str = "bytes", **options: Any) -> TokenizedCorpus:
    return tokenize(find_corpus(source, **options), vocabulary)


def split(ids: Any) -> list[str]:
    """Return the documents between marks."""
    texts = bytes(0 if each == END else each for each in ids).split(b"\0")
    assert texts[0] == texts[-1] == b""
    return [text.decode() for text in texts[1:-1]]


# documents


def test_splits_are_trained_and_validated_on_in_their_order(hub: Hub, tmp_path: Path) -> None:
    files = in_shards() | {
        "data/validation-00000-of-00001.parquet": ["une", "deux", "trois"],
        "data/test-00000-of-00001.parquet": ["never"],
    }
    found = read(publish(hub, tmp_path / "set", files))
    assert split(found.train) == TEXTS
    assert split(found.val) == ["une", "deux", "trois"]


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_without_a_validation_split_a_data_set_is_read_as_its_files(
    form: str, vocabulary: str, hub: Hub, tmp_path: Path
) -> None:
    source = publish(hub, tmp_path / "set", {form: ["", *TEXTS]})
    found, local = (read(each, vocabulary) for each in (source, str(tmp_path / "set" / form)))
    assert found.sha256 == local.sha256
    assert split(read(source).val) == split(read(str(tmp_path / "set" / form)).val) != []


def test_joined_documents_have_no_marks(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", {"train.jsonl": TEXTS, "validation.jsonl": ["a", "b"]})
    found = read(source, is_joined=True)
    assert found.train.tobytes().decode() == "".join(TEXTS)
    assert found.val.tobytes() == b"ab"


def test_a_subset_is_named_after_a_colon(hub: Hub, tmp_path: Path) -> None:
    source = in_subsets(hub, tmp_path / "set", SUBSETS)
    assert split(read(f"{source}:one").train) == ["uno"]
    assert split(read(f"{source}:two").train) == ["due", "tre"]
    with pytest.raises(ValueError, match=r"me/some' cannot be read: Config name is missing\..*'one', 'two'"):
        read(source)


def test_sizes_are_the_cards_or_the_files(hub: Hub, tmp_path: Path) -> None:
    source = in_subsets(hub, tmp_path / "set", SUBSETS + SIZES)
    assert find_corpus(f"{source}:one").sizes == (2,)
    assert find_corpus(f"{source}:two").sizes == ((tmp_path / "set" / "two.jsonl").stat().st_size,)
    other = find_corpus(publish(hub, tmp_path / "other", in_shards(), "me/other"))
    size = sum(file.stat().st_size for file in (tmp_path / "other" / "data").iterdir())
    assert len(other.sizes) == 4
    assert size <= other.size < size + 4
    assert {piece.place for piece in find_corpus(f"{source}:one").read(0)} == {2}
    last = list(other.read(3))[-1]
    assert last.place == min(sum(len(text.encode()) for text in TEXTS[45:]), other.sizes[3])
    assert last.origin == "hf://datasets/me/other, train, shard 4, row 15"


def test_columns_may_be_known_from_rows_only(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", {})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.json").write_text(json.dumps([{"id": 1, "text": text} for text in TEXTS]))
    found = read(source)
    assert sorted(split(found.train) + split(found.val)) == sorted(TEXTS)
    with pytest.raises(ValueError, match="must have text in 'body', got id, text"):
        read(source, column="body")


# the cache


def test_tokens_are_kept_until_the_data_set_changes(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", {"train.jsonl": TEXTS[:5], "validation.jsonl": ["a"]})
    assert find_corpus(source).state == [hub.commit("me/some")]
    first = read(source)
    assert hub.delivered()
    assert read(source).sha256 == first.sha256
    assert not hub.delivered()
    publish(hub, tmp_path / "set", {"train.jsonl": TEXTS[:6]})
    assert split(read(source).train) == TEXTS[:6]
    (entry,) = cache_folder().glob("tokens/*/*")
    assert entry.stat().st_mode & 0o077 == 0  # it may be private on the hub


def test_subsets_and_columns_do_not_share_tokens(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "set" / "rows.jsonl"
    publish(hub, tmp_path / "set", {"rows.jsonl": TEXTS})
    path.write_text('{"text": "one", "body": "two"}\n' * 3)
    source = "hf://datasets/me/some"
    assert split(read(source).train) == ["one"] * 3
    assert split(read(source, column="body").train) == ["two"] * 3
    assert split(read(f"{source}:default").train) == ["one"] * 3
    assert len(list(cache_folder().glob("tokens/*"))) == 3


def test_a_commit_is_found_again_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", in_shards())
    pinned = f"{source}@{hub.commit('me/some')}"
    found = read(pinned)
    hub.asked.clear()
    del hub.repositories["me/some"]
    assert read(pinned).sha256 == found.sha256
    assert hub.asked == []
    with pytest.raises(ValueError, match="'hf://datasets/me/some' cannot be read: Dataset 'me/some' doesn't"):
        read(source)


class Killed(BaseException):
    """The process ends."""


def kill_after(portions: int, function: Callable[[], object]) -> None:
    """Call a function that is killed after it appended so many portions."""
    append, left = tokenizing._Writer.append, [portions]

    def counting(self: Any, portion: Any, ids: Any) -> None:
        append(self, portion, ids)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing._Writer, "append", counting)
        with pytest.raises(Killed):
            function()


def test_killed_and_resumed_the_bytes_are_the_same(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"PORTION_BYTES": 100, "COMMIT_BYTES": 300, "SAMPLED_FILES": 1}.items():
        monkeypatch.setattr(tokenizing, name, size)
    source = publish(hub, tmp_path / "set", in_shards())
    whole = read(source)
    shutil.rmtree(cache_folder())
    kill_after(13, lambda: read(source))
    hub.is_failing = True
    monkeypatch.setattr("datasets.config.STREAMING_READ_MAX_RETRIES", 1)
    with pytest.raises(UnreachableError, match=r"^'hf://datasets/me/some' cannot be reached: .*403"):
        read(source)
    hub.is_failing = False
    hub.delivered()
    resumed = read(source)
    assert resumed.sha256 == whole.sha256
    names = [name[:11] for name in hub.delivered()]
    assert "train-00001" not in names  # the first is read for its columns and the estimate
    assert names[-2:] == ["train-00002", "train-00003"]


# errors


@pytest.mark.parametrize(
    ("suffix", "error", "message"),
    [
        ("-else", ValueError, "'hf://datasets/me/some-else' cannot be read: Dataset 'me/some-else' doesn't"),
        ("@v9", ValueError, "'hf://datasets/me/some@v9' cannot be read: Revision 'v9' doesn't exist"),
        (":three", ValueError, "cannot be read: BuilderConfig 'three' not found"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    suffix: str, error: type[Exception], message: str, hub: Hub, tmp_path: Path
) -> None:
    source = publish(hub, tmp_path / "set", {"rows.jsonl": TEXTS})
    with pytest.raises(error, match=message) as raised:
        read(source + suffix)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.parquet"])
def test_a_missing_column_is_named(form: str, hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", {form: TEXTS})
    with pytest.raises(
        ValueError, match=r"me/some, train, must have text in 'body', got id, text; task\.text_column names"
    ):
        read(source, column="body")
    with pytest.raises(ValueError, match=r"me/some, train, shard 1, row 1 must have text in 'id', got int"):
        read(source, column="id")


def test_a_data_set_without_training_part_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", {"test.jsonl": TEXTS, "validation.jsonl": TEXTS})
    with pytest.raises(ValueError, match="cannot be read: it has no split 'train', but 'validation', 'test'"):
        read(source)


def test_a_damaged_file_is_named_with_its_data_set(hub: Hub, tmp_path: Path) -> None:
    source = publish(hub, tmp_path / "set", in_shards())
    (tmp_path / "set" / "data" / "train-00002-of-00004.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"^find_corpus: 'hf://datasets/me/some' cannot be read: .*arquet"):
        read(source)


def test_a_hub_that_is_not_there_is_a_failure_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert main(["train", "demo", "--task.source", "hf://datasets/me/some"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'hf://datasets/me/some' cannot be reached: Couldn't reach" in line


def test_a_hub_that_does_not_answer_is_out_of_reach(hub: Hub) -> None:
    hub.is_silent = True
    with pytest.raises(
        UnreachableError, match="'hf://datasets/me/some' cannot be reached: Server disconnected"
    ):
        read("hf://datasets/me/some")


# learning


def test_a_run_is_trained_and_evaluated_on_a_data_set(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = publish(hub, tmp_path / "set", in_shards())
    sizes = "--model.d-model 16 --model.num-layers 1 --train.steps 3 --train.batch-size 4 --task.window 16"
    assert main(f"train demo --run run --task.source {source} {sizes}".split()) == 0
    assert main(["evaluate", "run"]) == 0
    task = TextTask(TextConfig(source, window=16))
    assert task.describe().startswith(f"{source}: {task.train_tokens.size:,} bytes to train on")
