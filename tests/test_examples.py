"""The examples: they import public names, their pages hold what was measured, their commands exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, PAGES, REPOSITORY, imported

import minrnn

SCRIPTS = sorted(EXAMPLES.glob("*/*.py"))
NAMES = sorted(folder.name for folder in EXAMPLES.iterdir() if folder.is_dir() and any(folder.glob("*.*")))
MEASURED = {
    "denoiser": "denoiser/denoise.py",
    "recurrent_dqn": "recurrent_dqn/cartpole.py",
    "recurrent_ppo": "recurrent_ppo/cartpole.py",
    "series": "series/classify.py",
}
"""The scripts that write results, whose table their page holds."""
EXTRAS = {"recurrent_dqn": ("torchrl", "torchrl"), "recurrent_ppo": ("sb3_contrib", "rl")}
"""What a script imports that the package does not require, and the extra that brings it."""

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
every_name = pytest.mark.parametrize("name", NAMES)


def page_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


@every_script
def test_scripts_use_public_names(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("minrnn.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minrnn":
            public = {"minrnn": set(minrnn.__all__), "minrnn.integrations": {"sb3", "torchrl"}}
            assert {alias.name for alias in node.names} <= public[node.module or ""]


@every_script
def test_scripts_are_short(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@every_name
def test_every_example_has_a_page_and_its_commands_exist(name: str) -> None:
    page = page_of(name)
    assert page.startswith("# ")
    assert len(page.splitlines()) <= 120
    lines = [
        shlex.split(line, comments=True)
        for block in re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    named = [word for line in lines for word in line if word.startswith("examples/")]
    assert named
    assert [path for path in named if not (path.endswith(".onnx") or (REPOSITORY / path).exists())] == []


@every_name
def test_a_page_leads_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page_of(name))
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if not (PAGES / target).exists()] == []


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_a_page_holds_the_committed_results(name: str) -> None:
    if name in EXTRAS:
        library, extra = EXTRAS[name]
        pytest.importorskip(library, reason=f"needs the extra {extra}")
    found = sorted((EXAMPLES / name).glob("results*.json"))
    assert found
    with imported(MEASURED[name]) as script:
        for path in found:
            results = json.loads(path.read_text(encoding="utf-8"))
            assert script.table(results["records"]) in page_of(name), path.name


def test_packages_of_npm_are_pinned() -> None:
    for path in EXAMPLES.glob("*/package.json"):
        package = json.loads(path.read_text(encoding="utf-8"))
        versions = {**package["dependencies"], **package["devDependencies"]}
        assert [name for name, version in versions.items() if not re.fullmatch(r"[\d.]+", version)] == []


def test_six_examples() -> None:
    assert NAMES == ["browser", "denoiser", "policy", "recurrent_dqn", "recurrent_ppo", "series"]
