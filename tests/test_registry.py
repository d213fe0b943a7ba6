"""Which engine serves which device, what MINRNN_ENGINE forces, and what is said of those that cannot load."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from minrnn.ops import engines, portable, registry
from minrnn.ops.registry import ENGINES, forced, implementations, load, serving

MODULES = {name: module for name, (module, _, _) in ENGINES.items()}
HAVE = not isinstance(load("cpp"), ImportError)


@pytest.fixture(params=["without", "a compiler that failed"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the compiled engine can load; without a GPU in any case."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if request.param == "without":
        absent = ("minrnn.ops.no_such_engine", "cpu", "CPU")
        monkeypatch.setitem(registry.ENGINES, "cpp", absent)
        return False
    return HAVE


def found(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> dict[str, Any]:
    """The implementations that are registered, each by the name of its module."""
    if chosen is None:
        monkeypatch.delenv("MINRNN_ENGINE", raising=False)
    else:
        monkeypatch.setenv("MINRNN_ENGINE", chosen)

    def functions(module: ModuleType) -> Any:
        name = module.__name__.rpartition(".")[2]
        return lambda: f"{name} forward", lambda: f"{name} backward"

    modules = {name: module for name, (module, _, _) in registry.ENGINES.items()}
    return {key: tuple(f() for f in pair) for key, pair in implementations(modules, functions).items()}


REFERENCE = ("reference forward", "reference backward")
PORTABLE = ("portable forward", "portable backward")


def test_each_engine_serves_its_device(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable one serves every other, and those whose engine cannot load."""
    for chosen in (None, ""):
        expected = {"CUDA": PORTABLE, "CompositeExplicitAutograd": PORTABLE}
        if compiled:
            expected["CPU"] = ("cpu forward", "cpu backward")
        assert found(monkeypatch, chosen) == expected


def test_an_engine_that_is_forced_serves_alone(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the portable one, which other devices need; one that cannot load is an error."""
    assert found(monkeypatch, "reference") == {"CompositeExplicitAutograd": REFERENCE}
    assert found(monkeypatch, "portable") == {"CompositeExplicitAutograd": PORTABLE}
    with pytest.raises(
        RuntimeError, match="MINRNN_ENGINE=triton, but that engine cannot load: torch finds no CUDA device"
    ):
        found(monkeypatch, "triton")
    if compiled:
        keys = {"CPU": ("cpu forward", "cpu backward"), "CompositeExplicitAutograd": PORTABLE}
        assert found(monkeypatch, "cpp") == keys
    else:
        with pytest.raises(RuntimeError, match="MINRNN_ENGINE=cpp, but that engine cannot load: No module"):
            found(monkeypatch, "cpp")


def test_names_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENGINES, ""):
        monkeypatch.setenv("MINRNN_ENGINE", name)
        assert forced() == (name or None)
    monkeypatch.delenv("MINRNN_ENGINE")
    assert forced() is None
    monkeypatch.setenv("MINRNN_ENGINE", "tritn")
    with pytest.raises(
        ValueError,
        match=r"^MINRNN_ENGINE must be one of cpp, triton, portable, reference, got 'tritn'; did you mean",
    ):
        forced()


def test_what_is_said_of_each(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, *ENGINES):
        if chosen is None:
            monkeypatch.delenv("MINRNN_ENGINE", raising=False)
        else:
            monkeypatch.setenv("MINRNN_ENGINE", chosen)
        told = {engine.name: (engine.device, engine.serves, engine.detail) for engine in engines()}
        assert told["triton"] == ("cuda", False, "not available: torch finds no CUDA device")
        assert told["portable"][:2] == ("any", chosen != "reference")
        assert told["reference"][:2] == ("any", chosen == "reference")
        if chosen is None:
            assert told["reference"][2].endswith("; MINRNN_ENGINE=reference uses it")
        device, serves, detail = told["cpp"]
        assert device == "cpu"
        if not compiled:
            assert (serves, detail[:14]) == (False, "not available:")
        elif chosen in (None, "cpp"):
            assert (serves, detail[:12]) == (True, "compiled C++")
        else:
            assert (serves, detail) == (False, f"disabled by MINRNN_ENGINE={chosen}")


def test_an_engine_is_looked_for_where_its_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(load("triton")) == "torch finds no CUDA device"
    assert serving("triton", MODULES) is portable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(registry.ENGINES, "triton", ("minrnn.ops.no_such_engine", "cuda", "CUDA"))
    assert "no_such_engine" in str(load("triton"))
    assert serving("triton", MODULES) is portable


def test_no_engine_is_chosen_where_it_has_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ROCm build of torch calls its devices cuda."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.delenv("MINRNN_ENGINE", raising=False)
    assert str(load("triton")) == "it has not been run on ROCm; MINRNN_ENGINE=triton uses it there"
    assert serving("triton", MODULES) is portable
    monkeypatch.setenv("MINRNN_ENGINE", "triton")
    assert "ROCm" not in str(load("triton"))
