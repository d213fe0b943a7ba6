"""What holds for all tests."""

import signal

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine alone.
settings.register_profile("minrnn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("minrnn")


def pytest_configure(config: pytest.Config) -> None:
    """Undo what a shell does to a job in the background, whose processes would all ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
