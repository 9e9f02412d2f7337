# SPDX-License-Identifier: Apache-2.0
"""`sluice peers hold`, `release` and what `sluice peers` shows of them, on the real steer program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.steered import NEAR, Steered, in_namespace, namespace, udp_frame, until
from xdp import inventory
from xdp.owner_state import state_path

pytestmark = [pytest.mark.root, pytest.mark.bpf]

BOB, QUIET, STRANGER = "192.0.2.8", "192.0.2.7", "203.0.113.9"


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    with namespace(tmp_path_factory.mktemp("holds")) as made:
        made.hold(state=state_file(made))
        yield made


def state_file(made: Steered) -> Path:
    return state_path(NEAR, in_namespace(made.name, inventory.namespace_inode))


def seen(made: Steered) -> int:
    return int(made.json("status", "--interval", "0.05")["counters"]["seen"]["packets"])


def test_held_shown_and_released(steered: Steered) -> None:
    document = steered.json("peers", "hold", BOB, "--rate", "1", "--burst", "3", "--seconds", "600")
    assert (document["interface"], document["address"]) == (NEAR, BOB)
    assert document["hold"]["packets_per_second"] == 1
    assert document["hold"]["burst"] == 3
    assert 590 < document["hold"]["seconds"] <= 600

    before = seen(steered)
    steered.send([udp_frame(BOB, 8001)] * 10 + [udp_frame("10.1.2.3", 8001)] * 10)
    until(lambda: seen(steered) == before + 20, "all packets counted")
    verdicts = steered.json("status", "--interval", "0.05")["counters"]["verdicts"]
    assert verdicts["drop_held"]["packets"] == 7
    bob, other = steered.json("peers", "--all", "--sort", "drops")["peers"][:2]
    assert (bob["address"], bob["packets"], bob["drops"], bob["hold"]["drops"]) == (BOB, 10, 7, 7)
    assert (other["drops"], other.get("hold")) == (0, None)
    assert [one["address"] for one in steered.json("peers", "--held")["peers"]] == [BOB]
    text = steered.sluice("peers").stdout
    assert text.splitlines()[0].endswith("held at")
    assert "1/s, 5" in text

    assert steered.json("peers", "release", BOB)["was_held"] is True
    assert steered.json("peers", "release", BOB)["was_held"] is False
    assert steered.sluice("peers", "release", BOB).stdout == f"{BOB}: was not held\n"
    assert steered.sluice("peers", "--held").stdout == "no peer matches\n"
    assert "held at" not in steered.sluice("peers").stdout


def test_one_that_never_sent_anything(steered: Steered) -> None:
    held = steered.sluice("peers", "hold", QUIET, "--rate", "500", "--interface", NEAR)
    assert held.stdout == f"{QUIET}: at most 500 packets/s, 50 at once, for 60 s\n"
    (only,) = steered.json("peers", "--held")["peers"]
    assert (only["address"], only["packets"], only["hold"]["burst"]) == (QUIET, 0, 50)
    assert steered.sluice("peers", "release", QUIET).stdout == f"{QUIET}: released\n"


def test_map_names_a_hold(steered: Steered) -> None:
    """By a peer's number less one; changing one by hand needs --force."""
    assert steered.sluice("peers", "hold", QUIET, "--rate", "500").returncode == 0
    number = steered.json("peers", "--held")["peers"][0]["id"]
    value = steered.json("map", "get", "peer_holds", str(number - 1))["value"]
    assert (value["interval_ns"], value["burst"]) == (2_000_000, 49)
    assert steered.sluice("map", "delete", "peer_holds", "0").returncode != 0
    assert steered.sluice("peers", "release", QUIET).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["hold", STRANGER, "--rate", "5"], 2, f"{STRANGER} is no configured peer", "put it in the policy"),
        (["hold", "bob", "--rate", "5"], 2, "'bob' is no address", ""),
        (["hold", BOB], 2, "missing option '--rate'", "sluice peers hold --help"),
        (["hold", BOB, "--rate", "0"], 2, "invalid value for '--rate'", ""),
        (["hold", BOB, "--rate", "5", "--burst", "0"], 2, "invalid value for '--burst'", ""),
        (["hold", BOB, "--rate", "5", "--seconds", "0"], 2, "invalid value for '--seconds'", ""),
        (["hold", BOB, "--rate", "5", "--seconds", "3601"], 2, "invalid value for '--seconds'", ""),
        (["hold", BOB, "--rate", "5", "-i", "sl-far"], 7, "nothing is loaded on sl-far", ""),
        (["release", "nobody"], 2, "'nobody' is no address", ""),
        (["release"], 2, "missing argument 'ADDRESS'", ""),
    ],
)
def test_refused(steered: Steered, words: list[str], code: int, message: str, hint: str) -> None:
    done = steered.sluice("peers", *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert hint in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["hold", "release"])
def test_help(steered: Steered, command: str) -> None:
    done = steered.sluice("peers", command, "--help")
    assert done.returncode == 0
    assert f"Usage: sluice peers {command} [OPTIONS] ADDRESS" in done.stdout
    assert "Examples:" in done.stdout
