"""The tests themselves: no deadlines, skips that say why, one order, measures that tell what they should."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from leftovers import differences, shared_state
from order import place

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("*.py"))
EXTRAS = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]

Call = tuple[str, ast.Call]
"""Where it stands, and the call."""


def calls(*names: str) -> Iterator[Call]:
    """Yield the calls in all files of tests to what has one of these names, whatever it is a member of."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
                yield f"{path.relative_to(HERE)}:{node.lineno}", node


def keywords(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}


# --- deadlines -------------------------------------------------------------------------------------------


def test_no_example_has_a_deadline() -> None:
    """The profile has none, nothing else makes or loads one, and no test sets its own."""
    assert settings.get_current_profile_name() == "minrnn"
    assert settings().deadline is None
    homes = {where.split(":")[0] for where, _ in calls("register_profile", "load_profile")}
    assert homes == {"conftest.py", "test_torch_modules.py"}
    found = list(calls("settings"))
    assert len(found) > 10
    assert [where for where, call in found if "deadline" in keywords(call) or call.args] == []


# --- skips -----------------------------------------------------------------------------------------------


def test_skips_say_why() -> None:
    assert [where for where, call in calls("skip") if not call.args and "reason" not in keywords(call)] == []
    found = [*calls("skipif"), *calls("importorskip")]
    assert len(found) > 20
    assert [where for where, call in found if "reason" not in keywords(call)] == []


def test_what_is_not_installed_names_the_extra() -> None:
    """So that CI can tell, where it has installed one, that no test went without."""
    for path in FILES:
        if path != Path(__file__):
            for line in path.read_text(encoding="utf-8").splitlines():
                if "is not installed:" in line:
                    assert re.search(r"is not installed: the extra (\w+)\"", line)[1] in EXTRAS, (
                        f"{path.name}: {line}"
                    )


# --- order and measures ----------------------------------------------------------------------------------

MADE_UP = {
    "conftest.py": "import sys\nsys.path.insert(0, {here!r})\nimport costs, leftovers, order\n"
    "def pytest_configure(config):\n"
    "    for each in (order, costs, leftovers):\n"
    "        each.register(config)\n",
    "test_one.py": "import pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n): pass\n",
    "test_two.py": "import os\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n",
}


def run(folder: Path, *args: str, files: dict[str, str] | None = None, **variables: str) -> str:
    """Run tests that are made up in a process of their own; return what it printed."""
    for name, text in {**MADE_UP, **(files or {})}.items():
        (folder / name).write_text(text.replace("{here!r}", repr(str(HERE))))
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MINRNN_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", *args]
    done = subprocess.run(command, cwd=folder, env=ours | variables, stdout=subprocess.PIPE, text=True)
    return done.stdout


def listed(said: str) -> list[str]:
    return re.findall(r"^(test_\w+\.py::\S+)", said, re.MULTILINE)


def test_an_order_follows_from_its_number(tmp_path: Path) -> None:
    one, again, other = (run(tmp_path, "--collect-only", "-q", MINRNN_ORDER=n) for n in ("1", "1", "2"))
    assert "in the order of MINRNN_ORDER=1\n" in one
    assert listed(one) == listed(again)
    assert sorted(listed(one)) == sorted(listed(other))
    assert len(listed(one)) == 11
    assert listed(one) != listed(other)
    for order in (listed(one), listed(other)):  # a module's tests stay together
        assert len(list(itertools.groupby(order, lambda name: name.split("::")[0]))) == 2
    part = listed(run(tmp_path, "--collect-only", "-q", "-k", "test_one and not 3", MINRNN_ORDER="1"))
    assert part == [name for name in listed(one) if name in part]
    assert len(part) == 7


def test_every_order_is_possible() -> None:
    orders = {tuple(sorted("abc", key=lambda name: place(str(number), name))) for number in range(100)}
    assert len(orders) == 6


def test_processes_of_a_run_have_one_order(tmp_path: Path) -> None:
    """pytest-xdist refuses to run what its workers collected in different orders."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed: the extra dev")
    said = run(tmp_path, "-q", "-n", "2")
    assert re.search(r"in the order of MINRNN_ORDER=\d+\n", said)
    assert "11 passed" in said


LEAVING = """
import os, pytest, torch
import minrnn.ops
@pytest.fixture(scope="module", autouse=True)
def fixture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A", "")
        yield
def test_a(): os.environ["MINRNN_LEFT"] = "1"
def test_b(monkeypatch): monkeypatch.setenv("B", "2")
def test_c(): torch.set_default_dtype(torch.float64)
def test_d(monkeypatch): monkeypatch.setitem(minrnn.ops.GATES, "new", 1)
def test_e(): minrnn.ops.GATES["newer"] = 2
"""


def test_what_a_test_leaves_is_seen(tmp_path: Path) -> None:
    said = run(tmp_path, "-q", files={"test_leaving.py": LEAVING})
    assert "16 passed, 1 error" in said
    assert set(re.findall(r"^(\S+ left .*) changed$", said, re.MULTILINE)) == {
        "test_leaving.py::test_a left the environment's MINRNN_LEFT",
        "test_leaving.py::test_c left torch.get_default_dtype",
        "test_leaving.py::test_e left minrnn.ops.gates.GATES",
    }


def test_what_is_imported_meanwhile_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    import minrnn.ops

    before = shared_state()
    monkeypatch.setitem(sys.modules, "minrnn.made_up", minrnn.ops)
    assert differences(before, shared_state()) == set()
    monkeypatch.delitem(sys.modules, "minrnn.ops")
    assert "the module minrnn.ops" in differences(before, shared_state())


def listed_peaks(said: str) -> dict[str, int]:
    """Return the MiB of each test that a run with MINRNN_COSTS lists."""
    return {name: int(peak) for peak, name in re.findall(r"^ *\d+ MiB of +(\d+) +(\S+)", said, re.MULTILINE)}


HEAVY = """
def test_light(): pass
def test_heavy(): assert len(b"1" * (256 << 20))
def test_lighter(): assert len(b"1" * (1 << 20))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux shows it")
def test_memory_is_bounded_and_named(tmp_path: Path) -> None:
    files = {"test_heavy.py": HEAVY}
    free = run(tmp_path, "-q", files=files, MINRNN_COSTS="14")
    peaks = listed_peaks(free)
    assert len(peaks) == 14
    bound = min(peaks.values()) + 128
    heavy = "test_heavy.py::test_heavy"
    assert peaks[heavy] > bound > peaks["test_heavy.py::test_light"]
    said = run(tmp_path, "-q", files=files, MINRNN_PEAK=str(bound))
    assert "14 passed, 1 error" in said
    assert re.search(rf"^ERROR {heavy}", said, re.MULTILINE)
    assert f"MiB, which MINRNN_PEAK bounds by {bound}" in said


SCATTERED = """
kept = []
def test_scattered():
    blocks = [b"1" * (64 << 10) for _ in range(4096)]
    kept.extend(blocks[::64])  # the heap cannot shrink below the last one
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux shows it")
@pytest.mark.parametrize("order", ["1", "2"])
def test_what_is_freed_is_no_cost_of_later_tests(tmp_path: Path, order: str) -> None:
    said = run(tmp_path, "-q", files={"test_scattered.py": SCATTERED}, MINRNN_COSTS="12", MINRNN_ORDER=order)
    peaks = listed_peaks(said)
    assert len(peaks) == 12
    heavy = peaks.pop("test_scattered.py::test_scattered")
    assert max(peaks.values()) < heavy - 128
