"""A run's JSON as a table: plain text for the terminal, Markdown for the docs.

python -m bench.table bench/results/loads-….json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import figures

LOADS_HEAD = ("ratio", "", "GB/s", "seconds", "CPU s/GB", "memory beyond the tensors")


def loads_tables(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """[(title, rows)] of a run of loads, one for each case; the first row is the head."""
    tables = []
    for case in run["cases"]:
        lines = [line for line in run["lines"] if line["case"] == case["name"]]
        rows: list[tuple[str, ...]] = [LOADS_HEAD]
        for line in lines:
            found = figures(line, lines)
            notes = f" ({'; '.join(line['notes'])})" if line["notes"] else ""
            rows.append(
                (
                    "base"
                    if line["base"] == line["name"]
                    else shown(found.ratio, "×")
                    if found.ratio
                    else "",
                    line["label"] + notes,
                    f"{found.bytes_per_second / 1e9:.3g}",
                    shown(found.seconds),
                    f"{found.cpu_seconds_per_gb:.2f}",
                    f"{found.extra_memory / 1e6:.0f} MB",
                )
            )
        tables.append((case["title"], rows))
    return tables


def shown(values: Sequence[float], unit: str = "") -> str:
    """Median (least to most)."""
    middle, least, most = values
    return f"{middle:.2f}{unit} ({least:.2f}–{most:.2f})"


def machine_line(run: Mapping[str, Any]) -> str:
    """On what, with what, and how busy it was."""
    machine, versions = run["machine"], run["versions"]
    names = (
        "tensorserve",
        "commit",
        "cipher",
        "tensorizer",
        "runai-model-streamer",
        "safetensors",
        "torch",
    )
    gpu = machine.get("gpu", {})
    driver = f" (driver {gpu['driver']}, CUDA {gpu['driver_cuda']})" if "driver" in gpu else ""
    return (
        f"{run['date'][:10]}, {gpu['name'] + driver + ', ' if gpu else ''}"
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, load average {machine['load_average']:.1f}; "
        + ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    )


def text(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def show(path: Path) -> None:
    """Print the tables of a result."""
    run = json.loads(path.read_text())
    print(f"\n{machine_line(run)}")
    for title, rows in tables_of(run):
        print(f"\n{title}\n{text(rows)}")
    print(f"\nWritten to {path}")


def tables_of(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Of a run of any kind."""
    if "lines" in run:
        return loads_tables(run)
    return [(table["title"], [tuple(row) for row in table["rows"]]) for table in run["tables"]]


def page(results: Sequence[Path]) -> str:
    """The Markdown of results: docs/measurements.md below its mark."""
    parts = []
    for path in results:
        run = json.loads(path.read_text())
        parts.append(f"## {path.stem}\n\n{machine_line(run)}.")
        parts += [f"**{title}**\n\n{markdown(rows)}" for title, rows in tables_of(run)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the Markdown of one or more results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    print(page(sorted(parser.parse_args().results)), end="")


if __name__ == "__main__":
    main()
