# SPDX-License-Identifier: Apache-2.0
"""The page that ``sluice bench all --report`` writes: Markdown, and plots in a folder of the same name.

Each section names the command that prints its figures.  The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sluice_cli.bench_cpu import cpu_table
from sluice_cli.bench_latency import LOADS, batch_table, latency_table
from sluice_cli.bench_measure import Row, rates_table
from sluice_cli.bench_plot import bars, lines, ranges
from sluice_cli.bench_program import program_table
from sluice_cli.bench_soak import soak_table
from sluice_cli.output import Table

Plot = tuple[str, str, str]  # name of the file, what it shows, SVG

_HEAD: Final = """\
# Benchmarks

Made by one command, which prints every figure on this page and draws the plots:

    sudo tools/sluice bench all --report docs/benchmarks.md

What the columns mean and how it is measured: [performance](performance.md). Ratios say more than rates: all
paths of a section ran in turns, in the same run, behind the same steer program.
"""

_TRIAL: Final = """\
**Made with `--quick`**, which measures for moments and leaves paths out: it shows what the page looks like,
and nothing may be concluded from its figures.

"""


@dataclass(frozen=True)
class Section:
    """A part of the page: the rows of one direction."""

    direction: str
    heading: str
    text: str
    table: Callable[[Sequence[Row]], Table]
    plots: Callable[[Sequence[Row]], Sequence[Plot]]

    @property
    def command(self) -> str:
        """What prints these figures alone."""
        return f"sudo tools/sluice bench {self.direction}"


def _by_size(rows: Sequence[Row], key: str) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Series (sizes) and for each path its values."""
    sizes = sorted({row["size"] for row in rows})
    paths = list(dict.fromkeys(row["path"] for row in rows))
    found = {(row["path"], row["size"]): row.get(key) for row in rows}
    return [f"{size} bytes" for size in sizes], [
        (path, [found.get((path, size)) for size in sizes]) for path in paths
    ]


def _rate_plots(rows: Sequence[Row]) -> list[Plot]:
    direction = rows[0]["direction"]
    title = f"{direction}: packets per second"
    return [(direction, title, bars(title, *_by_size(rows, "packets_per_second"), "packets/s"))]


def _receive_plots(rows: Sequence[Row]) -> list[Plot]:
    cpu = "receive: CPU time of the process for each packet"
    memory = "receive: most memory of the process (RSS, frames included)"
    mebibytes = [row | {"rss_mib": row["rss_kib"] / 1024} for row in rows if "rss_kib" in row]
    return [
        *_rate_plots(rows),
        ("receive-cpu", cpu, bars(cpu, *_by_size(rows, "process_cpu_ns"), "ns")),
        ("receive-memory", memory, bars(memory, *_by_size(mebibytes, "rss_mib"), "MiB")),
    ]


def _latency_plots(rows: Sequence[Row]) -> list[Plot]:
    loads = [load for load in LOADS if any(row["load"] == load for row in rows)]
    found = {(row["path"], row["load"]): _quantiles(row) for row in rows}
    paths = list(dict.fromkeys(row["path"] for row in rows))
    title = "round trip: p50 (large dot), p99, p99.9"
    shown = [(path, [found.get((path, load)) for load in loads]) for path in paths]
    return [("latency", title, ranges(title, loads, shown, "µs, logarithmic"))]


def _quantiles(row: Row) -> list[float] | None:
    """Those that there are and that a logarithm can be taken of."""
    values = row.get("latency_us", {}).values()
    return [value for value in values if value] or None


def _batch_plots(rows: Sequence[Row]) -> list[Plot]:
    batches = sorted({row["batch"] for row in rows})
    paths = list(dict.fromkeys(row["path"] for row in rows))
    found = {(row["path"], row["batch"]): row for row in rows}

    def series(value: Callable[[Row], float | None]) -> list[tuple[str, list[float | None]]]:
        return [(path, [value(found.get((path, batch), {})) for batch in batches]) for path in paths]

    places = [str(batch) for batch in batches]
    rate, wait = (
        "batch size: packets echoed per second",
        "batch size: p50 of round trips at half of that rate",
    )
    return [
        ("batch-rate", rate, lines(rate, places, series(lambda row: row.get("packets_per_second")), "/s")),
        ("batch-latency", wait,
         lines(wait, places, series(lambda row: row.get("latency_us", {}).get("p50")), "µs")),
    ]  # fmt: skip


def _cpu_plots(rows: Sequence[Row]) -> list[Plot]:
    title = "CPU time of the whole machine for each packet, the sender's subtracted"
    shown: list[tuple[str, list[float | None]]] = [
        (f"{row['path']}, {row['rate']:,}/s", [max(0.0, row["machine_cpu_ns"])])
        for row in rows
        if row["path"] != "sender"
    ]
    return [("cpu", title, bars(title, [""], shown, "ns"))]


def _program_plots(rows: Sequence[Row]) -> list[Plot]:
    title = "the steer program: time for each packet, the loop's included"
    names = list(dict.fromkeys((row["case"], row["peers"]) for row in rows))
    found = {(row["case"], row["peers"], row["family"]): row["ns_per_packet"] for row in rows}
    shown = [
        (case if peers == "hot" else f"{case}, {peers}", [found.get((case, peers, v)) for v in ("v4", "v6")])
        for case, peers in names
    ]
    return [("program", title, bars(title, ("IPv4", "IPv6"), shown, "ns"))]


def _no_plots(_rows: Sequence[Row]) -> list[Plot]:
    return []


def _rates(direction: str) -> Callable[[Sequence[Row]], Table]:
    return lambda rows: rates_table(direction, rows)


SECTIONS: Final = (
    Section("receive", "Receive", "As fast as it goes: the generator floods, `loss` is what did not fit.",
            _rates("receive"), _receive_plots),
    Section("transmit", "Transmit", "As fast as it goes; the other end drops.",
            _rates("transmit"), _rate_plots),
    Section("echo", "Echo", "Everything is sent back to where it came from.", _rates("echo"), _rate_plots),
    Section("fanout", "Fan-out", "One payload to each of 200 destinations, again and again.",
            _rates("fanout"), _rate_plots),
    Section("manager", "One packet at a time", "A call for each packet, or a batch manager.",
            _rates("manager"), _rate_plots),
    Section("batch", "Batch size", "What a batch of 1 to 256 packets brings in rate, and costs in latency.",
            batch_table, _batch_plots),
    Section("latency", "Round trips",
            "Idle; at half load, that is beside as much traffic as half of what the path can echo; under a\n"
            "flood to the same port. Where there are lanes (`sluice`), the flood goes into the lower one,\n"
            "and the questions into the higher one.", latency_table, _latency_plots),
    Section("cpu", "CPU of the whole machine",
            "At a steady rate, told from the machine's idle time. What the sender costs alone is subtracted.",
            cpu_table, _cpu_plots),
    Section("program", "The steer program", "The kernel's own test runs, without any traffic.",
            program_table, _program_plots),
    Section("soak", "A long time",
            "At a steady rate. What is lost has to be in some counter; nothing may grow.",
            soak_table, _no_plots),
)  # fmt: skip


def write_report(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Write the page and its plots; returns what was written, the page first.

    Plots of sections that were not run are removed: they would be those of another run.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text, plots = page(document, folder.name)
    for old in folder.glob("*.svg"):
        if old.stem not in plots:
            old.unlink()
    written = [path]
    path.write_text(text, encoding="utf-8")
    for name, svg in plots.items():
        written.append(folder / f"{name}.svg")
        written[-1].write_text(svg, encoding="utf-8")
    return written


def page(document: Mapping[str, Any], folder: str) -> tuple[str, dict[str, str]]:
    """The Markdown text, and the plots by name."""
    parts = [_HEAD, _about(document)]
    plots: dict[str, str] = {}
    for section in SECTIONS:
        rows = [row for row in document["results"] if row["direction"] == section.direction]
        if not rows:
            continue
        parts.append(f"## {section.heading}\n\n{section.text}\n\n    {section.command}\n")
        # A section of failed paths has nothing to draw, and the table of programs nothing to say.
        measured = [row for row in rows if "error" not in row]
        if measured:
            for name, title, svg in section.plots(measured):
                plots[name] = svg
                parts.append(f"![{title}]({folder}/{name}.svg)\n")
            shown = measured if section.direction == "program" else rows
            parts.append("```text\n" + "\n".join(section.table(shown).lines()) + "\n```\n")
        parts += [f"{row['path']} failed: {row['error']}\n" for row in rows if "error" in row]
    return "\n".join(parts), plots


def _about(document: Mapping[str, Any]) -> str:
    machine, made = document["machine"], document["made"]
    version = made["version"] + (f" ({made['commit']})" if made["commit"] else "")
    minutes = made["took_seconds"] / 60
    trial = _TRIAL if made["quick"] else ""
    return f"""\
{trial}| | |
|---|---|
| machine | {machine["cpu"]}, {machine["cpus"]} CPUs |
| system | Linux {machine["kernel"]}, Python {machine["python"]} |
| interface | {machine["interface"]}; generic where the name says so. veth has no zero-copy |
| version | Sluice {version} |
| made | {made["date"]}, in {minutes:.1f} minutes |
| each measurement | {made["seconds"]:g} s, the median of {made["runs"]} |
| other lengths | latency {made["latency_seconds"]:g} s, CPU {made["cpu_seconds"]:g} s, soak \
{made["soak_seconds"]:g} s |
"""
