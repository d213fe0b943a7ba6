"""Plant faults in minrnn, one at a time, and count those that the related tests notice.

    python tests/mutants/run.py                          # all lists: tests/mutants/*.toml
    python tests/mutants/run.py --room ops --room models # some rooms
    python tests/mutants/run.py --file src/minrnn/ops/gates.py
    python tests/mutants/run.py --sample 20 --seed 3     # some faults, drawn
    python tests/mutants/run.py --room ops --output tests/mutants/result.json  # measure a room again

Faults are planted in copies of the checkout, in a scratch folder; the checkout stays as it is. Exit status 1
says that a fault survived without an explanation, that less than 90 % of a room's died or less than 95 % of
all, or that a list is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants import builder, outcomes, workshop
from mutants.faults import LISTS, Fault, read_lists
from mutants.outcomes import NOT_RUN, Outcome


def main() -> int:
    options = parse()
    faults, left_out = select(options)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up, as Ctrl-C does
    for module in sorted({str(fault.needs) for fault in left_out}):
        count = sum(fault.needs == module for fault in left_out)
        print(f"{count} faults are not run: {module} is not installed")
    if not faults:
        sys.exit("run.py: there is no fault to plant")
    with tempfile.TemporaryDirectory(prefix="minrnn-faults-") as scratch:
        python = prepare(Path(scratch).resolve(), faults, options)
        found = [Outcome(fault, NOT_RUN, f"{fault.needs} is not installed", 0.0) for fault in left_out]
        missing = Counter(fault.room for fault in faults)
        for outcome in observed(python, Path(scratch).resolve(), faults, options.verbose):
            found.append(outcome)
            missing[room := outcome.fault.room] -= 1
            if options.output is not None and not missing[room]:
                outcomes.keep(options.output, room, outcomes.by_room(found)[room])
    if options.again is not None:
        outcomes.amend(options.again, found)
    is_part = options.file or options.again or options.sample is not None
    whole = not (options.room or options.without or is_part)
    print(outcomes.table(found))
    print(f"{len(faults)} faults in {(time.monotonic() - started) / 60:.1f} min")
    print("".join(f"{line}\n" for line in outcomes.out_of_date(found)), end="")
    wrong = outcomes.complaints(found, rooms=not is_part, whole=whole)
    print("".join(f"{line}\n" for line in wrong), end="")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--room", action="append", default=[], help="faults of this room alone; repeatable")
    parser.add_argument("--without", action="append", default=[], metavar="ROOM", help="none of this room")
    parser.add_argument(
        "--file", action="append", default=[], help="faults of this source file alone; repeatable"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N faults, drawn from those")
    parser.add_argument("--seed", type=int, default=0, help="decides the draw")
    parser.add_argument(
        "--lists", type=Path, default=LISTS, help="the folder of the lists (default: this one)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="faults at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        help="seconds of one fault, and four times what its tests usually take",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="a JSON file of results by room; takes each when it is done",
    )
    parser.add_argument("--verbose", action="store_true", help="say of each fault what noticed it")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="OUTPUT",
        help="what survived there unexplained, which is counted anew",
    )
    options = parser.parse_args()
    if options.output is not None and (options.file or options.again or options.sample is not None):
        parser.error("--output keeps results of whole rooms, and not of a --file, a --sample or --again")
    return options


def select(options: argparse.Namespace) -> tuple[list[Fault], list[Fault]]:
    """Return the faults to be planted, and those that cannot be run here."""
    faults = read_lists(options.lists)
    known = {"room": {fault.room for fault in faults}, "file": {fault.file for fault in faults}}
    for kind, given in (("room", options.room + options.without), ("file", options.file)):
        if unknown := set(given) - known[kind]:
            names = ", ".join(sorted(known[kind]))
            sys.exit(f"run.py: no fault has the {kind} {min(unknown)!r}; there are {names}")
    rooms = set(options.room or known["room"]) - set(options.without)
    faults = [f for f in faults if f.room in rooms and (not options.file or f.file in options.file)]
    if options.again is not None:
        faults = outcomes.unexplained(outcomes.read(options.again), faults)
    if options.sample is not None:
        faults = random.Random(options.seed).sample(faults, min(options.sample, len(faults)))
    left_out = [fault for fault in faults if fault.needs and find_spec(fault.needs) is None]
    return [fault for fault in faults if fault not in left_out], left_out


def prepare(scratch: Path, faults: list[Fault], options: argparse.Namespace) -> Path:
    """Make copies and a plan in a scratch folder; return the interpreter that imports the copies."""
    copies = [scratch / f"copy{number}" for number in range(options.workers)]
    extension = workshop.extension()
    for copy in copies:
        workshop.copy_checkout(copy, extension)
    (scratch / "extension").mkdir()
    shutil.copy(extension, scratch / "extension")
    ninja = ""
    if any(fault.is_compiled for fault in faults):
        print("building the extension", flush=True)
        ninja = builder.tool("ninja")
        builder.first_build(copies[0])
    python = workshop.make_environment(scratch / "environment")
    for copy in copies:
        workshop.work_of(copy).mkdir()
        workshop.assert_imported(python, copy)
    plan = {
        "copies": [str(copy) for copy in copies],
        "limit": options.limit,
        "ninja": ninja,
        "faults": faults,
    }
    (scratch / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return python


def observed(python: Path, scratch: Path, faults: list[Fault], verbose: bool) -> Iterator[Outcome]:
    """Yield what comes of each fault; exit if the tests fail without one."""
    by_name = {fault.name: fault for fault in faults}
    planter = Path(__file__).with_name("planter.py")
    seen = 0
    with subprocess.Popen([python, planter, scratch], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = json.loads(line)
                fault = by_name.get(found["name"])
                if fault is None:
                    if found["outcome"] != "passed":
                        sys.exit(f"run.py: the tests fail without a fault: {found['by']}")
                    if verbose:
                        print(f"unchanged: {found['name']} passes, {found['seconds']:.1f} s", flush=True)
                    continue
                outcome = outcomes.judged(fault, found["outcome"], found["by"], found["seconds"])
                seen += 1
                if verbose or outcome.what != "died":
                    print(f"[{seen}/{len(faults)}] {outcome}", flush=True)
                yield outcome
        finally:
            process.terminate()
    if seen < len(faults):
        sys.exit(f"run.py: the planting process ended with status {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
