# SPDX-License-Identifier: Apache-2.0
"""A run of ``sluice simulate flow`` as SVG: throughput and window of each flow, and the queue, over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sluice_cli.bench_plot import Canvas, colour, short, steps
from userspace.simulation.flow_sender import BIN

if TYPE_CHECKING:
    from userspace.simulation.flow_report import Report
    from userspace.simulation.network import Network

_LEFT: Final = 70  # pixels, as all lengths here
_RIGHT: Final = 840
_TOP: Final = 66
_HEIGHT: Final = 150  # of a panel
_BETWEEN: Final = 52  # panels
#: Flows that have a name in the legend; with more of them the first ones stand for all.
_NAMED: Final = 6
#: Points of a line: more can't be told apart at this width, and 16 flows over an hour would make a long file.
_POINTS: Final = 385

_Series = Sequence[Sequence[float]]


def draw(report: Report, network: Network) -> str:
    """The file.  The same run gives the same bytes."""
    watched = network.links[0]
    title = f"{report.scenario.name}: {report.scenario.about}; seed {report.seed}"
    canvas = Canvas()
    canvas.head(title, [record.name for record in network.flows[:_NAMED]], left=_LEFT)
    megabit = 8e-6 / BIN
    throughput = [[size * megabit for size in record.goodput] for record in network.flows]
    windows = [[size / 1e3 for size in record.window] for record in network.flows if record.window]
    capacity = [size * megabit for size in watched.capacity]
    panels: list[tuple[str, _Series, Sequence[float]]] = [
        ("goodput, Mb/s; grey: the link", throughput, capacity),
        ("window, kB", windows, ()),
        ("longest wait in the queue, ms", [_longest(network)], ()),
    ]
    top = float(_TOP)
    for name, series, grey in panels:
        if series:
            _panel(canvas, top, name, series, grey, network.seconds)
            top += _HEIGHT + _BETWEEN
    return canvas.svg(top - 10, title)


def _longest(network: Network) -> list[float]:
    """Of each bin, milliseconds."""
    log = network.links[0].link.log
    assert log is not None
    found = [0.0] * len(network.links[0].capacity)
    for moment, delay in zip(log.times, log.delays, strict=True):
        index = int(moment / BIN)
        if index < len(found) and 1000 * delay > found[index]:
            found[index] = 1000 * delay
    return found


def _panel(
    canvas: Canvas, top: float, name: str, series: _Series, grey: Sequence[float], seconds: float
) -> None:
    thin = [_thinned(values) for values in series]
    under = _thinned(grey)
    marks = steps(max(max(values, default=0.0) for values in [*thin, under]))
    bottom = top + _HEIGHT

    def at(index: int, value: float, count: int) -> tuple[float, float]:
        x = _LEFT + (index + 0.5) / count * (_RIGHT - _LEFT)
        return x, bottom - value / marks[-1] * _HEIGHT

    canvas.text(_LEFT, top - 6, name, colour="#555555")
    for mark in marks:
        y = at(0, mark, 1)[1]
        canvas.line([(_LEFT, y), (_RIGHT, y)], "#dddddd")
        canvas.text(_LEFT - 8, y + 4, short(mark), "end", "#555555")
    for mark in steps(seconds):
        if mark <= seconds:
            x = _LEFT + mark / seconds * (_RIGHT - _LEFT)
            canvas.text(x, bottom + 15, f"{short(mark)} s", "middle", "#555555")
    if under:
        canvas.line([at(i, value, len(under)) for i, value in enumerate(under)], "#bbbbbb", 2)
    for number, values in enumerate(thin):
        canvas.line([at(i, value, len(values)) for i, value in enumerate(values)], colour(number), 1.2)


def _thinned(values: Sequence[float]) -> list[float]:
    """Means of neighbours, so that there are few enough."""
    group = -(-len(values) // _POINTS) or 1
    return [sum(part) / len(part) for i in range(0, len(values), group) if (part := values[i : i + group])]
