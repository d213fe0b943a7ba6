"""`minrnn bench`: time and check engines and layers against other implementations."""

from __future__ import annotations

from collections.abc import Sequence

from minrnn.benchmarks import BENCHES
from minrnn.cli.arguments import parse
from minrnn.files import nearest

WIDTH = 150  # of tables if the output is not a terminal


def run(args: Sequence[str]) -> int:
    """Run `minrnn bench`."""
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0)
    name, *rest = args
    if name not in BENCHES:
        raise ValueError(f"bench: unknown benchmark {name!r}{nearest(name, BENCHES)} ({', '.join(BENCHES)})")
    bench = BENCHES[name].load()
    options = parse(bench.options, f"bench {name}", rest)
    from minrnn.training import Output  # imports torch, which is slow

    console = Output()
    bench.run(options, rest, console if console.is_terminal else Output(width=WIDTH))
    return 0


def help_text() -> str:
    """Return what `minrnn bench --help` prints."""
    width = max(map(len, BENCHES))
    return "\n".join(
        [
            "usage: minrnn bench BENCHMARK [OPTIONS]",
            "",
            "Check and time the engines and layers against other installed implementations.",
            "",
            "benchmarks:",
            *(f"  {name:{width}}  {entry.help}" for name, entry in BENCHES.items()),
            "",
            "`minrnn bench BENCHMARK -h` shows a benchmark's options.",
        ]
    )
