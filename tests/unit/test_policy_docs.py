# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md and docs/examples say what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from tests.unit.policy_texts import CLASSES, LANES, SERVICE
from xdp import policy_model as model
from xdp import policy_read
from xdp.policy import Policy
from xdp.policy_place import keys_of

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "configuration.md").read_text(encoding="utf-8")

#: Heading of each table of keys and the struct whose fields it documents.
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "Top level": Policy,
    "stranger_prefix": model.StrangerPrefix,
    "lane": model.Lane,
    "class": model.Class,
    "A peer as a table": policy_read.PeerTable,
    "service": model.Service,
    "service.kind": model.Kind,
    "service.kind.match": model.Match,
    "service.rule": model.Rule,
    "rings": model.Rings,
    "companion": model.Companion,
    "owner": model.Owner,
    "interface": model.Interface,
    "tuning": model.Tuning,
}


def rows(heading: str) -> list[list[str]]:
    """The rows of the table of keys under a heading: key, type, default, allowed, example."""
    section = re.split(r"^#+ ", TEXT, flags=re.MULTILINE)
    body = next(part for part in section if part.split("\n", 1)[0] == heading)
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert table[0] == "| key | type | default | allowed | example |"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_table_of_keys_is_known() -> None:
    found = [
        part.split("\n", 1)[0]
        for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)
        if "| key | type | default | allowed | example |" in part
    ]
    assert found == list(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_documented_keys_are_the_keys_of_the_model(heading: str) -> None:
    documented = [row[0].strip("`") for row in rows(heading)]
    assert documented == list(keys_of(SECTIONS[heading]))
    assert all(len(row) == 5 and all(row) for row in rows(heading))


@pytest.mark.parametrize("heading", ["stranger_prefix", "rings", "companion", "interface"])
def test_documented_defaults_are_those_of_the_model(heading: str) -> None:
    defaults = SECTIONS[heading]()
    for key, _, default, _, _ in rows(heading):
        value = getattr(defaults, key.strip("`"))
        assert tomllib.loads(f"x = {default.strip('`')}")["x"] == value


#: What stands before an example's table, and the keys that the table cannot do without.
AROUND: dict[str, tuple[str, dict[str, str]]] = {
    "lane": ("[[lane]]", {"name": 'name = "x"'}),
    "class": ("[[class]]", {"name": 'name = "x"'}),
    "A peer as a table": ("[[class]]", {"name": 'name = "x"'}),
    "service": ("[[service]]", {"name": 'name = "x"', "ports": "ports = [1]"}),
    "service.kind": (
        '[[service]]\nname = "x"\nports = [1]\n[[service.kind]]',
        {"name": 'name = "k"', "match": 'match = [{ offset = 0, value = "00" }]'},
    ),
    "service.kind.match": (
        '[[service]]\nname = "x"\nports = [1]\n[[service.kind]]',
        {"name": 'name = "k"'},
    ),
    "service.rule": (
        (
            '[[service]]\nname = "x"\nports = [1]\n[[service.kind]]\nname = "data"\n'
            'match = [{ offset = 0, value = "00" }]\n[[service.rule]]'
        ),
        {"action": 'action = "lane"', "lane": 'lane = "votes"'},
    ),
}

#: Keys that need another one beside them.
NEEDS = {
    "burst": "rate = 5",
    "peer_burst": "peer_rate = 5",
    "prefix_burst": "prefix_rate = 5",
    "busy_poll_budget": "busy_poll = 5",
    "prefer_busy_poll": "busy_poll = 5",
    "napi_defer_hard_irqs": "gro_flush_timeout = 5",
}


def example_policy(heading: str, key: str, example: str) -> str:
    """A whole policy in which ``example``, the value of ``key``, stands where it belongs."""
    top = heading in {"Top level", "stranger_prefix"}
    before, needed = AROUND.get(heading, ("" if top else f"[{heading}]", {}))
    lines = dict(needed)
    lines[example.split(" = ", 1)[0]] = example
    if key in NEEDS:
        lines["beside"] = NEEDS[key]
    if heading == "lane" and key in {"over", "demote"}:
        lines["beside"] = NEEDS["burst"]
    own = "\n".join([before, *lines.values()]) + "\n"
    lanes = '[[lane]]\nname = "bulk"\n' if heading == "lane" else LANES
    classes = "" if before == "[[class]]" else CLASSES + '[[class]]\nname = "strangers"\n'
    services = "" if before.startswith("[[service]]") else SERVICE
    version = "" if key == "version" else "version = 1\n"
    if top or heading == "lane":
        return version + own + lanes + classes + services
    return version + lanes + classes + services + own


@pytest.mark.parametrize(
    ("heading", "key", "example"),
    [
        (heading, row[0].strip("`"), row[4].strip("`"))
        for heading in SECTIONS
        for row in rows(heading)
        if not row[4].startswith("`[")  # a table, whose own keys have examples
    ],
)
def test_every_example_is_accepted(heading: str, key: str, example: str, tmp_path: Path) -> None:
    (tmp_path / "staked.txt").write_text("198.51.100.9\n")
    Policy.parse(example_policy(heading, key, example), f"{heading}: {example}", directory=tmp_path)


def test_the_first_example_is_a_policy() -> None:
    read = Policy.parse(TEXT.split("```toml", 1)[1].split("```", 1)[0])
    assert read.lane_names == ("votes", "bulk")


@pytest.mark.parametrize("name", ["validator", "dns", "game"])
def test_example_policies_are_accepted(name: str) -> None:
    read = Policy.load(DOCS / "examples" / f"{name}.toml")
    assert read.services
    for entry in read.services:
        assert entry.rules


def test_the_peers_file_in_the_documentation_is_accepted(tmp_path: Path) -> None:
    lines = re.search(r"comment\. It is UTF-8.*?\n\n((?:    .*\n)+)", TEXT)
    assert lines is not None
    (tmp_path / "staked.txt").write_text(lines[1])
    (tmp_path / "p.toml").write_text(
        f'version = 1\n{LANES}[[class]]\nname = "a"\npeers_file = "staked.txt"\n{SERVICE}'
    )
    assert [peer.name for peer in Policy.load(tmp_path / "p.toml").peers] == [
        "validator-a",
        "validator-a",
        "",
    ]
