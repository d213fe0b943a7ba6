"""Claims: one owner at a time, who is named; nothing that is left over locks anybody out."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from minrnn.files import InUseError, claim, fresh_directory, fresh_file, lock, write_directory, write_json
from minrnn.files import claims as claims_module
from minrnn.files.claims import LOCK_FILE
from minrnn.files.partial import partial_path

HOLDER = r"process \d+ on \S+ since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a program in a process of its own; it imports no more than the room of files."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    lines = []
    for process in processes:
        lines += process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 0
    return lines


HOLD = """
import sys
import time
from pathlib import Path
from minrnn.files import claim
with claim(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_directory_has_one_owner_who_is_named(tmp_path: Path) -> None:
    place = tmp_path / "a" / "run"
    owner = start(HOLD, place)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "claimed\n"
    with pytest.raises(InUseError, match=f"in use by {HOLDER}; wait for it") as refusal, claim(place):
        pass
    assert refusal.value.filename == str(place)
    assert f"process {owner.pid} on" in str(refusal.value)
    (place / "found").write_text("kept")
    owner.communicate(timeout=60)
    with claim(place), pytest.raises(InUseError), claim(place):  # of one process too
        pass
    assert [path.name for path in place.iterdir()] == ["found"]


def test_what_a_killed_owner_leaves_claims_nothing(tmp_path: Path) -> None:
    owner = start(HOLD, tmp_path / "run")
    assert owner.stdout is not None
    owner.stdout.readline()
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=60)
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with claim(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_directories_that_stay_empty_are_removed(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b" / "c"):
        pass
    with fresh_directory(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "was").mkdir()
    with claim(tmp_path / "was"):
        pass
    with fresh_directory(tmp_path / "a" / "b") as place:
        (place / "filled").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "was"]


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_locks_that_is_said_and_nobody_is_locked_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    part = "_open" if fault in (errno.EROFS, errno.EACCES) else "_try_lock"
    monkeypatch.setattr(claims_module, part, fail)
    notes: list[str] = []
    with claim(tmp_path / "run", notes.append), claim(tmp_path / "run"):
        (tmp_path / "run" / "written").touch()
    (note,) = notes
    assert re.search(rf"run cannot be locked \({os.strerror(fault)}\)", note)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "shared.lock"
    with lock(path):
        owner = start(
            "import sys; from pathlib import Path; from minrnn.files import lock\n"
            "with lock(Path(sys.argv[1]), wait=60): print('mine')",
            path,
        )
    assert said([owner]) == ["mine"]
    assert not path.exists()


def test_a_lock_is_had_as_soon_as_it_is_free_and_refused_where_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, holder = tmp_path / "shared.lock", ExitStack()
    holder.enter_context(lock(path))
    with pytest.raises(InUseError, match="in use by process"), lock(path):
        pass
    monkeypatch.setattr(time, "sleep", lambda _: holder.close())  # the holder leaves while the other waits
    with lock(path, wait=60.0):
        assert path.exists()
    assert not path.exists()


COMPETE = """
import os, sys
from pathlib import Path
from minrnn.files import InUseError, claim
place = Path(sys.argv[1])
for _ in range(300):
    try:
        with claim(place / "run"):
            (place / "alone").touch(exist_ok=False)  # fails where two are inside
            (place / "alone").unlink()
            print("won")
    except InUseError:
        pass
"""


def test_four_processes_are_never_inside_at_once(tmp_path: Path) -> None:
    """Each removes the directory and its lock file when it leaves, and another makes them anew."""
    won = said([start(COMPETE, tmp_path) for _ in range(4)])
    assert won
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


FRESH = """
import sys
import time
from pathlib import Path
from minrnn.files import fresh_directory, fresh_file
for _ in range(40):
    with fresh_directory(Path(sys.argv[1], "runs", "demo-20260101-000000")) as place:
        (place / "mine").touch(exist_ok=False)
    print(place)
    print(fresh_file(Path(sys.argv[1], "runs", "bench.json")))
"""


def test_four_processes_that_start_at_once_get_names_of_their_own(tmp_path: Path) -> None:
    names = said([start(FRESH, tmp_path) for _ in range(4)])
    assert len(names) == len(set(names)) == 4 * 40 * 2
    runs = tmp_path / "runs"
    assert {str(path) for path in runs.iterdir()} == set(names)
    assert {"demo-20260101-000000", "demo-20260101-000000-160", "bench.json", "bench-160.json"} <= {
        path.name for path in runs.iterdir()
    }


LEAVE = """
import os, signal, sys
from pathlib import Path
from minrnn.files import write_directory, write_file
with write_file(Path(sys.argv[1], "a.json")) as file, write_directory(Path(sys.argv[1], "last")) as folder:
    file.touch()
    (folder / "part").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_partial_files_of_killed_processes_are_cleared_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    killed = start(LEAVE, tmp_path)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    mine = [partial_path(tmp_path / name) for name in ("a.json", "last")]
    for path in mine:
        path.touch()
    others = [tmp_path / name for name in (".a.json.partial", ".a.json.x-1-y-2.partial", "a.partial")]
    for path in others:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 7
    write_json(tmp_path / "a.json", {})
    with write_directory(tmp_path / "last") as folder:
        (folder / "config.json").touch()
    assert set(tmp_path.iterdir()) == {*mine, *others, tmp_path / "a.json", tmp_path / "last"}


def test_an_old_partial_file_of_another_machine_is_cleared(tmp_path: Path) -> None:
    name = partial_path(tmp_path / "a.json").name
    host = name.split(".")[-2].split("-")[0]
    of_others = {hours: tmp_path / name.replace(host, f"{hours:08d}") for hours in (0, 23, 25, 10_000)}
    for hours, path in of_others.items():
        path.touch()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    write_json(tmp_path / "a.json", {})
    assert [hours for hours, path in of_others.items() if path.exists()] == [0, 23]  # a day is long enough


WRITE = """
import sys
import time
from pathlib import Path
from minrnn.files import write_directory
for turn in range(20):
    with write_directory(Path(sys.argv[1])) as folder:
        for name in ("config.json", "one", "two"):
            (folder / name).write_text(f"{sys.argv[2]}-{turn}")
"""


def test_two_processes_that_write_one_directory_never_leave_a_mixture(tmp_path: Path) -> None:
    writers = [start(WRITE, tmp_path / "last", number) for number in range(2)]
    said(writers)
    texts = {path.name: path.read_text() for path in (tmp_path / "last").iterdir()}
    assert texts.keys() == {"config.json", "one", "two"}
    assert len(set(texts.values())) == 1
    assert texts["one"].endswith("-19")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_fresh_file_has_its_number_before_the_suffix(tmp_path: Path) -> None:
    names = [fresh_file(tmp_path / "bench.json").name for _ in range(3)]
    assert names == ["bench.json", "bench-2.json", "bench-3.json"]


def test_a_lock_file_that_was_removed_after_it_was_opened_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its last holder does: whoever comes next would lock another file of that name."""
    path, try_lock = tmp_path / "shared.lock", claims_module._try_lock
    tries: list[int] = []

    def removed_before(handle: int) -> bool:
        tries.append(handle)
        if len(tries) == 1:
            path.unlink()
        return try_lock(handle)

    monkeypatch.setattr(claims_module, "_try_lock", removed_before)
    with lock(path):
        assert path.exists()
    assert len(tries) == 2


def test_the_lock_file_of_another_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "shared.lock"
    with lock(path):
        path.unlink()
        path.write_text("another's")  # where the folder was removed and made again
    assert path.read_text() == "another's"


@pytest.mark.parametrize("gone", [FileNotFoundError, FileExistsError])
def test_a_directory_that_its_last_owner_is_just_removing_is_claimed_again(
    gone: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = Path.mkdir, []

    def racing(path: Path, *args: Any, **settings: Any) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise gone(errno.ENOENT, "just removed", str(path))
        make(path, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", racing)
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).exists()
    calls.clear()
    monkeypatch.setattr(
        Path, "mkdir", lambda path, *_, **__: calls.append(path) or (_ for _ in ()).throw(gone())
    )
    with pytest.raises(gone), claim(tmp_path / "other"):
        pass
    assert len(calls) == 3


def test_a_partial_file_is_of_a_process_and_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = partial_path(tmp_path / "a.json").name
    pid, token = re.fullmatch(r"\.a\.json\..{8}-(\d+)-(.{8})-\d+\.partial", ours).groups()  # type: ignore[union-attr]
    left = {
        "ours": ours,
        "of an earlier process with our number": ours.replace(token, "01234567"),
        "of another file": ours.replace(token, "01234567").replace("a.json", "b.json"),
        "of another user": ours.replace(f"-{pid}-", "-1-"),
        "of nobody": ours.replace(f"-{pid}-", "-999999999-"),
    }
    for name in left.values():
        (tmp_path / name).touch()

    def kill(number: int, signum: int) -> None:
        raise PermissionError if number == 1 else ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    write_json(tmp_path / "a.json", {})
    kept = [who for who, name in left.items() if (tmp_path / name).exists()]
    assert kept == ["ours", "of another file", "of another user"]
