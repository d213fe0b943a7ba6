"""The house stands: who imports whom, where third parties live, and what no file may hold.

Everything is read from the syntax trees of the files that are there, function-level imports included.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

import minrnn
from minrnn.ops.registry import ENGINES
from minrnn.ops.selective.operator import MODULES as SELECTIVE_ENGINES

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "minrnn"

# A room (a package) imports only from floors below its own: docs/architecture.md.
FLOORS = {
    "files": 0,
    "ops": 1,
    "mixers": 2,
    "models": 3,
    "export": 4,
    "distributed": 4,
    "tasks": 4,
    "training": 5,
    "benchmarks": 6,
    "demonstrations": 6,
    "experiments": 7,
    "serving": 7,
    "integrations": 7,
    "cli": 8,
}
ROOF = 9  # the package's own __init__ and __main__

# The one place of each third party; torch is everywhere.
HOMES = {
    "datasets": ("tasks/hub.py",),
    "executorch": ("export/executorch.py",),
    "gymnasium": ("tasks/",),
    "h5py": ("tasks/recordings.py",),
    "huggingface_hub": ("tasks/hub.py",),
    "imageio": ("tasks/film.py",),
    "lm_eval": ("integrations/harness.py",),
    "matplotlib": ("training/log.py", "benchmarks/", "experiments/"),
    "mujoco": ("tasks/environments.py",),
    "numpy": ("tasks/", "demonstrations/", "benchmarks/", "experiments/"),
    "onnx": ("export/onnx.py",),
    "onnxruntime": ("export/onnx.py",),
    "platformdirs": ("tasks/downloads.py",),
    "pooch": ("tasks/downloads.py",),
    "pyarrow": ("tasks/documents.py",),
    "rich": ("cli/", "training/log.py", "benchmarks/", "tasks/downloads.py", "tasks/progress.py"),
    "safetensors": ("models/checkpoint.py",),
    "sb3_contrib": ("demonstrations/trainers.py", "integrations/sb3.py"),
    "stable_baselines3": ("demonstrations/trainers.py",),
    "tensorboard": ("training/log.py",),
    "tensordict": ("integrations/torchrl.py",),
    "tokenizers": ("tasks/subwords.py",),
    "torch": ("",),
    "torchrl": ("integrations/torchrl.py",),
    "transformers": ("integrations/transformers/",),
    "triton": ("ops/triton/", "ops/selective/triton/", "benchmarks/compiled.py"),
    "tyro": ("cli/",),
    "zstandard": ("tasks/documents.py",),
}

NO_ROOMS = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base", "lib", "tools"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Module(NamedTuple):
    """A source file: its dotted name, where it lies below the package, and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def place(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def read_module(path: Path) -> Module:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def room_of(name: str) -> str:
    """Return the room of a dotted name; the package's own files are in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


MODULES = {module.name: module for module in map(read_module, sorted(PACKAGE.rglob("*.py")))}
EXTENSIONS = {  # compiled modules, which have no syntax tree
    f"minrnn.ops.{name}"
    for name in re.findall(
        r"^nanobind_add_module\((\w+)", (REPOSITORY / "CMakeLists.txt").read_text(), re.MULTILINE
    )
}


def imports(module: Module) -> Iterator[str]:
    """Yield the dotted names that a file imports, those that it loads by name included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES or full in EXTENSIONS else base
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "minrnn":
            yield node.value  # the tables ENGINES and COMMANDS name modules that are imported when needed


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """Return what an import is from, dots at its start resolved."""
    if not node.level:
        return node.module or ""
    parents = module.name.split(".") + (["__init__"] if module.is_package else [])
    return ".".join([*parents[: -node.level], *([node.module] if node.module else [])])


def ours(module: Module) -> Iterator[str]:
    return (name for name in imports(module) if name.split(".")[0] == "minrnn")


def third_parties(module: Module) -> Iterator[str]:
    for name in imports(module):
        top = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "minrnn":
            yield top


def each_module(test: object) -> object:
    return pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.place)(test)


# --- rooms -----------------------------------------------------------------------------------------------


def test_every_room_has_a_floor() -> None:
    rooms = {module.room for module in MODULES.values()} - {""}
    assert rooms
    assert rooms <= FLOORS.keys()


@each_module
def test_rooms_import_only_from_floors_below(module: Module) -> None:
    floor = FLOORS.get(module.room, ROOF)
    for target in ours(module):
        assert room_of(target) == module.room or FLOORS.get(room_of(target), ROOF) < floor, (
            f"{module.place} (floor {floor}) imports {target}"
        )


def test_floors_are_seen_through_functions_tables_and_relative_imports() -> None:
    text = (
        'def f():\n    from minrnn.cli import main\nT = {"a": "minrnn.training.loop"}\nfrom ..ops import cpu'
    )
    module = Module("minrnn.mixers.made_up", PACKAGE / "mixers" / "made_up.py", ast.parse(text))
    assert set(imports(module)) == {"minrnn.cli.main", "minrnn.training.loop", "minrnn.ops.cpu"}


@pytest.mark.parametrize("room", sorted({module.room for module in MODULES.values()} - {""}))
def test_no_cycle_inside_a_room(room: str) -> None:
    inside = {name: module for name, module in MODULES.items() if module.room == room}
    graph = {name: {target for target in ours(module) if target in inside} for name, module in inside.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@each_module
def test_names_say_what_is_inside(module: Module) -> None:
    assert not NO_ROOMS & set(module.path.relative_to(PACKAGE).with_suffix("").parts)


@each_module
def test_packages_hold_names_and_tables_only(module: Module) -> None:
    if not module.is_package or module.name == "minrnn":
        return
    for node in module.tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_text or isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign), (
            f"{module.place}:{node.lineno}: put it into a module"
        )


BELOW_THE_BORDER = (
    "minrnn.ops.gated",
    "minrnn.ops.selective.operator",
    "minrnn.ops.cpu",
    "minrnn.ops.memory",
    "minrnn.ops.chunks",
)
"""Registered operators, their backward passes, engines and their allocators: for ops alone."""


@each_module
def test_no_room_above_ops_reaches_past_its_functions(module: Module) -> None:
    if module.room in ("ops", "files"):
        return
    assert not set(ours(module)) & set(BELOW_THE_BORDER)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.ops.minrnn", f"{module.place}:{node.lineno}"


# --- third parties ---------------------------------------------------------------------------------------


@each_module
def test_third_parties_stay_at_home(module: Module) -> None:
    for name in third_parties(module):
        assert name in HOMES, f"{module.place} imports {name}, which has no home yet"
        assert module.place.startswith(HOMES[name]), f"{module.place} imports {name}: see {HOMES[name]}"


def test_third_parties_are_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"], *project["optional-dependencies"].values()
    declared = {
        re.split(r"[^\w-]", entry)[0].lower().replace("-", "_") for group in required for entry in group
    }
    used = {name for module in MODULES.values() for name in third_parties(module)}
    assert used <= declared


def test_only_bindings_know_python() -> None:
    files = {path.name: path.read_text() for path in (REPOSITORY / "csrc").iterdir()}
    bindings = {name for name in files if name.endswith("bind.cpp")}
    includes = r"#include\s*[<\"](Python\.h|nanobind|pybind11|torch|ATen)"
    assert bindings
    assert {name for name, text in files.items() if re.search(includes, text)} == bindings | {"tensor.h"}


# --- what no file may hold -------------------------------------------------------------------------------


@each_module
def test_nothing_is_pickled(module: Module) -> None:
    assert not PICKLES & {name.split(".")[0] for name in imports(module)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), (
                f"{module.place}:{node.lineno}: torch.{node.attr} pickles"
            )


@each_module
def test_no_error_is_swallowed_unseen(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module.place}:{node.lineno}: name the errors"
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            wide = names & {"Exception", "BaseException"}
            assert not wide or always_raises(node), f"{module.place}:{node.lineno}: too wide"


def always_raises(handler: ast.ExceptHandler) -> bool:
    leaves = (ast.Return, ast.Break, ast.Continue)
    return isinstance(handler.body[-1], ast.Raise) and not any(
        isinstance(n, leaves) for n in ast.walk(handler)
    )


@each_module
def test_what_is_public_is_documented(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.place} has no docstring"
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module.place}:{node.lineno}: {node.name} has no docstring"


def is_exempt(kind: type) -> bool:
    """Whether a class is private, or a protocol, whose members its docstring explains."""
    return kind.__name__.startswith("_") or Protocol in kind.__bases__


def undocumented_methods(kind: type) -> list[str]:
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
        and not inspect.getdoc(getattr(kind, name))
    ]


def test_public_methods_are_documented() -> None:
    """A method that overrides one is documented by what it overrides."""
    undocumented = []
    for name in MODULES.keys() - {"minrnn.__main__"}:
        try:
            module = import_module(name)
        except ImportError:  # an engine that this machine lacks, or an extra
            engines = {*(engine[0] for engine in ENGINES.values()), *SELECTIVE_ENGINES.values()}
            place = MODULES[name].place
            assert name in engines or place.startswith((*HOMES["triton"], "integrations/"))
            continue
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == name and not is_exempt(kind):
                undocumented += [f"{name}.{kind.__name__}.{method}" for method in undocumented_methods(kind)]
    assert not undocumented


# --- the package's own names -----------------------------------------------------------------------------


def test_public_names_are_the_ones_declared() -> None:
    """What type checkers see and what is imported when asked for are two lists of the same names."""
    declared = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(MODULES["minrnn"].tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minrnn.")
        for alias in node.names
    }
    assert sorted(declared, key=str) == minrnn.__all__
    assert set(minrnn.__all__) <= set(dir(minrnn))
    for name, (home, original) in declared.items():
        assert name == original
        assert getattr(minrnn, name) is getattr(import_module(home or ""), name)
    with pytest.raises(AttributeError, match="no attribute 'MinGru'"):
        _ = minrnn.MinGru  # type: ignore[attr-defined]


def test_the_version_is_the_installed_ones() -> None:
    assert minrnn.__version__ == importlib.metadata.version("minrnn")


def test_torch_is_imported_only_when_it_is_needed() -> None:
    code = (
        "import sys, minrnn; from minrnn.cli.main import main; status = main(['--help']); "
        "sys.exit(status or sorted({'torch', 'numpy', 'tyro'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
