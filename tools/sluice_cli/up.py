# SPDX-License-Identifier: Apache-2.0
"""``sluice up``: own an interface, run a policy on it, serve its lanes.

In the foreground: the program is on the interface as long as this process lives, however it ends.
With ``--persist`` the program stays by a pin and the process ends; then nobody serves sockets, so
lanes that end in the kernel work and the others pass.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any, get_args

import click

from sluice_cli.output import Output, common_options, examples, write_json
from sluice_cli.tuning_text import tuned_documents, tuned_rows
from sluice_cli.up_persist import refresh
from userspace.datagram.broker import Broker
from userspace.datagram.owner import Owner
from xdp.errors import PermissionsError, SluiceError, UsageError
from xdp.interface import Tuning
from xdp.policy import Policy
from xdp.policy_model import InterfaceMode
from xdp.policy_tuning import MAX_DEFERRED, MAX_FLUSH_TIMEOUT, remarks
from xdp.program import SteerProgram
from xdp.state import socket_path
from xdp.tables import compile_policy
from xdp.watch import interface_index, is_up


@click.command(
    epilog=examples(
        """sudo sluice up eth1 validator.toml
        sudo sluice up eth1 dns.toml --persist      stays until `sluice down eth1`
        sudo sluice up eth1 dns.toml --check        everything but attaching
        sudo sluice up eth1 game.toml --mode generic --socket /run/game/lanes.sock"""
    ),
)
@click.argument("interface")
@click.argument("policy", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--mode",
    type=click.Choice(get_args(InterfaceMode)),
    help="Where to attach, instead of what the policy says.",
)
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Serve lanes there.")
@click.option("--persist", is_flag=True, help="Pin the program and end; `sluice down` takes it off.")
@click.option("--replace", is_flag=True, help="Take off another program, or take over a persistent one.")
@click.option("--check", is_flag=True, help="Compile, load and check everything, but attach nothing.")
@click.option("--queues", type=click.IntRange(1, 64), help="Set the interface's number of receive queues.")
@click.option(
    "--napi-defer-hard-irqs",
    type=click.IntRange(0, MAX_DEFERRED),
    metavar="N",
    help="Set it on the interface.",
)
@click.option(
    "--gro-flush-timeout",
    type=click.IntRange(0, MAX_FLUSH_TIMEOUT),
    metavar="NS",
    help="Set it on the interface, in ns.",
)
@click.option("--gro/--no-gro", default=None, help="Set generic receive offload.")
@click.option("--lro/--no-lro", default=None, help="Set large receive offload.")
@common_options
def up(
    output: Output,
    interface: str,
    policy: Path,
    mode: InterfaceMode | None,
    path: Path | None,
    persist: bool,
    replace: bool,
    check: bool,
    **tuning: Any,
) -> None:
    """Load a policy's program, attach it and serve its lanes.

    Prints one line when it is ready and runs until SIGTERM or Ctrl-C. SIGHUP reads the policy
    again while traffic flows; a file with a mistake changes nothing. SIGUSR2 compiles the
    program anew and puts it in place without a gap. Changed settings of the interface are put
    back at the end, and after a kill at the next start.
    """
    wanted = Policy.load(policy)
    if persist and path is not None:
        raise UsageError("--persist serves no lanes, so there is no --socket", hint="choose one of them")
    if os.geteuid() != 0:
        raise PermissionsError("owning an interface needs root", hint="run the command with sudo")
    interface_index(interface)  # a mistyped name is told before anything is compiled
    if check:
        _check(output, interface, policy, wanted)
        return
    say = _Speaker(output)
    if persist and not replace and not any(value is not None for value in tuning.values()):
        refreshed = refresh(interface, policy, wanted)
        if refreshed is not None:
            say.ready(refreshed, "the persistent program now follows")
            return
    # Signals that come before there is a loop to hear them are not lost, and end nothing half-way.
    with (
        _Signals() as signals,
        Owner.open(
            interface,
            wanted,
            policy_path=str(policy.absolute()),
            mode=mode,
            replace=replace,
            tuning=Tuning(**tuning),
            notify=say.event,
        ) as owner,
    ):
        if persist:
            pin = owner.persist()
            say.ready(describe(owner, pin=str(pin)), "persistent")
            if any(lane.end == "socket" for lane in wanted.lanes):
                say.event("nobody serves sockets: lanes that end in one pass to the kernel")
            return
        # Absolute, since `sluice status` tells it to people who are in other directories.
        _serve(owner, path.absolute() if path else socket_path(owner.interface), signals, say)


def describe(owner: Owner, **more: object) -> dict[str, object]:
    """What is up, as a JSON document."""
    return {
        "event": "ready",
        "interface": owner.interface,
        "ifindex": owner.ifindex,
        "mode": owner.mode,
        "refused": [{"mode": one.mode, "reason": one.reason} for one in owner.refused],
        "program": owner.program.id,
        "link": owner.link.id if owner.link is not None else None,
        "policy": owner.policy_path,
        "generation": owner.generation,
        "lanes": list(owner.policy.lane_names),
        "pid": os.getpid(),
        "tuned": tuned_documents(owner.tuned),
        "remarks": remarks(owner.tuning, owner.mode, os.uname().release),
        **more,
    }


def _check(output: Output, interface: str, path: Path, policy: Policy) -> None:
    with SteerProgram.load() as program:
        program.swap(compile_policy(policy))
        document = {
            "interface": interface,
            "policy": str(path),
            "up": is_up(interface),
            "lanes": list(policy.lane_names),
            "ok": True,
        }
    output.report(document, lambda: output.line(f"{path}: would run on {interface}; nothing was attached"))


def _serve(owner: Owner, path: Path, signals: _Signals, say: _Speaker) -> None:
    _raise_limits()
    broker = Broker(owner, path)
    try:

        def act() -> None:
            for number in signals.taken():
                if number == signal.SIGHUP:
                    _reload(broker, say)
                elif number == signal.SIGUSR2:
                    _upgrade(owner, say)
                else:
                    say.event(f"ending: {signal.Signals(number).name}")
                    broker.stop()

        broker.watch(signals.fileno(), act)
        say.ready(describe(owner, socket=str(path)), f"serving {path}")
        notify_manager("READY=1")
        broker.serve()
    finally:
        notify_manager("STOPPING=1")
        broker.close()


def _reload(broker: Broker, say: _Speaker) -> None:
    owner = broker.owner
    notify_manager("RELOADING=1")
    try:
        generation = owner.reload(Policy.load(owner.policy_path))
        broker.policy_changed()
        say.event(f"policy {owner.policy_path} is in force, generation {generation}")
    except (SluiceError, OSError) as error:
        say.event(f"the old policy stays: {error}")
    notify_manager("READY=1")


def _upgrade(owner: Owner, say: _Speaker) -> None:
    try:
        owner.upgrade()
        say.event(f"program {owner.program.id} is in place")
    except SluiceError as error:
        say.event(f"the old program stays: {error}")


def _raise_limits() -> None:
    """Descriptors of many queues and ports at once: as many as we may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def notify_manager(text: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            click.echo(f"note: NOTIFY_SOCKET {address}: {error.strerror}", err=True)


class _Speaker:
    """One line for each thing that happens: text on stderr, or JSON lines on stdout."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def ready(self, document: dict[str, object], more: str) -> None:
        if self._output.json:
            write_json(document, compact=True)
            return
        self._output.line(
            f"{document['interface']}: {document['mode']}, program {document['program']}; {more}"
        )
        sys.stdout.flush()
        refused = document["refused"]
        assert isinstance(refused, list)
        for one in refused:
            self._output.note(f"not {one['mode']}: {one['reason']}")
        for one in tuned_rows(document.get("tuned")):
            self._output.note(one)
        remarked = document.get("remarks", [])
        assert isinstance(remarked, list)
        for text in remarked:
            self._output.note(text)

    def event(self, text: str) -> None:
        if self._output.json:
            write_json({"event": "note", "text": text}, compact=True)
        else:
            self._output.error_line(f"sluice up: {text}")


class _Signals:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR2 as something to be waited for with the rest."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._read, self._write = socket.socketpair()
        self._before: dict[int, Any] = {}

    def fileno(self) -> int:
        return self._read.fileno()

    def taken(self) -> list[int]:
        """The signals since the last call."""
        try:
            self._read.recv(4096)
        except BlockingIOError:
            return []
        taken, self._pending[:] = self._pending[:], []
        return taken

    def __enter__(self) -> _Signals:
        self._read.setblocking(False)
        self._write.setblocking(False)
        for number in self.NUMBERS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()

    def _note(self, number: int, _frame: object) -> None:
        self._pending.append(number)
        try:
            self._write.send(b"!")
        except BlockingIOError:
            return  # it is readable already
