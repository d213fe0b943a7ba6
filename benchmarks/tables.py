"""Write RESULTS.md from the committed results and the text of page.md: python benchmarks/tables.py"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    page = (ROOT / "benchmarks" / "page.md").read_text(encoding="utf-8")
    figures = shakespeare() | speed() | accuracy()
    (ROOT / "RESULTS.md").write_text(page.format(**figures), encoding="utf-8")


def shakespeare() -> dict[str, str]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / "shakespeare-cpu").glob("*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(result["mixer"], []).append(result)
    rows = []
    for mixer, results in sorted(runs.items(), key=lambda item: mean(item[1], "val_loss")):
        losses = [result["val_loss"] for result in results]
        rows.append(
            [
                mixer,
                f"{results[0]['parameters']:,}",
                str(len(results)),
                f"**{statistics.mean(losses):.3f}**",
                f"{min(losses):.3f} to {max(losses):.3f}",
                f"{mean(results, 'val_loss_windowed'):.3f}",
                f"{mean(results, 'val_loss_windowed_64'):.3f}",
                f"{mean(results, 'seconds') / 60:.1f}",
            ]
        )
    head = [
        "mixer",
        "parameters",
        "seeds",
        "state carried",
        "lowest to highest",
        "windows of 256",
        "windows of 64",
    ]
    minutes = {mixer: mean(results, "seconds") for mixer, results in runs.items()}
    ratios = [minutes[slow] / minutes["mingru"] for slow in ("rnn", "gru", "lstm") if slow in minutes]
    return {
        "shakespeare": markdown([*head, "minutes"], rows),
        "slowdown": f"{min(ratios):.1f} to {max(ratios):.1f}",
    }


def speed() -> dict[str, str]:
    scan, layer, shares = (read(name) for name in ("scan", "layer", "shares"))
    return {
        "machine": machine(scan),
        "threads": str(scan["results"][0]["threads"]),
        "scan": systems(scan),
        "layer": systems(layer),
        "shares": share_table(shares),
        **{f"{name}_command": read(name)["command"] for name in ("scan", "layer", "shares")},
    }


def systems(report: dict[str, Any]) -> str:
    """One line for each shape and system: milliseconds, and how many times ours."""
    rows = []
    for result in report["results"]:
        for name, record in result["systems"].items():
            if "seconds" not in record or name == "copy":
                continue
            times = record["seconds"]
            rows.append(
                [
                    ", ".join(str(size) for size in result["shape"].values()),
                    name,
                    *(f"{times[phase]['median'] * 1e3:.2f}" for phase in ("forward", "backward", "step")),
                    f"{record['times_ours']:.2f}",
                    f"{record['peak_bytes'] / 1e6:.0f}",
                ]
            )
    head = [
        "B, T, D",
        "system",
        "forward, ms",
        "backward, ms",
        "step, ms",
        "times ours",
        "memory at the peak, MB",
    ]
    return markdown(head, rows)


def share_table(report: dict[str, Any]) -> str:
    rows = []
    for result in report["results"]:
        ours, copy = result["systems"]["minrnn"], result["systems"]["copy"]
        rows.append(
            [
                ", ".join(str(size) for size in result["shape"].values()),
                result["gate"],
                result["dtype"],
                f"{ours['seconds']['forward']['median'] * 1e3:.2f}",
                f"{ours['seconds']['backward']['median'] * 1e3:.2f}",
                f"{copy['bytes_per_second']['backward'] / 1e9:.0f}",
                f"{ours['share']['forward']:.0%}",
                f"{ours['share']['backward']:.0%}",
            ]
        )
    head = [
        "B, T, D",
        "gate",
        "dtype",
        "forward, ms",
        "backward, ms",
        "copy, GB/s",
        "share forward",
        "backward",
    ]
    return markdown(head, rows)


def accuracy() -> dict[str, str]:
    report = read("accuracy")
    errors = {
        (result["system"], result["dtype"], result["forgetting"], result["T"]): result["error"]["h"]
        for result in report["results"]
    }
    lines = dict.fromkeys((system, dtype, forgetting) for system, dtype, forgetting, _ in errors)
    lengths = (2**8, 2**12, 2**16, 2**20)
    rows = [
        [
            f"{system} {dtype}",
            f"{forgetting}",
            *(f"{errors[system, dtype, forgetting, T]:.1e}" for T in lengths),
        ]
        for system, dtype, forgetting in lines
    ]
    head = ["system", "forgetting", *(f"T = {T:,}" for T in lengths)]
    return {"accuracy": markdown(head, rows), "accuracy_command": report["command"]}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def mean(results: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(result[key] for result in results)


def machine(report: dict[str, Any]) -> str:
    described = report["machine"]
    return f"{described['processor']} ({described['cores']} cores), torch {report['versions']['torch']}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
