"""A large folder is tokenized in bounded memory, killed twice and continued, and is the same in the end.

MINRNN_TEXT_MB sets the size of the text, which is the standard library again and again.
MINRNN_TEXT_VOCABULARY is how it is read: bpe or bytes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minrnn.tasks.sources import find_corpus

pytest.importorskip("tokenizers", reason="tokenizers is not installed: the extra text")

MEGABYTES = int(os.environ.get("MINRNN_TEXT_MB", "60"))
VOCABULARY = os.environ.get("MINRNN_TEXT_VOCABULARY", "bpe")
ROWS = 2000  # documents in a file
MOST_MEMORY = 1000  # MB

PROGRAM = """
import json, resource, sys, time
from minrnn.tasks import TextConfig, TextTask
began = time.monotonic()
task = TextTask(TextConfig(sys.argv[1], sys.argv[2]))
usage = resource.getrusage(resource.RUSAGE_SELF)
done = time.monotonic()
task.batch(0, 8, 0)
print(json.dumps({
    "sha256": task.sha256, "tokens": task.train_tokens.size + task.val_tokens.size,
    "seconds": done - began, "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "memory_mb": usage.ru_maxrss / 1e3, "first_batch_seconds": time.monotonic() - done,
}))
"""


def write_texts(folder: Path, megabytes: int) -> None:
    """Write JSON Lines and files of text in turns; each document has its number, so no two are equal."""
    texts = [path.read_text(encoding="utf-8") for path in find_corpus("python").files]
    folder.mkdir()
    size = number = 0
    while size < megabytes * 1e6:
        with (folder / f"{number:08}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(ROWS):
                text = f"# {number}\n{texts[number % len(texts)]}"
                number += 1
                size += file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 1e6:
                    break
        text = f"# {number}\n{texts[number % len(texts)]}"
        (folder / f"{number:08}.txt").write_text(text, encoding="utf-8")


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MINRNN_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), VOCABULARY],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def kill_after_progress(process: subprocess.Popen[str], cache: Path, more_than: int) -> int:
    """Kill a process once it has committed more; return how much."""
    while process.poll() is None:
        time.sleep(0.05)
        for path in cache.glob("tokens/*/.building-*/progress.json"):
            committed = json.loads(path.read_text())["train"]
            if committed > more_than:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                return int(committed)
    pytest.fail("it ended before it was killed; MINRNN_TEXT_MB must be larger")


@pytest.mark.timeout(24 * 3600)
def test_a_large_folder_is_tokenized_killed_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write_texts(folder, MEGABYTES)
    whole = finish(start(folder, tmp_path / "whole"))
    committed = [0]
    for share in (0.0, 0.4):
        more_than = max(committed[-1], int(share * 2 * whole["tokens"]))
        process = start(folder, tmp_path / "parts")
        committed.append(kill_after_progress(process, tmp_path / "parts", more_than))
    parts = finish(start(folder, tmp_path / "parts"))
    assert committed[1] < committed[2]
    assert parts["sha256"] == whole["sha256"]
    (one,), (two,) = ((tmp_path / name).glob("tokens/*/*/tokens.bin") for name in ("whole", "parts"))
    assert one.stat().st_size == 2 * whole["tokens"]
    assert subprocess.run(["cmp", str(one), str(two)]).returncode == 0
    again = finish(start(folder, tmp_path / "whole"))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(
        f"\n{size:,.0f} MB: {whole['seconds']:.0f} s, {size / whole['cpu_seconds']:.2f} MB per CPU second, "
        f"{whole['memory_mb']:.0f} MB of memory; again from the cache {again['seconds']:.1f} s"
    )
    assert max(each["memory_mb"] for each in (whole, parts, again)) < MOST_MEMORY
