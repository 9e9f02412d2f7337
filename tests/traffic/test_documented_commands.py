# SPDX-License-Identifier: Apache-2.0
"""Every command line in README.md and docs is run here, on a machine as the documents have it.

`CASES` says of each how: one that is missing fails, and so does one that no document shows any more.
The launcher, tools/sluice, is left out of the way: tests/unit/test_launcher.py is about it.
"""

from __future__ import annotations

import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sluice_cli.lab import Lab, remove
from sluice_cli.main import EXIT_INTERRUPTED
from tests.documents import DOCUMENTS, CommandLine, command_lines
from tests.traffic.documented import (
    SECONDS,
    Machine,
    code_blocks,
    interrupt,
    machine,
    read_until,
    until,
)
from tests.unit.test_documents import parse
from xdp.errors import SluiceError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

POLICY = code_blocks("README.md", "toml")[0].text + '\n[owner]\nusers = ["nobody"]\n'


@dataclass(frozen=True)
class Case:
    """How a command line is run, and what it has to print.

    ``on`` is the state of eth1: with `sluice up` on it, free, or of no concern.
    ``ends`` is whether it ends by itself or goes on until Ctrl-C.
    ``more`` is appended, to make it short; ``instead`` replaces words that stand for something.
    """

    says: str
    on: Literal["served", "free", "any"] = "any"
    ends: bool = True
    more: tuple[str, ...] = ()
    instead: dict[str, str] = field(default_factory=dict)


def served(says: str, **options: str) -> Case:
    return Case(says, "served", instead=options)


def watched(says: str) -> Case:
    return Case(says, "served", ends=False)


SHORT = ("--seconds", "0.2", "--runs", "1", "--size", "64", "--path", "sluice")
LAB = "documented"  # stands for the random name of the lab that a test makes
NAMESPACE = "NAMESPACE"  # stands for the path of the one that eth1 is in
UP = r"eth1: native-copy, program \d+; serving /\S+\n"

#: Or what a program tells that a test beside this one runs.
NOBODY = r"no program tells of connections|\d+ of \d+ connections"
FEW = ("--udp", "10", "--quic", "1", "--seconds", "1")

#: By the words that a shell would see, without sudo and the folder of the launcher.
CASES: dict[str, Case] = {
    # In the order of the documents: README.md,
    "sluice demo": Case(r"(?s)votes.*bulk", more=("--seconds", "1", "--flood", "250000")),
    # Some files of each level: to import all of them takes half a minute.
    "sluice test": Case(
        r"tests? collected", more=("--", "--collect-only", "-q", "--ignore-glob=*/test_[!f]*.py")
    ),
    "sluice check policy.toml": Case(r"policy.toml: ok\n(?s:.*)votes"),
    "sluice doctor eth1": Case(r"(?s)interface eth1\n.*Sluice can be loaded here", "free"),
    "sluice up eth1 policy.toml": Case(UP, "free", ends=False),
    "sluice status": served(r"(?s)interface\s+eth1 .*mode\s+native-copy.*seen\s+\d+"),
    "sluice lanes --watch": watched(r"(?s)votes.*bulk.*\n\n"),
    "sluice peers --sort drops": served(r"203\.0\.113\.9"),
    "python docs/examples/receive.py eth1 policy.toml": Case(r"'mode': 'native-copy'", "free", ends=False),
    "python docs/examples/owner_client.py eth1": Case(r"'mode': 'native-copy'", "served", ends=False),
    "sluice lab up --queues 2": Case(r"is up, 2 queue\(s\)", more=("--name", LAB)),
    "sluice replay capture.pcap --lab default --to 10.81.0.1:8005": Case(r"\b8\b", instead={"default": LAB}),
    "sluice lab shell --host server -- tools/sluice doctor srv0": Case(
        r"interface srv0\n",
        instead={
            "server": f"server --name {LAB}",
            "tools/sluice": f"{shlex.quote(sys.executable)} -m sluice_cli",
        },
    ),
    "sluice lab down": Case("removed", more=("--name", LAB)),
    "sluice lab dns": Case(r"with Sluice", more=("--seconds", "0.5", "--only", "with", "--flood", "100000")),
    # docs/api.md,
    "sluice up eth1 policy.toml --socket /run/sluice-eth1.sock": Case(
        UP, "free", ends=False, instead={"/run/sluice-eth1.sock": "lanes.sock"}
    ),
    "sluice lanes": served(r"votes"),
    # docs/configuration.md,
    "sluice check FILE": Case(r"policy.toml: ok", instead={"FILE": "policy.toml"}),
    # docs/performance.md,
    "sluice bench receive": Case(r"sluice\s+64", more=SHORT),
    "sluice bench receive --same-core": Case(r"sluice\s+64", more=SHORT),
    "sluice bench transmit": Case(r"sluice\s+64", more=SHORT),
    "sluice bench fanout": Case(r"sluice\s+64", more=SHORT),
    "sluice bench echo": Case(r"sluice\s+64", more=SHORT),
    "sluice bench manager": Case(r"sluice-manager", more=("--seconds", "0.2", "--runs", "1", "--size", "64")),
    "sluice bench latency": Case(r"heartbeat", more=("--seconds", "0.2", "--load", "idle")),
    "sluice bench batch": Case(r"sluice\s+8 ", more=("--seconds", "0.2", "--path", "sluice", "--batch", "8")),
    "sluice bench cpu": Case(r"50,000\s+asyncio", more=("--seconds", "0.2", "--rate", "50000")),
    "sluice bench flow": Case(r"newreno\s+1%", more=("--packets", "1000", "--rounds", "1")),
    "sluice bench program": Case(r"(?s)v4.*v6", more=("--seconds", "0.5")),
    "sluice bench all --report docs/benchmarks.md": Case(
        r"sluice\s+64",
        more=("--quick", "--only", "echo", "--path", "sluice"),
        instead={"docs/benchmarks.md": "benchmarks.md"},
    ),
    # docs/benchmarks.md, the commands that are in no other document,
    "sluice bench soak": Case(r"socket", more=("--minutes", "0.01", "--rate", "2000", "--path", "socket")),
    "sluice up eth1 policy.toml --queues 2": Case(UP, "free", ends=False),
    "python docs/examples/busy_thread.py": Case(r"beside a busy thread\n"),
    "sluice up eth1 policy.toml --napi-defer-hard-irqs 2 --gro-flush-timeout 200000 --no-gro": Case(
        UP, "free", ends=False
    ),
    "sluice doctor": Case(r"this machine\n"),
    # docs/flow.md,
    "sluice simulate flow": Case(r"0 missed", more=("--scenario", "overload", "--seconds", "1")),
    "sluice simulate flow --list": Case(r"(?s)steady.*controllers: "),
    "sluice simulate flow --scenario step --controller cubic --seed 7 --plot step.svg": Case(
        r"(?s)step +cubic .*seed 7: 2 thresholds, 0 missed", more=("--seconds", "18")
    ),
    "sluice simulate flow --controller newreno --controller cubic --controller bbr --controller copa": Case(
        r"0 missed", more=("--scenario", "overload", "--seconds", "1")
    ),
    "sluice simulate flow --scenario codel --json": Case(
        r'"scenario": "codel"', more=("--seconds", "1", "--controller", "cubic")
    ),
    # docs/connections.md,
    "sluice simulate connections": Case(r"runs, 0 violations", more=("--seeds", "1")),
    "sluice simulate connections --list": Case(r"(?s)steady.*partition.*chaos"),
    "sluice simulate connections --scenario partition --seeds 1000": Case(
        r"3 runs, 0 violations", instead={"1000": "3"}
    ),
    "sluice simulate connections --scenario partition --seed 7 --verbose": Case(r"1 runs, 0 violations"),
    "sluice simulate connections --scenario link --scale 170 --seeds 10": Case(
        r"1 runs, 0 violations", instead={"10": "1"}
    ),
    "sluice simulate connections --scenario heavy-loss --seconds 3600 --seeds 1000 --json": Case(
        r'"violations": 0', instead={"3600": "60", "1000": "2"}
    ),
    # Thresholds are for the default controller: a second on a busy machine need not reach them.
    "sluice lab flow": Case(
        r"(?s)codel: .*simulated.*0 missing",
        more=("--scenario", "codel", "--controller", "newreno", "--seconds", "1"),
    ),
    "sluice lab flow --scenario loss --controller cubic --seconds 10": Case(
        r"(?s)loss: .*simulated.*0 missing", more=("--seconds", "1")
    ),
    "sluice lab flow --scenario codel --controller newreno --mode mmsg --json": Case(
        r'"mode": "mmsg"', more=("--seconds", "1")
    ),
    "sluice peers hold 192.0.2.7 --rate 500": served(
        r"192\.0\.2\.7: at most 500 packets/s, 50 at once, for 60 s\n"
    ),
    "sluice peers hold 192.0.2.7 --rate 500 --burst 20 --seconds 600": served(
        r"192\.0\.2\.7: at most 500 packets/s, 20 at once, for 600 s\n"
    ),
    "sluice peers --held": served(r"192\.0\.2\.7 .* 500/s, \d+ s more\n"),
    "sluice peers release 192.0.2.7": served(r"192\.0\.2\.7: released\n"),
    # docs/connections.md; what programs tell is shown by tests/unit/test_connection_publisher.py,
    "sluice connections": Case(NOBODY),
    "sluice connections --watch": Case(NOBODY, ends=False),
    "sluice connections --health unhealthy --health dead": Case(NOBODY),
    "sluice connections --endpoint 192.0.2.7 --json": Case(r'"programs": '),
    "sluice connections --connection 17": Case(NOBODY),
    "sluice bench connections": Case(
        r"sluice lookup", more=("--only", "calls", "--connections", "100", "--rounds", "1")
    ),
    "sluice bench connections --cycles --minutes 10": Case(
        r"(?s)a live connection.*connects and disconnects",
        more=("--only", "calls", "--connections", "100", "--rounds", "1", "--minutes", "0.05"),
    ),
    # Thresholds of time are no test of a busy machine: die waits for one that is long.
    "sluice lab connections": Case(r"(?s)known dead after.*holds", more=(*FEW, "--trial", "die")),
    "sluice lab connections --quick": Case(r"(?s)known dead after.*holds", more=(*FEW, "--trial", "die")),
    "sluice lab connections --ipv6 --trial move": Case(
        r"(?s)known dead after.*holds", more=FEW, instead={"move": "die"}
    ),
    "sluice lab connections --trial cut --trial kill --mode mmsg --json": Case(
        r'"mode": "mmsg"', more=FEW, instead={"cut": "blackhole", "kill": "die"}
    ),
    # docs/internals.md,
    "sluice lab vm": Case(r"(?s)virtio: .*igb: .*test_paths", more=("--plan",)),
    # docs/troubleshooting.md.
    "sluice status -v": served(r"verdicts?"),
    "sluice map dump rules": served(r"tpu-vote"),
    "sluice map list": served(r"strangers"),
    "sluice map show strangers": served(r"set-associative"),
    "sluice map dump counters --per-cpu": served(r"seen"),
    "sluice map watch counters": watched(r"\S+\n\n"),
    "sluice map get known 192.0.2.7": served(r"192\.0\.2\.7"),
    "sluice map delete strangers 203.0.113.9": served(r""),
    "sluice map dump ports": served(r"8005"),
    "sluice map get rules SERVICE/CLASS/KIND": served(
        r"votes", **{"SERVICE/CLASS/KIND": "tpu-vote/staked/other"}
    ),
    "sluice peers release ADDRESS": served(r"192\.0\.2\.7: (released|was not held)\n", ADDRESS="192.0.2.7"),
    "sluice peers --class CLASS": served(r"10\.81\.0\.2", CLASS="staked"),
    "nsenter --net=/run/netns/NAME sluice status": served(
        r"interface\s+eth1 ",
        **{
            "--net=/run/netns/NAME": f"--net={NAMESPACE}",
            "sluice": f"{shlex.quote(sys.executable)} -m sluice_cli",
        },
    ),
    "sluice peers": served(r"10\.81\.0\.2"),
    "sluice down": Case(r"eth1", "served"),
}

#: They need each other, in this order.
IN_A_LAB = [words for words, case in CASES.items() if LAB in f"{case.more}{case.instead}"]


def words_of(line: CommandLine) -> str:
    program, *rest = line.words
    return " ".join([program.rpartition("/")[2], *rest])


def is_complete(line: CommandLine) -> bool:
    """A sentence may name a command without all of its arguments: that can't be run."""
    if line.whole or line.arguments is None:
        return True
    try:
        context = parse(line.arguments, whole=True)
    except (SluiceError, AssertionError):
        return False
    return not hasattr(context.command, "commands")


def test_every_command_line_has_a_case() -> None:
    shown = {words_of(line) for path in DOCUMENTS for line in command_lines(path) if is_complete(line)}
    assert shown - set(CASES) == set(), "no test runs these"
    assert set(CASES) - shown == set(), "no document shows these"


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with machine(folder, POLICY) as made:
            yield made


def run(here: Machine, words: str) -> None:
    case = CASES[words]
    typed = " ".join(case.instead.get(word, word) for word in words.split())
    typed = typed.replace(NAMESPACE, str(here.lab.server.path))
    process = here.start([*shlex.split(typed), *case.more])
    try:
        if case.ends:
            out, errors = process.communicate(timeout=2 * SECONDS)
            assert process.returncode == 0, f"{out.decode()}{errors.decode()}"
            assert re.search(case.says, out.decode()), f"{out.decode()}{errors.decode()}"
            return
        read_until(process, case.says)
        code, said = interrupt(process)
        # What holds something ends in order; a display is interrupted.
        assert code == (EXIT_INTERRUPTED if "watch" in words else 0), said
    finally:
        # Or the commands after a failed one fail too.
        if process.poll() is None:
            process.terminate()
            process.communicate()


def of(state: str) -> list[str]:
    return [words for words, case in CASES.items() if case.on == state and words not in IN_A_LAB]


@pytest.mark.parametrize("words", of("any"))
def test_anywhere(host: Machine, words: str) -> None:
    run(host, words)


@pytest.mark.parametrize("words", of("free"))
def test_on_a_free_interface(host: Machine, words: str) -> None:
    run(host, words)
    assert not host.carries_program()


@pytest.fixture(scope="module")
def up(host: Machine) -> Iterator[Machine]:
    """With `sluice up` on eth1, which has seen a configured peer and a stranger."""
    process = host.start(["sluice", "up", "eth1", "policy.toml"])
    read_until(process, "serving")
    host.send(3)
    host.send_from_stranger()
    until(lambda: host.counters().seen.packets >= 4, "all seen")
    yield host
    # `sluice down`, the last of the commands, has ended it.
    until(lambda: process.poll() is not None, "sluice up to end")
    assert process.returncode == 0
    assert not host.carries_program()


@pytest.mark.parametrize("words", [*of("served")])
def test_beside_sluice_up(up: Machine, words: str) -> None:
    run(up, words)


def test_in_a_lab(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"doc-{secrets.token_hex(3)}"
    try:
        for words in IN_A_LAB:
            case = CASES[words]
            more = tuple(word.replace(LAB, name) for word in case.more)
            instead = {key: value.replace(LAB, name) for key, value in case.instead.items()}
            monkeypatch.setitem(CASES, words, Case(case.says, case.on, case.ends, more, instead))
            run(host, words)
    finally:
        remove(name)
    with pytest.raises(SluiceError):
        Lab.open(name)
