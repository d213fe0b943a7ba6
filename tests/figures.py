"""Figures of the code: sizes, functions, cycles, duplicates, documentation. Run `python tests/figures.py`.

python tests/figures.py              the package in this checkout
python tests/figures.py ../other     that of another one, to compare
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

RUN = 6
"""Lines of a duplicated run at least."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def figures(root: Path) -> dict[str, str]:
    """Return what is printed, by its name."""
    package = root / "src" / "minrnn"
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    functions = sorted((size, name) for path in trees for size, name in function_sizes(path, trees[path]))
    sizes = [size for size, _ in functions]
    longest = max(lengths, key=lengths.__getitem__)
    duplicated = duplicated_runs(sources)
    documented = [docstring_share(tree) for tree in trees.values()]
    inside, total = (sum(column) for column in zip(*documented, strict=True))
    native = sorted((root / "csrc").glob("*.[ch]*"))
    tests = sorted((root / "tests").rglob("*.py"))
    return {
        "package": f"{sum(lengths.values()):,} lines in {len(sources)} files",
        "longest file": f"{lengths[longest]} lines, {longest.relative_to(package)}",
        "files over 500 lines": str(sum(length > 500 for length in lengths.values())),
        "functions": f"{len(sizes):,}: median {statistics.median(sizes):.0f}, "
        f"90th percentile {sizes[int(0.9 * len(sizes))]}, longest {sizes[-1]} ({functions[-1][1]})",
        "functions over 60 lines": str(sum(size > 60 for size in sizes)),
        "import cycles": cycle(package, trees),
        f"runs of {RUN} lines and more that occur twice": str(len(duplicated)),
        "docstrings": f"{100 * inside / total:.0f} % of the lines",
        "C++": f"{count(native):,} lines in {len(native)} files",
        "tests": f"{count(tests):,} lines in {len(tests)} files",
        **{f"  duplicated: {first}": second for first, second in duplicated[:10]},
    }


def count(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def function_sizes(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the lines of each function, its docstring left out, and its name."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            first = node.body[0]
            text = first if ast.get_docstring(node, clean=False) is not None else None
            inside = 0 if text is None else (text.end_lineno or 0) - text.lineno + 1
            yield (node.end_lineno or 0) - node.lineno + 1 - inside, f"{path.stem}.{node.name}"


def docstring_share(tree: ast.Module) -> tuple[int, int]:
    """Return the lines of a file's docstrings, and all its lines."""
    inside = 0
    for node in ast.walk(tree):
        documented: Any = isinstance(node, ast.Module | ast.ClassDef | Function)
        if documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            text = node.body[0]  # type: ignore[attr-defined]
            inside += (text.end_lineno or 0) - text.lineno + 1
    return inside, max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)


def cycle(package: Path, trees: dict[Path, ast.Module]) -> str:
    """Return a cycle among the files that import each other, those inside functions included."""
    names = {module_name(package, path): path for path in trees}
    graph = {
        name: {target for target in imported(trees[path], names) if target != name}
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return "none"


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, names: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in names or node.module in names:
                    yield full if full in names else node.module


def duplicated_runs(sources: dict[Path, str]) -> list[tuple[str, str]]:
    """Find runs of code lines that occur in two places: each place where such a run starts.

    Blank lines, comments, imports, docstrings and lines of brackets alone do not count.
    """
    seen: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, text in sources.items():
        lines = code_lines(text)
        for index in range(len(lines) - RUN + 1):
            run = lines[index : index + RUN]
            seen[tuple(line for _, line in run)].append(f"{path.parent.name}/{path.name}:{run[0][0]}")
    found, covered = [], set()
    for places in seen.values():
        if len(places) > 1:
            starts = tuple(tuple(place.rsplit(":", 1)) for place in places[:2])
            before = tuple((name, str(int(line) - 1)) for name, line in starts)
            if before not in covered:
                found.append((places[0], places[1]))
            covered.add(starts)
    return found


def code_lines(text: str) -> list[tuple[int, str]]:
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate((line.strip() for line in text.splitlines()), start=1)
    return [
        (number, line)
        for number, line in lines
        if number not in skipped and line and not line.startswith("#") and line.strip("()[]{},:")
    ]


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    for name, text in figures(root).items():
        print(f"{name}: {text}")
