"""What a stranger finds after `pip install`: run by the Python of a fresh environment, outside the checkout.

    PYTHON installed.py SOURCE ENGINE

SOURCE is the checkout's src/minrnn, ENGINE the engine that must serve the CPU. This is no test of pytest's:
minrnn and what it requires are there, no extras. Each step prints a line; the first that fails ends it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

MINRNN = str(Path(sys.executable).with_name("minrnn"))
TINY = (
    "--model.d-model 8 --model.num-layers 1 --train.steps 2 --train.batch-size 2 --train.warmup-steps 1 "
    "--train.device cpu"
)
COMMANDS = [
    f"train demo --task.source text --task.window 8 {TINY} --run first",
    "train --run first --resume --train.steps 3",
    "sample first --tokens 5 --device cpu",
    "evaluate first --max-tokens 50 --device cpu",
    f"train listops --task.num-train 20 --task.num-validation 5 --task.num-test 5 {TINY} --run second",
    "engines",
    "plan demo --model.d-model 8 --ranks 1 2",
    "reproduce --list",
    "reproduce selective-copying --scale tiny --mixers mingru",
]
"""What works without extras; each exits with 0."""

MISSING = {
    "make-data Hopper-v5": "minrnn[rl]",
    f"train decisions --task.data data.hdf5 {TINY} --run third": "minrnn[rl]",
    f"train demo --task.source text --task.vocabulary bpe {TINY} --run fifth": "minrnn[text]",
    "export first new --format transformers": "minrnn[transformers]",
}
"""What cannot be done without an extra, and the extra that the one line of the error names."""

LACKING = {
    "bench scan --shapes 2x16x8 --seconds 0.1 --samples 3 --output scan.json": "minrnn[plots]",
    "bench layer --shapes 2x16x8 --seconds 0.1 --samples 3 --output layer.json": "minGRU-pytorch",
    f"train demo --task.source text --task.window 8 {TINY} --run fourth": "minrnn[plots]",
    "reproduce runtime --scale tiny": "minrnn[plots]",
}
"""What is done all the same, with a note that names what would do more."""


def say(text: str) -> None:
    print(f"installed: {text}", flush=True)


def minrnn(arguments: str, folder: str, status: int = 0) -> str:
    """Run a command line in a folder, and return what it printed."""
    command = [MINRNN, *arguments.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == status, f"{arguments}: exit status {done.returncode}\n{output}"
    assert "Traceback" not in output, f"{arguments}\n{output}"
    return output


def check_files(source: Path) -> None:
    """Whatever lies in the checkout's package is installed, and nothing else but compiled modules."""
    wanted = {
        path.relative_to(source.parent).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd")
    }
    files = metadata.files("minrnn") or []
    found = {file.as_posix() for file in files if file.parts[0] == "minrnn" and file.suffix != ".pyc"}
    compiled = {name for name in found if name.endswith((".so", ".pyd"))}
    assert found - compiled == wanted, sorted((found - compiled) ^ wanted)
    say(f"{len(found)} files, {len(compiled)} of them compiled")


def check_imports() -> None:
    """Every module can be imported, or says what it needs: an extra, or a compiler."""
    package = importlib.import_module("minrnn")
    assert "site-packages" in str(package.__file__), f"{package.__file__} is no installed package"
    needs = {}
    for module in pkgutil.walk_packages(package.__path__, "minrnn."):
        if module.name == "minrnn.__main__" or module.name.rpartition(".")[2].startswith("_"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            needs[module.name] = str(error)
    for name, reason in needs.items():
        assert "minrnn[" in reason or "C++ compiler" in reason, f"{name}: {reason}"
    say(f"all modules can be imported but {', '.join(needs) or 'none'}, which say what they need")


def check_engine(engine: str) -> None:
    """The engine that should serve the CPU does, and agrees with the reference."""
    import torch

    from minrnn import MinGRU, engines
    from minrnn.ops import reference

    serving = next(each for each in engines() if each.serves and each.device in ("cpu", "any"))
    assert serving.name == engine, f"{serving.name} serves the CPU, expected {engine}"
    layer, x = MinGRU(4, 6, batch_first=True), torch.randn(2, 9, 4, requires_grad=True)
    h, _ = layer(x)
    pre = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    expected = reference.forward([pre.detach()], None, None, "mingru", "positive", False, False)
    torch.testing.assert_close(h.detach(), expected)
    h.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    say(f"the engine {engine} serves the CPU and agrees with the reference")


def check_threads() -> None:
    """The engine's threads are those of torch's OpenMP, of which the process has one."""
    from minrnn.ops import cpu

    assert cpu.compiled.threads_by, "torch's OpenMP was not found: the compiled engine has one thread"
    maps = Path("/proc/self/maps")
    if maps.is_file():  # on Linux
        found = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps.read_text()))
        assert len(found) == 1, f"one OpenMP runtime must be loaded, found {sorted(found)}"
    say(f"the engine's threads are torch's, started by {cpu.compiled.threads_by}")


def main() -> None:
    source, engine = Path(sys.argv[1]), sys.argv[2]
    check_files(source)
    check_imports()
    check_engine(engine)
    if engine == "cpp":
        check_threads()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text").write_text("To be, or not to be, that is the question.\n" * 50)
        verbs = re.findall(r"^  ([a-z-]+)  ", minrnn("--help", folder).partition("environment:")[0], re.M)
        assert len(verbs) > 5, verbs
        assert re.search(r"\d+\.\d+\.\d+", minrnn("--version", folder))
        for verb in verbs:
            assert "usage:" in minrnn(f"{verb} --help", folder)
        say(f"{len(verbs)} verbs explain themselves: {', '.join(verbs)}")
        for command in COMMANDS:
            minrnn(command, folder)
            say(f"minrnn {command}")
        for command, note in LACKING.items():
            assert note in minrnn(command, folder), command
            say(f"minrnn {command}: names {note}")
        Path(folder, "data.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
        for command, extra in MISSING.items():
            line = minrnn(command, folder, status=1)
            assert line.count("\n") == 1, line
            assert extra in line, line
            say(f"minrnn {command}: {line.strip()}")
    say("all passed")


if __name__ == "__main__":
    main()
