# SPDX-License-Identifier: Apache-2.0
"""Plots of ``sluice bench all`` as SVG 1.1: bars, ranges on a logarithmic scale, lines.

Written out here, not by a plotting library: three kinds of plots are all that is needed, the same figures
have to give the same bytes (the files are under version control), and matplotlib with what it needs would
be more to install than all of Sluice's other dependencies together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

#: Told apart by people who see colours differently, too (Okabe and Ito).
_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
_WIDTH: Final = 860  # pixels, as all lengths here
_LEFT: Final = 180  # for names
_RIGHT: Final = 110  # for figures behind bars
_TOP: Final = 62  # for title and legend
_BOTTOM: Final = 34
_BAR: Final = 13
_GAP: Final = 9
_FONT: Final = 'font-family="sans-serif" font-size="12"'


@dataclass
class Canvas:
    """Elements in the order in which they are drawn; ``sluice simulate`` draws on it as well."""

    elements: list[str] = field(default_factory=list)

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """From its upper left corner."""
        self.elements.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
        )

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """Through all of them."""
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 3.5) -> None:
        """Around a point."""
        self.elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str = "#222222", more: str = ""
    ) -> None:
        """``anchor``: what of it is at the point, start, middle or end; ``more`` attributes."""
        attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{more}'
        self.elements.append(f"<text {attributes}>{escape(text)}</text>")

    def head(self, title: str, series: Sequence[str], left: float = _LEFT) -> None:
        """Title and legend; one series needs no legend."""
        self.text(12, 22, title, more=' font-size="15" font-weight="bold"')
        x = left
        for name, colour in zip(series, _COLOURS, strict=False) if len(series) > 1 else ():
            self.rectangle(x, 36, 11, 11, colour)
            self.text(x + 16, 46, name)
            x += 34 + 7 * len(name)

    def svg(self, height: float, title: str) -> str:
        """The file."""
        size = f'viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {_FONT}>',
                f"<title>{escape(title)}</title>",
                f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def short(value: float) -> str:
    """A figure in few characters: 3.36M, 55.9k, 276.6, 0.42."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def steps(highest: float) -> list[float]:
    """Round numbers from 0 to at least ``highest``, four to eight of them."""
    if highest <= 0:
        return [0.0, 1.0]
    size = 10.0 ** math.floor(math.log10(highest))
    step = next(part * size for part in (0.2, 0.25, 0.5, 1, 2) if highest / (part * size) <= 6)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def decades(lowest: float, highest: float) -> list[float]:
    """Powers of ten around two numbers above 0; at least one decade."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def bars(
    title: str, series: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], unit: str
) -> str:
    """Horizontal bars: for each row (name, a value for each series); None has no bar."""
    values = [value for _, found in rows for value in found if value is not None]
    marks = steps(max(values, default=0.0))
    width = _WIDTH - _LEFT - _RIGHT

    def place(value: float) -> float:
        return _LEFT + max(0.0, value) / marks[-1] * width

    canvas = Canvas()
    bottom = _rows(canvas, title, series, [(name, len(found)) for name, found in rows], marks, place, unit)
    y = float(_TOP)
    for _, found in rows:
        for index, value in enumerate(found):
            if value is not None:
                canvas.rectangle(_LEFT, y, place(value) - _LEFT, _BAR - 2, colour(index))
                canvas.text(place(value) + 5, y + _BAR - 3, short(value), colour="#555555")
            y += _BAR
        y += _GAP
    return canvas.svg(bottom + _BOTTOM, title)


def ranges(
    title: str,
    series: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[float] | None]]],
    unit: str,
) -> str:
    """On a logarithmic scale, for each row and series: a line over its values and a dot at each.

    The first value's dot is large.  Values are above 0; None has nothing.
    """
    values = [value for _, found in rows for group in found if group for value in group]
    marks = decades(min(values, default=1.0), max(values, default=10.0))
    width = _WIDTH - _LEFT - _RIGHT
    lowest, highest = math.log10(marks[0]), math.log10(marks[-1])

    def place(value: float) -> float:
        return _LEFT + (math.log10(value) - lowest) / (highest - lowest) * width

    canvas = Canvas()
    bottom = _rows(canvas, title, series, [(name, len(found)) for name, found in rows], marks, place, unit)
    y = float(_TOP)
    for _, found in rows:
        for index, group in enumerate(found):
            middle = y + _BAR / 2 - 1
            if group:
                canvas.line([(place(min(group)), middle), (place(max(group)), middle)], colour(index), 2)
                for value in group[1:]:
                    canvas.dot(place(value), middle, colour(index), 2.5)
                canvas.dot(place(group[0]), middle, colour(index), 4.5)
                canvas.text(place(max(group)) + 8, y + _BAR - 3, short(group[0]), colour="#555555")
            y += _BAR
        y += _GAP
    return canvas.svg(bottom + _BOTTOM, title)


def _rows(
    canvas: Canvas,
    title: str,
    series: Sequence[str],
    rows: Sequence[tuple[str, int]],
    marks: Sequence[float],
    place: Callable[[float], float],
    unit: str,
) -> float:
    """Head, names at the left, a grid with its scale below; returns where the rows end."""
    canvas.head(title, series)
    bottom = _TOP + sum(count * _BAR + _GAP for _, count in rows)
    for mark in marks:
        canvas.line([(place(mark), _TOP - 6), (place(mark), bottom)], "#dddddd")
        canvas.text(place(mark), bottom + 14, short(mark), "middle", "#555555")
    canvas.text(_WIDTH - 12, bottom + 28, unit, "end", "#555555")
    y = float(_TOP)
    for name, count in rows:
        canvas.text(_LEFT - 8, y + count * _BAR / 2 + 3, name, "end")
        y += count * _BAR + _GAP
    return bottom


def lines(
    title: str, places: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], unit: str
) -> str:
    """A line for each series over places that are equally far apart, from 0 up; None leaves its place out."""
    values = [value for _, found in series for value in found if value is not None]
    marks = steps(max(values, default=0.0))
    height, width = 240, _WIDTH - _LEFT - _RIGHT
    canvas = Canvas()
    canvas.head(title, [name for name, _ in series])

    def at(index: int, value: float) -> tuple[float, float]:
        x = _LEFT + (index * width / (len(places) - 1) if len(places) > 1 else width / 2)
        return x, _TOP + height - value / marks[-1] * height

    for mark in marks:
        y = at(0, mark)[1]
        canvas.line([(_LEFT - 6, y), (_LEFT + width + 6, y)], "#dddddd")
        canvas.text(_LEFT - 12, y + 4, short(mark), "end", "#555555")
    for index, name in enumerate(places):
        canvas.text(at(index, 0)[0], _TOP + height + 16, name, "middle", "#555555")
    canvas.text(12, _TOP + 4, unit, colour="#555555")
    for number, (_, found) in enumerate(series):
        points = [at(index, value) for index, value in enumerate(found) if value is not None]
        canvas.line(points, colour(number), 2)
        for x, y in points:
            canvas.dot(x, y, colour(number))
    return canvas.svg(_TOP + height + _BOTTOM, title)


def colour(index: int) -> str:
    """Of a series; there are seven."""
    return _COLOURS[index % len(_COLOURS)]
