"""Installing: constraints cover what pyproject.toml asks for; a missing extension is explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]


def requirements() -> Iterator[Requirement]:
    """Yield what the package, its extras and its build ask for."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    groups = settings["project"]["optional-dependencies"].values()
    for group in (settings["build-system"]["requires"], settings["project"]["dependencies"], *groups):
        yield from map(Requirement, group)


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_constraints_pin_whatever_is_asked_for() -> None:
    pinned = pins()
    assert list(pinned) == sorted(map(canonicalize_name, pinned))
    for requirement in requirements():
        if requirement.name != "minrnn":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_pin_the_tools_that_make_builds_with() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (tools,) = re.findall(r"^BUILD_TOOLS := (.*)$", makefile, re.MULTILINE)
    assert set(tools.split()) <= pins().keys()


def test_every_extra_is_in_the_page() -> None:
    page = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = re.findall(r"^\| `pip install '\.\[(\w+)\]'` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(project["optional-dependencies"].keys() - {"dev"})


def test_commands_that_install_extras_can_be_pasted_into_any_shell() -> None:
    """zsh takes brackets that are not quoted for a pattern; what they name is declared."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    declared = settings["project"]["optional-dependencies"].keys() | {"{extra}"}  # of an f-string
    found = []
    for folder in ("src", "docs", "examples"):
        for path in (REPOSITORY / folder).rglob("*.*"):
            if path.suffix in {".py", ".md"}:
                named = re.findall(r"(\S?)minrnn\[([^\]]*)\](\S?)", path.read_text(encoding="utf-8"))
                found += [(path.name, *match) for match in named]
    assert len(found) > 15
    for name, before, extras, after in found:
        assert (before, after) == ("'", "'"), name
        assert set(extras.split(",")) <= declared, name


def test_without_the_extension_and_triton_the_package_works_and_says_why() -> None:
    code = """
import sys
sys.modules["minrnn.ops._cpu"] = None  # as if not compiled
sys.modules["triton"] = None  # as if not installed
import torch, minrnn
x = torch.randn(2, 5, 4, requires_grad=True)
for layer in (minrnn.MinGRU(4, 3), minrnn.MIXERS["mamba"](4, 3)):
    layer(x)[0].sum().backward()
compiled, _, portable, _ = minrnn.engines()
assert not compiled.serves and portable.serves
print(compiled.detail)
try:
    import minrnn.ops.triton.engine
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"not compiled.*C\+\+ compiler.*reinstall", done.stdout), done.stdout
    assert "Triton is not installed; install it with: pip install 'minrnn[gpu]'" in done.stdout


PACKAGE = REPOSITORY / "src" / "minrnn"

Contents = dict[str, object]
"""Public names: a module's or a class's own contents, a function's number of parameters, None for a value."""


def stubbed(body: list[ast.stmt], classes: dict[str, list[ast.stmt]]) -> Contents:
    found: Contents = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = len(node.args.posonlyargs)
        elif isinstance(node, ast.AnnAssign):
            names = [n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name) and n.id in classes]
            found[ast.unparse(node.target)] = stubbed(classes[names[0]], classes) if names else None
    return found


def compiled(holder: ModuleType | type) -> Contents:
    found: Contents = {}
    for name, value in vars(holder).items():
        if name.startswith("_") and (name != "__init__" or isinstance(holder, ModuleType)):
            continue
        if isinstance(value, ModuleType | type):
            found[name] = compiled(value)
        elif callable(value):
            (signature,) = value.__nb_signature__
            (function,) = ast.parse(f"{signature[0]}: ...").body
            assert isinstance(function, ast.FunctionDef)
            found[name] = len(function.args.posonlyargs + function.args.args)
        else:
            found[name] = None
    return found


def test_the_stub_describes_the_extension() -> None:
    name = "minrnn.ops._cpu"
    _cpu = pytest.importorskip(name, reason="no compiled engine", exc_type=ModuleNotFoundError)
    tree = ast.parse((PACKAGE / "ops" / "_cpu.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    assert stubbed(tree.body, classes) == compiled(_cpu)


def package_files() -> set[str]:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE.parent).as_posix() for path in files if path.suffix != ".so"}


def build(hook: str, folder: Path) -> Path:
    """Build a distribution by the hook that pip calls, from the build tools that constraints.txt pins."""
    code = (
        "import sys, scikit_build_core.build as backend\n"
        "name = getattr(backend, sys.argv[1])(sys.argv[2], {'wheel.cmake': 'false', 'wheel.py-api': 'py3'})\n"
        "print('built', name)"
    )
    command = [sys.executable, "-c", code, hook, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return folder / done.stdout.rpartition("built ")[2].strip()


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_wheel", tmp_path)) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == package_files()


def test_an_sdist_holds_every_file_of_the_package_and_what_builds_it(tmp_path: Path) -> None:
    path = build("build_sdist", tmp_path)
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (REPOSITORY / "csrc").iterdir()}
    assert {name for name in found if name.startswith("src/")} == {f"src/{name}" for name in package_files()}
    assert found >= sources | {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md"}
    assert not {name.partition("/")[0] for name in found} & {"tests", "results", "docs", "benchmarks", ".ci"}
