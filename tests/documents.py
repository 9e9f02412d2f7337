# SPDX-License-Identifier: Apache-2.0
"""What stands in README.md and docs: blocks of code, and the command lines among them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: For readers. Other Markdown in the repository is not about using Sluice.
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

#: First words of the command lines that documents may show, behind sudo and settings like A=B.
PROGRAMS = ("sluice", "tools/sluice", "python", ".venv/bin/python", "nsenter")

_FENCE = re.compile(r"```(\w*)$")
_INLINE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code that is set apart: fenced (with a language or "") or indented (no language)."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class CommandLine:
    """A command line as a reader would type it, without what the document says beside it."""

    where: str
    text: str
    #: set apart, so complete; within a sentence arguments may be missing
    whole: bool

    @property
    def words(self) -> list[str]:
        """Without sudo and settings; the first is the program."""
        words = shlex.split(self.text)
        while words[0] == "sudo" or "=" in words[0]:
            words = words[1:]
        return words

    @property
    def arguments(self) -> list[str] | None:
        """What `sluice` is given; None for another program."""
        words = self.words
        return words[1:] if words[0] in {"sluice", "tools/sluice"} else None


def blocks(path: Path) -> Iterator[Block]:
    """All of a document, in order."""
    language: str | None = None  # of the fence that is open
    indented = False
    start, lines = 0, list[str]()
    before = ""
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        fence = _FENCE.match(line)
        if language is not None:
            if line == "```":
                yield Block(path, start, language, "\n".join(lines) + "\n")
                language = None
            else:
                lines.append(line)
        elif indented and (line.startswith("    ") or not line.strip()):
            lines.append(line[4:])
        else:
            if indented:
                yield Block(path, start, "", "\n".join(lines).rstrip() + "\n")
                indented = False
            if fence:
                language, start, lines = fence[1], number + 1, []
            elif line.startswith("    ") and not before.strip():
                indented, start, lines = True, number, [line[4:]]
        before = line
    assert language is None, f"{path}: a fence is not closed"
    if indented:
        yield Block(path, start, "", "\n".join(lines).rstrip() + "\n")


def prose(path: Path) -> str:
    """The text between the blocks."""
    kept = []
    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def code_spans(path: Path) -> Iterator[str]:
    """`code` in sentences and tables, line breaks in it as blanks."""
    for found in _INLINE.finditer(prose(path)):
        yield " ".join(found[2].split())


def command_line(text: str, where: str, *, whole: bool) -> CommandLine | None:
    """The command at the start of a line; what follows two blanks or a # is said about it."""
    text = re.split(r"\s{2,}|\s#\s", text.strip())[0].strip()
    found = CommandLine(where, text, whole)
    try:
        words = found.words
    except (ValueError, IndexError):  # a quote without its end: not a command line
        return None
    return found if words[0] in PROGRAMS else None


def command_lines(path: Path) -> Iterator[CommandLine]:
    """All of a document: lines of blocks that show commands, and `sluice ...` in sentences."""
    for block in blocks(path):
        if block.language in {"", "sh"}:
            for offset, line in enumerate(block.text.splitlines()):
                where = f"{path.relative_to(ROOT)}:{block.line + offset}"
                found = command_line(line, where, whole=True) if line.strip() else None
                if found is not None:
                    yield found
    for span in code_spans(path):
        found = command_line(span, f"{path.relative_to(ROOT)}: `{span}`", whole=False)
        if found is not None and len(found.words) > 1:
            yield found
