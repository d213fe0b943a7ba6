"""What holds for all tests."""

import gc
import signal
from pathlib import Path

import costs
import leftovers
import order
import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine alone; test_suite.py sees that none has a deadline.
settings.register_profile("minrnn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("minrnn")


def pytest_configure(config: pytest.Config) -> None:
    """Order the tests, measure them, and see that each leaves what it found."""
    # What a shell and nohup do to a job in the background is undone: all processes would ignore signals.
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is not None and signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)
    order.register(config)
    costs.register(config)
    leftovers.register(config)


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what stays for the whole run: torch, and some 13,000 tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all tests that train on text share one cache."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path_factory.getbasetemp() / "minrnn-cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is long enough to train on."""
    path = tmp_path_factory.mktemp("corpus") / "squares.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)), encoding="utf-8")
    return path
