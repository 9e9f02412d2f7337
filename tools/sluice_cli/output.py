# SPDX-License-Identifier: Apache-2.0
"""How commands speak: JSON documents, tables, and colour only where someone looks.

Every command takes ``--json``, ``--verbose`` and ``--color`` through :func:`common_options` and gets an
:class:`Output`.  A report is one call: :meth:`Output.report` prints the document as JSON (with the
``version`` field that every document has) or calls the function that shows it to a person.
"""

from __future__ import annotations

import functools
import json as jsonlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

import click

#: Of every JSON document. Raised only when a field is removed or changes its meaning.
JSON_VERSION = 1

Color = Literal["auto", "always", "never"]


@dataclass(slots=True)
class Table:
    """Rows of text. ``right`` holds the indices of the columns that are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    title: str = ""
    #: the style of a whole row, by its index
    styles: Mapping[int, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The table in plain text, columns two spaces apart, no trailing blanks."""
        head = [list(self.columns)] if any(self.columns) else []
        cells = [*head, *map(list, self.rows)]
        widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(self.columns))]
        if self.title:
            yield self.title
        for row in cells:
            parts = (
                text.rjust(width) if i in self.right else text.ljust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  ".join(parts).rstrip()


@dataclass(slots=True)
class Output:
    """What the user asked for about output."""

    json: bool = False
    verbose: bool = False
    color: Color = "auto"

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Output:
        """From a raw command line, for errors that come before it was parsed."""
        words = words[: words.index("--")] if "--" in words else words
        color: Color = "auto"
        for i, word in enumerate(words):
            value = word.removeprefix("--color=") if word.startswith("--color=") else ""
            if word == "--color" and i + 1 < len(words):
                value = words[i + 1]
            if value in ("always", "never"):
                color = "always" if value == "always" else "never"
        return cls("--json" in words, "--verbose" in words or "-v" in words, color)

    def colored(self, stream: TextIO | None = None) -> bool:
        """Whether to use colour on a stream (https://no-color.org)."""
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return (stream or sys.stdout).isatty()

    def report(self, document: Mapping[str, object], show: Callable[[], object]) -> None:
        """The result of a command: the document with --json, else what ``show`` prints."""
        if self.json:
            write_json(document)
        else:
            show()

    def line(self, text: str = "", style: str = "") -> None:
        """One line of text; ``style`` is a colour name or "bold"."""
        _echo(text, style if self.colored() else "")

    def error_line(self, text: str, style: str = "") -> None:
        """One line on stderr."""
        _echo(text, style if self.colored(sys.stderr) else "", err=True)

    def note(self, text: str) -> None:
        """Something to know that is no part of the result; not shown with --json."""
        if not self.json:
            self.error_line(f"note: {text}")

    def progress(self, text: str) -> None:
        """What a long command is doing; on stderr, for those who watch (or asked with --verbose)."""
        if self.verbose or sys.stderr.isatty():
            self.error_line(text)

    def table(self, table: Table) -> None:
        """A table: through rich on a terminal, plain aligned text elsewhere."""
        if sys.stdout.isatty():
            self._console().print(_rich_table(table))
        else:
            for line in table.lines():
                click.echo(line)

    def tables(self, tables: Iterable[Table]) -> None:
        """Several tables with an empty line between them (rich leaves one below each by itself)."""
        for i, table in enumerate(tables):
            if i and not sys.stdout.isatty():
                click.echo()
            self.table(table)

    def watch(self, frames: Iterable[tuple[Mapping[str, object], Sequence[Table]]]) -> None:
        """Show frame after frame: redrawn on a terminal, else one after another (a line each with --json)."""
        if self.json:
            for document, _ in frames:
                write_json(document, compact=True)
        elif sys.stdout.isatty():
            from rich.console import Group
            from rich.live import Live

            with Live(console=self._console(), auto_refresh=False) as live:
                for _, tables in frames:
                    live.update(Group(*map(_rich_table, tables)), refresh=True)
        else:
            for _, tables in frames:
                self.tables(tables)
                click.echo()
                sys.stdout.flush()

    def _console(self) -> Any:
        from rich.console import Console

        return Console(no_color=not self.colored(), highlight=False)


def _rich_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        box=box.SIMPLE_HEAD,
        title=table.title or None,
        title_justify="left",
        pad_edge=False,
        show_header=any(table.columns),
    )
    for i, column in enumerate(table.columns):
        made.add_column(column, justify="right" if i in table.right else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        made.add_row(*(Text(cell) for cell in row), style=table.styles.get(i, ""))
    return made


def _echo(text: str, style: str, *, err: bool = False) -> None:
    if style:
        styled = click.style(text, bold=True) if style == "bold" else click.style(text, fg=style)
        click.echo(styled, err=err, color=True)  # or click takes it out again where there is no terminal
    else:
        click.echo(text, err=err)


def write_json(document: Mapping[str, object], *, compact: bool = False) -> None:
    """Print one document, its version first; ``compact`` puts it on one line."""
    click.echo(jsonlib.dumps({"version": JSON_VERSION, **document}, indent=None if compact else 2))
    if compact:
        sys.stdout.flush()


def examples(text: str) -> str:
    """Examples for the end of a command's help (its ``epilog``), with the line breaks kept."""
    return "\b\nExamples:\n" + "\n".join(f"  {line.strip()}" for line in text.strip().splitlines())


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, --verbose and --color to a command, which gets an :class:`Output` as first argument.

    The options may stand before or after the command's name: ``sluice --json status`` and
    ``sluice status --json`` are the same.
    """

    @click.option("--json", "json_", is_flag=True, help='Print JSON with a "version" field.')
    @click.option("-v", "--verbose", is_flag=True, help="Say more, and show the kernel's words with errors.")
    @click.option("--color", type=click.Choice(["auto", "always", "never"]), default=None,
                  help="Colour: auto means on a terminal, unless NO_COLOR is set.")  # fmt: skip
    @click.pass_context
    @functools.wraps(function)
    def command(
        ctx: click.Context, /, *args: Any, json_: bool, verbose: bool, color: Color | None, **options: Any
    ) -> Any:
        outer = ctx.find_object(Output) or Output()
        output = Output(json_ or outer.json, verbose or outer.verbose, color or outer.color)
        ctx.obj = output
        return function(output, *args, **options)

    return command


def samples(interval: float, count: int | None = None) -> Iterator[int]:
    """Yield 0, 1, 2, ... every ``interval`` seconds, on a fixed grid so that delays don't add up."""
    start = time.monotonic()
    number = 0
    while count is None or number < count:
        if number:
            time.sleep(max(0.0, start + number * interval - time.monotonic()))
        yield number
        number += 1
