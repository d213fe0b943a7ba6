"""What came of planted faults: the table by room, what is wrong with it, and its record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mutants.faults import Fault

LEAST = {"room": 0.90, "whole": 0.95}
"""The share of the faults that must die."""

DIED, EXPLAINED, UNEXPLAINED, NOT_RUN = "died", "survived, explained", "survived, unexplained", "not run"
COLUMNS = (DIED, EXPLAINED, UNEXPLAINED, NOT_RUN)


class Outcome(NamedTuple):
    """What came of a fault."""

    fault: Fault
    what: str
    """One of the columns, or `error`: the fault itself is wrong."""
    by: str
    """The test that noticed it, or why it was not run, or what is wrong."""
    seconds: float

    def __str__(self) -> str:
        fault = self.fault
        change = f"{fault.old.strip()!r} -> {fault.new.strip()!r}"
        after = f" ({self.by})" if self.by else ""
        return f"{self.what}: {fault.name} {fault.place} {change}{after}, {self.seconds:.1f} s"


def judged(fault: Fault, outcome: str, by: str, seconds: float) -> Outcome:
    """Return what it means for a fault that its tests passed or failed."""
    if outcome == "error":
        return Outcome(fault, "error", by, seconds)
    if outcome == "failed":
        return Outcome(fault, DIED, by, seconds)
    return Outcome(fault, UNEXPLAINED if fault.survives is None else EXPLAINED, "", seconds)


def share(found: Iterable[Outcome]) -> float:
    """Return the share that died of the faults that were run; 1 if none was."""
    run = [outcome.what == DIED for outcome in found if outcome.what != NOT_RUN]
    return sum(run) / len(run) if run else 1.0


def by_room(found: list[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each room."""
    rooms = sorted({outcome.fault.room for outcome in found})
    return {room: [outcome for outcome in found if outcome.fault.room == room] for room in rooms}


def table(found: list[Outcome]) -> str:
    """Return the counts of each room and of all."""
    rows = [["room", "planted", *COLUMNS, "share died"]]
    for room, outcomes in {**by_room(found), "all": found}.items():
        counts = [sum(outcome.what == column for outcome in outcomes) for column in COLUMNS]
        rows.append([room, *map(str, (len(outcomes), *counts)), f"{share(outcomes):.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def complaints(found: list[Outcome], rooms: bool, whole: bool) -> list[str]:
    """Return what is wrong, a line each; explained survivors count where rooms or the whole are complete."""
    lines = [str(outcome) for outcome in found if outcome.what in ("error", UNEXPLAINED)]
    if rooms:
        lines += [
            f"only {share(outcomes):.1%} of the faults of {room!r} died; at least {LEAST['room']:.0%} must"
            for room, outcomes in by_room(found).items()
            if share(outcomes) < LEAST["room"]
        ]
    if whole and share(found) < LEAST["whole"]:
        lines.append(f"only {share(found):.1%} of all faults died; at least {LEAST['whole']:.0%} must")
    return lines


def out_of_date(found: list[Outcome]) -> list[str]:
    """Return the faults that died although their list says why they survive."""
    return [
        f"out of date: {outcome.fault.name} is explained as a survivor, but {outcome.by} noticed it"
        for outcome in found
        if outcome.what == DIED and outcome.fault.survives is not None
    ]


def as_json(found: list[Outcome]) -> dict[str, Any]:
    """Return the record of a room's outcomes."""
    import torch

    from minrnn.training.provenance import provenance

    return {
        **provenance(torch.device("cpu")),
        "seconds": round(sum(outcome.seconds for outcome in found)),
        "planted": len(found),
        **{column: sum(outcome.what == column for outcome in found) for column in COLUMNS},
        "survivors": [
            {
                "name": outcome.fault.name,
                "file": outcome.fault.file,
                "old": outcome.fault.old,
                "new": outcome.fault.new,
                "survives": outcome.fault.survives,
            }
            for outcome in found
            if outcome.what in (EXPLAINED, UNEXPLAINED)
        ],
    }


def keep(path: Path, room: str, found: list[Outcome]) -> None:
    """Put a room's record into a file of records by room, in the place of an earlier one."""
    records = read(path) if path.is_file() else {}
    _write(path, {**records, room: as_json(found)})


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by room."""
    records: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def unexplained(records: dict[str, dict[str, Any]], faults: Iterable[Fault]) -> list[Fault]:
    """Return those of the faults that have survived, and whose list did not say why."""
    survivors = {
        _changed(one) for record in records.values() for one in record["survivors"] if not one["survives"]
    }
    return [fault for fault in faults if fault.change in survivors]


def amend(path: Path, found: list[Outcome]) -> None:
    """Count again, in a file of records, what survived unexplained and has been planted once more."""
    records = read(path)
    for room, outcomes in by_room(found).items():
        record, again = records[room], as_json(outcomes)
        record[UNEXPLAINED] -= len(outcomes)
        for column in COLUMNS:
            record[column] += again[column]
        run = {one.fault.change for one in outcomes}
        others = [one for one in record["survivors"] if _changed(one) not in run]
        record.update(
            survivors=others + again["survivors"], again={"commit": again["commit"], "planted": len(outcomes)}
        )
    _write(path, records)


def _changed(survivor: dict[str, Any]) -> tuple[str, str, str]:
    return survivor["file"], survivor["old"], survivor["new"]


def _write(path: Path, records: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(dict(sorted(records.items())), indent=1, ensure_ascii=False)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(path)


def sentence(records: dict[str, dict[str, Any]], rooms: Iterable[str]) -> str:
    """Return what CONTRIBUTING.md says of the records by room, of all these rooms."""
    run = {room: record["planted"] - record[NOT_RUN] for room, record in records.items()}
    died = sum(record[DIED] for record in records.values())
    total = sum(run.values())
    least = min(record[DIED] / run[room] for room, record in records.items())
    missing = ", ".join(sorted({*rooms} - records.keys()))
    return (
        f"Of {total} planted faults the tests notice {died} ({100 * died / total:.1f} %), and in each room "
        f"at least {100 * least:.1f} %; the lists say why the other {total - died} go unnoticed."
        + (f" Not measured yet: {missing}." if missing else "")
    )
