# SPDX-License-Identifier: Apache-2.0
"""What README.md, docs and the help texts say exists: links, files, names, policies, commands and options."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sluice_cli.main import SUBCOMMANDS, cli
from tests.documents import (
    DOCUMENTS,
    ROOT,
    Block,
    CommandLine,
    blocks,
    code_spans,
    command_line,
    command_lines,
    prose,
)
from xdp.errors import SluiceError
from xdp.policy import Policy

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
COMMANDS = [line for path in DOCUMENTS for line in command_lines(path)]

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_PATH = re.compile(r"(?<![\w./-])(?:bpf|docs|tests|tools|userspace|xdp|\.ci)/[\w./*-]*[\w*]")
_DOTTED = re.compile(r"(?:xdp|userspace|sluice_cli)(?:\.\w+)+")

#: Where this was written or installed, as against where it is for its reader.
_MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|home|root|tmp|mnt|Users)/\S+")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(line: CommandLine) -> str:
    return line.text


def anchors(path: Path) -> set[str]:
    """What links within a page can point to, as GitHub makes it of headings."""
    titles = _HEADING.findall(prose(path))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_is_something_to_look_at() -> None:
    """All that follows would pass on nothing."""
    assert {named(path) for path in DOCUMENTS} >= {"README.md", "docs/api.md", "docs/configuration.md"}
    assert {block.language for block in BLOCKS} >= {"", "python", "toml"}
    assert len(COMMANDS) > 20
    assert len(list(help_examples())) > 40


def test_what_is_found_in_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fences, indented blocks, command lines with what is said beside them, and those in sentences."""
    monkeypatch.setattr("tests.documents.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        """# Title
Some `sudo tools/sluice status
-v` and `code`, with two
    words of a continued line.

    sudo A=1 sluice lanes --watch    what happens
    output: of something

    sluice check 'a b.toml'          # quoted

```python
x = 1
```
```
sluice peers
```
""",
        encoding="utf-8",
    )
    found = list(blocks(page))
    assert [(block.line, block.language) for block in found] == [(6, ""), (12, "python"), (15, "")]
    assert found[0].text.splitlines()[1:3] == ["output: of something", ""]
    assert found[1].text == "x = 1\n"
    assert [(line.arguments, line.whole) for line in command_lines(page)] == [
        (["lanes", "--watch"], True),
        (["check", "a b.toml"], True),
        (["peers"], True),
        (["status", "-v"], False),
    ]
    assert anchors(page) == {"title"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_resolve(path: Path) -> None:
    for target in _LINK.findall(prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_named_exist(path: Path) -> None:
    for name in _PATH.findall(path.read_text(encoding="utf-8")):
        # From the top of the repository, or a link from where the document is.
        assert any(ROOT.glob(name)) or (path.parent / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_names_in_python_exist(path: Path) -> None:
    for span in code_spans(path):
        for dotted in _DOTTED.findall(span):
            resolve(dotted)


def resolve(dotted: str) -> object:
    """A module, or what is in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=str)
def test_policies_load(block: Block, tmp_path: Path) -> None:
    (tmp_path / "staked.txt").write_text("192.0.2.7  validator-a\n", encoding="utf-8")
    assert Policy.parse(block.text, str(block), directory=tmp_path).services


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_compiles(block: Block) -> None:
    """Without a warning too, as those are errors in the tests."""
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_examples_compile_and_are_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    compile(text, str(path), "exec")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert any(f"/{path.name}" in one.read_text(encoding="utf-8") for one in DOCUMENTS)


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=named)
def test_no_paths_of_a_machine(path: Path) -> None:
    assert not _MACHINE_PATHS.findall(path.read_text(encoding="utf-8"))


def all_commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(words), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from all_commands(inner, (*words, name))


def help_examples() -> Iterator[CommandLine]:
    """The examples at the end of every help text."""
    for name, command in all_commands(cli, ("sluice",)):
        for line in f"{command.help or ''}\n{command.epilog or ''}".splitlines():
            found = command_line(line, f"{name} --help", whole=True)
            if found is not None:
                yield found


def parse(arguments: list[str], *, whole: bool) -> click.Context:
    """As the command line is read, down to the subcommand, running nothing.

    Not click's resilient parsing: that takes unknown options without a word.
    """
    context = cli.make_context("sluice", list(arguments))
    while isinstance(context.command, click.Group):
        rest = [*getattr(context, "_protected_args", ()), *context.args]  # one list from click 9 on
        if not rest:
            break
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        try:
            context = command.make_context(name, rest, parent=context)
        except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
            assert not whole
            break
    return context


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.arguments is not None], ids=text_of)
def test_commands_in_documents(line: CommandLine) -> None:
    assert line.arguments is not None
    parse(line.arguments, whole=line.whole)


@pytest.mark.parametrize("line", list(help_examples()), ids=text_of)
def test_examples_in_help_texts(line: CommandLine) -> None:
    assert line.arguments is not None, "the help of sluice is about sluice"
    parse(line.arguments, whole=True)


@pytest.mark.parametrize("name", [name for name, command in all_commands(cli, ("sluice",))
                                  if not isinstance(command, click.Group)])  # fmt: skip
def test_every_command_has_examples(name: str) -> None:
    words = name.split()[1:]
    assert any(
        line.arguments is not None and line.arguments[: len(words)] == words for line in help_examples()
    )


@pytest.mark.parametrize(
    "words",
    [
        "statsu",
        "status --intervall 5",
        "map dmup ports",
        "up --check eth1",
        "peers --sort size",
        "lanes eth1 eth2",
    ],
)
def test_a_wrong_command_is_found(words: str) -> None:
    with pytest.raises((SluiceError, click.ClickException, AssertionError)):
        parse(words.split(), whole=True)


def test_all_subcommands_are_told_of() -> None:
    """Each is shown in some document."""
    shown = {line.arguments[0] for line in COMMANDS if line.arguments}
    assert shown >= set(SUBCOMMANDS)
