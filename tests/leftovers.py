"""What all tests share, and each module of tests must leave as it found it: or their order would matter.

A difference is looked for when a module's last fixture is gone, and the tests are named that made it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Generator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

State = dict[str, Any]

READ = ("MINRNN_", "OMP_", "PYTHON", "PATH", "HOME", "TMP", "XDG_", "CUDA_")
"""How the environment variables are called that tests or minrnn read; libraries set others, for good."""
SETTINGS = {
    "torch": (
        "are_deterministic_algorithms_enabled",
        "get_default_device",
        "get_default_dtype",
        "get_float32_matmul_precision",
        "get_num_threads",
        "is_grad_enabled",
    ),
    "numpy": ("geterr",),
    "hypothesis": ("settings.get_current_profile_name",),
}
"""Functions that return what is set."""

SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE", "SIGUSR1", "SIGXFSZ")
TABLES = "minrnn."
"""Of these modules every dict in capitals is a table, which tests add to or take from."""

_matching: dict[str, tuple[Any, list[str]]] = {}


def shared_state() -> State:
    """Return what a test could leave changed, by name; of libraries, where they are imported."""
    state: State = {"the working directory": Path.cwd(), "sys.path": list(sys.path)}
    state |= {
        f"the environment's {name}": value for name, value in os.environ.items() if name.startswith(READ)
    }
    state |= {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}
    for name, settings in SETTINGS.items():
        if module := sys.modules.get(name):
            state |= {f"{name}.{setting}": attrgetter(setting)(module)() for setting in settings}
    seen = set()  # the same table has as many names as modules import it
    for name in modules():
        if module := sys.modules.get(name):
            state[f"the module {name}"] = module
            for key in capitals(module):
                table = getattr(module, key)
                if type(table) is dict and id(table) not in seen:
                    seen.add(id(table))
                    state[f"{name}.{key}"] = dict(table)
    return state


# Both are asked for before and after each test, which may take less time than to look through all names. They
# look again where the number of names has changed, or the last of them.


def modules() -> list[str]:
    """Return the names of minrnn's modules that are imported."""
    return matching("", sys.modules, lambda name: name.startswith(TABLES))


def capitals(module: ModuleType) -> list[str]:
    """Return what a module calls in capitals."""
    return matching(module.__name__, vars(module), str.isupper)


def matching(place: str, names: dict[str, Any], wanted: Callable[[str], bool]) -> list[str]:
    state = id(names), len(names), next(reversed(names), "")
    before, found = _matching.get(place, (None, []))
    if before != state:
        found = [name for name in list(names) if wanted(name)]
        _matching[place] = state, found
    return found


def differences(before: State, after: State) -> set[str]:
    """Return the names of what changed; modules that were imported meanwhile, and their tables, did not."""
    changed = {name for name in before.keys() & after.keys() if not same(before[name], after[name])}
    changed |= before.keys() - after.keys()
    return changed | {name for name in after.keys() - before.keys() if name.startswith("the environment's")}


def same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, ModuleType) and one == other)


def seed(number: int = 0) -> None:
    """Let what a test draws without a generator of its own be the same wherever in a run it stands."""
    random.seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(number)  # torch.manual_seed notes where it was called, for CUDA


def module_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


class Keeper:
    """Compares what is shared before and after the tests of a module."""

    def __init__(self) -> None:
        self.module, self.last = "", True
        self.first: State = {}
        self.before: State = {}
        self.who: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, bool, bool]:
        seed()
        self.before = shared_state()
        if self.module != (module := module_of(item)):
            self.module, self.first, self.who = module, self.before, {}
        self.last = nextitem is None or module_of(nextitem) != module
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when != "teardown":
            return report
        after = shared_state()
        self.who |= {name: item.nodeid for name in differences(self.before, after) if name not in self.who}
        if self.last and report.passed and (left := differences(self.first, after)):
            report.outcome = "failed"
            report.longrepr = "\n".join(f"{self.who.get(name)} left {name} changed" for name in sorted(left))
        return report


def register(config: pytest.Config) -> None:
    """Let a run of pytest compare what tests share."""
    config.pluginmanager.register(Keeper(), "keeper")
