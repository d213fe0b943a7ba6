"""The README and the pages that show commands: what they run works, and what they name is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from episode_files import MISSING, cannot_draw

from minrnn.benchmarks import BENCHES
from minrnn.cli.main import COMMANDS, main
from minrnn.experiments import EXPERIMENTS

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TRAINING = (REPOSITORY / "docs" / "tasks-and-training.md").read_text(encoding="utf-8")
OWN_TEXT = (REPOSITORY / "docs" / "your-text.md").read_text(encoding="utf-8")
POLICIES = (REPOSITORY / "docs" / "policies.md").read_text(encoding="utf-8")
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")

TINY = {  # what makes a command quick, after what the page gives it
    "train": "--task.source corpus.txt --task.window 8 --model.d-model 8 --model.num-layers 1 "
    "--train.steps 2 --train.batch-size 2 --train.warmup-steps 1 --train.device cpu",
    "evaluate": "--max-tokens 50",
    "sample": "--tokens 5",
    "engines": "",
}
TINY_POLICY = {
    "make-data": "--algorithm ars --training-steps 1 --steps 300",
    "train": "--model.d-model 8 --model.num-layers 1 --train.steps 2 --train.batch-size 2 "
    "--train.warmup-steps 1 --train.device cpu",
    "act": "--episodes 1",
}


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def shell_lines(program: str, text: str = README) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh", text) for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


def acts(command: list[str]) -> bool:
    return command[0] in ("make-data", "act") or command[:2] == ["train", "decisions"]


def map_entries() -> list[Path]:
    (block,) = [block for block in blocks("", ARCHITECTURE) if "src/minrnn/ops/" in block]
    return [REPOSITORY / line.split()[0] for line in block.splitlines()]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_python_runs() -> None:
    (block,) = blocks("python")
    assert len([line for line in block.splitlines() if line]) <= 8
    exec(compile(block, "README.md", "exec"), {})


def test_its_make_commands_are_targets_that_do_what_it_says() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = {"demo": "bin/minrnn demo", "test": "bin/python -m pytest"}
    assert shell_lines("make") == [[target] for target in done]
    for target, command in done.items():
        dry_run = subprocess.run(
            ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert command in dry_run.stdout
    assert "demo" in COMMANDS


def test_its_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("ROMEO: but soft, what light\n" * 30, encoding="utf-8")
    commands = [
        command for command in shell_lines("minrnn", README + TRAINING + OWN_TEXT) if not acts(command)
    ]
    assert {arguments[0] for arguments in commands} >= TINY.keys()
    for arguments in commands:
        verb = arguments[0]
        if verb not in TINY:
            with pytest.raises(SystemExit, match=r"^0$"):
                main([verb, "--help"])
        elif "--resume" in arguments:  # whose settings are those of the run
            assert main(arguments) == 0
        else:
            if verb == "train":  # two pages train the same run
                shutil.rmtree("runs", ignore_errors=True)
            assert main([*arguments, *shlex.split(TINY[verb])]) == 0
    assert "ROMEO:" in capsys.readouterr().out


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_its_policy_hops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    commands = [command for command in shell_lines("minrnn", POLICIES) if acts(command)]
    assert [command for command in shell_lines("minrnn") if acts(command)] == commands[-1:]
    assert [arguments[0] for arguments in commands] == list(TINY_POLICY)
    undrawn = ""
    for arguments in commands:
        if "--record" in arguments and (undrawn := cannot_draw()):
            arguments = arguments[: arguments.index("--record")]
        assert main([*arguments, *shlex.split(TINY_POLICY[arguments[0]])]) == 0
    assert "over 1 episode, target" in capsys.readouterr().out
    if undrawn:
        pytest.skip(undrawn)
    assert (tmp_path / "hop.png").read_bytes().startswith(b"\x89PNG")


def test_its_map_names_what_is_there() -> None:
    entries = map_entries()
    assert [entry for entry in entries if not entry.exists()] == []
    rooms = {folder.parent for folder in (REPOSITORY / "src" / "minrnn").rglob("__init__.py")}
    assert rooms - {REPOSITORY / "src" / "minrnn"} <= set(entries)


def test_every_recipe_and_verb_is_named_as_it_is() -> None:
    recipes = [path.stem for path in (REPOSITORY / "src" / "minrnn" / "recipes").glob("*.toml")]
    assert recipes
    assert all(f"`{name}`" in TRAINING for name in recipes)
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert set(re.findall(r"`minrnn ([a-z][a-z-]*)", text)) <= COMMANDS.keys(), page.name


def test_every_benchmark_and_experiment_that_a_page_names_is_there() -> None:
    tables = {"bench": BENCHES, "reproduce": {*EXPERIMENTS, "report", "NAME"}}
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        for command, name in re.findall(
            r"\bminrnn (bench|reproduce) ([\w-]+)", page.read_text(encoding="utf-8")
        ):
            assert name in tables[command] or name.startswith("-"), f"{page.name}: {command} {name}"
