# SPDX-License-Identifier: Apache-2.0
"""The page and the plots of `sluice bench all`: every row is on it, and lengths are those of the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from sluice_cli.bench_plot import bars, decades, lines, ranges, short, steps
from sluice_cli.bench_report import SECTIONS, page, write_report

SVG = "{http://www.w3.org/2000/svg}"


def rate(path: str, direction: str, size: int = 64, **more: Any) -> dict[str, Any]:
    return {
        "path": path, "direction": direction, "size": size, "batch": 64, "packets_per_second": 1_000_000,
        "process_cpu_ns": 100.0, "machine_cpu_ns": 200.0, "loss": 0.5, "ratio_to_c": 1.0,
        "ratio_to_recvmmsg": None, "cpu_ratio_to_c": 1.0, "rss_kib": 2048, "umem_kib": 0, "runs": 1,
    } | more  # fmt: skip


def trips(path: str, load: str, p50: float | None) -> dict[str, Any]:
    values = {"p50": p50, "p99": p50 and p50 * 10, "p99.9": p50 and p50 * 20}
    return {
        "path": path, "direction": "latency", "load": load, "size": 32, "packets": 10, "lost": 0,
        "beside_packets_per_second": None if load == "flood" else 0, "latency_us": values,
        "latency_ratio_to_c": None,
    }  # fmt: skip


def results() -> list[dict[str, Any]]:
    rows = [rate(path, direction, size) for direction in ("receive", "transmit", "echo", "fanout", "manager")
            for path in ("xsk-c", "sluice") for size in (64, 512)]  # fmt: skip
    rows.append({"path": "uvloop", "direction": "receive", "size": 64, "batch": 1, "error": "no <uvloop>"})
    rows += [rate("sluice", "batch", batch=batch) | trips("sluice", "half", 50.0) | {"direction": "batch"}
             for batch in (1, 256)]  # fmt: skip
    rows += [trips("sluice", "idle", 30.0), trips("sluice", "flood", 60.0), trips("socket", "flood", None)]
    rows += [{"path": path, "direction": "cpu", "size": 64, "rate": 50_000, "packets_per_second": 50_000,
              "seconds": 1.0, "machine_cpu_ns": 500.0, "noise_cpus": 0.0, "not_valid": None}
             for path in ("sender", "asyncio")]  # fmt: skip
    rows += [{"direction": "program", "family": family, "peers": "hot", "case": "stranger",
              "ns_per_packet": 60, "empty_ns": 6} for family in ("v4", "v6")]  # fmt: skip
    rows.append({
        "path": "sluice", "direction": "soak", "size": 1232, "rate": 50_000, "packets_per_second": 50_000,
        "seconds": 60.0, "sent": 10, "late": 0, "received": 10, "lost": 0, "dropped": {}, "balanced": True,
        "process_cpu_ns": 5.0, "gap_ms": 1.0, "oldest_ms": 1.0, "rss_kib": 1, "rss_kib_per_hour": 0.0,
        "descriptors": 5, "descriptors_per_hour": 0.0, "ok": True,
    })  # fmt: skip
    return rows


def document(rows: Sequence[dict[str, Any]], *, quick: bool = False) -> dict[str, Any]:
    return {
        "machine": {"cpu": "A CPU", "cpus": 2, "kernel": "6.18", "python": "3.11", "interface": "veth"},
        "made": {
            "date": "2030-01-02 03:04 UTC", "version": "0.1.0", "commit": "abc1234", "took_seconds": 90.0,
            "seconds": 2.0, "runs": 3, "latency_seconds": 3.0, "cpu_seconds": 30.0, "soak_seconds": 60.0,
            "quick": quick,
        },
        "results": list(rows),
    }  # fmt: skip


def elements(svg: str, name: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(SVG + name))


def widths(svg: str) -> list[float]:
    """Of the bars: all rectangles but the background, and the legend's, which are 11 high and 11 wide."""
    found = [element for element in elements(svg, "rect")[1:] if element.get("width") != "11.0"]
    return [float(element.get("width", "")) for element in found]


def test_every_section_with_its_command_plots_and_rows() -> None:
    text, plots = page(document(results()), "benchmarks")
    for section in SECTIONS:
        assert f"\n    sudo tools/sluice bench {section.direction}\n" in text
    for what in ("A CPU, 2 CPUs", "Sluice 0.1.0 (abc1234)", "2030-01-02 03:04 UTC", "1.5 minutes"):
        assert what in text
    assert "uvloop failed: no <uvloop>" in text
    for name, svg in plots.items():
        assert f"(benchmarks/{name}.svg)" in text
        assert elements(svg, "title")[0].text
    assert text.count("](benchmarks/") == len(plots) == 12
    assert (text, plots) == page(document(results()), "benchmarks")


def test_a_trial_says_that_it_is_one() -> None:
    assert "--quick" not in page(document(results()), "benchmarks")[0]
    assert "**Made with `--quick`**" in page(document(results(), quick=True), "benchmarks")[0]


def test_a_section_that_was_not_run_is_not_there() -> None:
    text, plots = page(document([rate("sluice", "echo")]), "benchmarks")
    assert list(plots) == ["echo"]
    assert text.count("\n## ") == 1


def test_a_section_in_which_all_failed() -> None:
    rows: list[dict[str, Any]] = [{"path": "steer", "direction": "program", "error": "no bcc"},
                                  {"path": "sluice", "direction": "echo", "size": 64, "batch": 64,
                                   "error": "no CPU"}]  # fmt: skip
    text, plots = page(document(rows), "benchmarks")
    assert plots == {}
    assert "steer failed: no bcc" in text
    assert "sluice failed: no CPU" in text


def test_files_are_written_and_those_of_another_run_removed(tmp_path: Path) -> None:
    target = tmp_path / "benchmarks.md"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "old.svg").write_text("", encoding="ascii")
    (tmp_path / "benchmarks" / "notes.txt").write_text("", encoding="ascii")
    written = write_report(document(results()), target)
    assert written[0] == target
    assert {path.name for path in (tmp_path / "benchmarks").iterdir()} == {
        "notes.txt", *(path.name for path in written[1:])
    }  # fmt: skip
    for path in written[1:]:
        ET.parse(path)


def test_bars_are_as_long_as_their_values() -> None:
    found = widths(bars("a & b", ["one", "two"], [("x", [100.0, 50.0]), ("y", [None, 25.0])], "s"))
    assert len(found) == 3
    assert [width / found[0] for width in found] == pytest.approx([1, 0.5, 0.25], abs=0.01)


def test_ranges_are_logarithmic() -> None:
    svg = ranges("r", ["one"], [("x", [[1.0, 10.0, 1000.0]]), ("y", [None])], "s")
    large, *small = sorted(
        (-float(dot.get("r", "")), float(dot.get("cx", ""))) for dot in elements(svg, "circle")
    )
    first, second = (x - large[1] for _, x in small)
    assert large[0] == -4.5
    assert second / first == pytest.approx(3, rel=0.01)


def test_lines_are_as_high_as_their_values() -> None:
    svg = lines("l", ["1", "8", "64"], [("one", [10.0, 20.0, None]), ("two", [0.0, 5.0, 10.0])], "s")
    heights = [float(dot.get("cy", "")) for dot in elements(svg, "circle")]
    assert len(heights) == 5
    ground = heights[2]
    assert (ground - heights[1]) / (ground - heights[0]) == pytest.approx(2, rel=0.01)
    assert heights[4] == heights[0]


@pytest.mark.parametrize("highest", [0.003, 0.9, 1.0, 7.0, 99.0, 2_871_860.0, 3e9])
def test_scales_are_round_and_reach_the_highest(highest: float) -> None:
    found = steps(highest)
    assert found[0] == 0
    assert found[-2] < highest <= found[-1] * (1 + 1e-9)
    assert 3 <= len(found) <= 8


def test_decades_enclose_all_and_are_never_empty() -> None:
    assert decades(2.7, 556.0) == [1.0, 10.0, 100.0, 1000.0]
    assert decades(10.0, 10.0) == [10.0, 100.0]
    assert all(math.log10(mark).is_integer() for mark in decades(0.02, 3.0))


FIGURES = [(3_358_396, "3.36M"), (55_981, "56k"), (276.6, "277"), (37.4, "37.4"), (0.42, "0.42"), (0, "0"),
           (2.5e9, "2.5G")]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), FIGURES)
def test_figures_in_few_characters(value: float, text: str) -> None:
    assert short(value) == text


def test_nothing_to_draw_is_still_a_picture() -> None:
    for svg in (bars("b", ["one"], [("x", [None])], "s"), ranges("r", ["one"], [("x", [None])], "s"),
                lines("l", ["1"], [("one", [None])], "s")):  # fmt: skip
        assert elements(svg, "svg")[0].get("height")
