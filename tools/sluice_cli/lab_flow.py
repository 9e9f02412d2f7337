# SPDX-License-Identifier: Apache-2.0
"""``sluice lab flow``: congestion controllers over real lanes, beside the same run in virtual time.

The sender is on the lab's server and sends through its lanes, paced by FlowControllers.  On the client a
relay is the network: links, queues and faults of a scenario of ``sluice simulate flow``, run by the clock.
So both runs differ in what is between sender and network alone: interface, kernel, lanes, clock and
scheduler are real in one of them.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

import click
import msgspec

from sluice_cli.lab import Host, Lab
from sluice_cli.lab_flow_report import show
from sluice_cli.lab_flow_wire import Mode, Task
from sluice_cli.output import Output, common_options, examples
from userspace.flow.registry import CONTROLLERS
from userspace.simulation.flow_report import simulate
from userspace.simulation.flow_scenarios import Scenario, controllers_of, scenario
from xdp.errors import SluiceError, UsageError

#: Those that run when none is named: one flow before both kinds of queue, many flows, loss, overload.
USUAL: Final = ("steady", "codel", "share", "loss", "overload")
_START_SECONDS: Final = 60.0  # for Python and the program, which is compiled; on a busy machine
_AHEAD: Final = 0.3  # seconds from when both are ready until they begin
_END_SECONDS: Final = 60.0  # for the figures, after the end
#: Of what a process says of its end.
_ERRORS: Final[dict[int, type[SluiceError]]] = {kind.exit_code: kind for kind in SluiceError.__subclasses__()}


class Process:
    """The sender or the relay."""

    def __init__(self, host: Host, module: str, task: Task) -> None:
        self._name = module.removeprefix("lab_flow_")
        # Killed by the kernel when we are: nobody would tell it that the run is over.
        self._process: subprocess.Popen[str] = host.popen(
            ["setpriv", "--pdeathsig", "KILL", "--",
             sys.executable, "-m", f"sluice_cli.{module}", msgspec.json.encode(task).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self, patience: float) -> dict[str, Any]:
        """A line of JSON.  Raises SluiceError when it does not come in so many seconds."""
        assert self._process.stdout is not None
        line = ""
        if select.select([self._process.stdout], [], [], patience)[0]:
            line = self._process.stdout.readline()
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._failed() from None
        if "error" in found:
            error = found["error"]
            raise _ERRORS.get(error["exit_code"], SluiceError)(error["message"], hint=error["hint"])
        return found

    def begin(self, at: float) -> None:
        """Tell it when."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the next read says why
            self._process.stdin.write(f"{at!r}\n")
            self._process.stdin.flush()

    def _failed(self) -> SluiceError:
        self._process.kill()
        _, said = self._process.communicate()
        lines: Sequence[str] = said.strip().splitlines()
        why = lines[-1].rpartition("Error: ")[2] if lines else "it said nothing"
        return SluiceError(f"the {self._name} failed: {why}", hint="--verbose shows all it said", detail=said)

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def _processes(lab: Lab, task: Task) -> Iterator[tuple[Process, Process]]:
    """Relay and sender, both ready."""
    with contextlib.ExitStack() as cleanup:
        made = []
        for host, module, other in (
            (lab.client, "lab_flow_relay", lab.server),
            (lab.server, "lab_flow_sender", lab.client),
        ):
            process = Process(host, module, msgspec.structs.replace(task, peer=str(other.ipv4)))
            cleanup.callback(process.close)
            made.append(process)
        relay, sender = made
        for process in made:
            process.read(_START_SECONDS)
        yield relay, sender


def run_real(lab: Lab, task: Task) -> dict[str, Any]:
    """One run over real lanes; the document of it.  Raises SluiceError."""
    with _processes(lab, task) as (relay, sender):
        at = time.monotonic() + _AHEAD
        for process in (relay, sender):
            process.begin(at)
        sent = sender.read(task.seconds + _END_SECONDS)
        found = relay.read(_END_SECONDS)
    cable = found["cable"]
    missing = sent["sent"] - sum(cable.values())
    for flow, state in zip(found["report"]["flows"], sent["flows"], strict=True):
        flow["probes"] = state["probes"]  # what the relay cannot know
        flow["controller_state"] = state["controller"]
    return {
        "mode": sent["mode"],
        **found["report"],
        "sender": {key: sent[key] for key in ("sent", "refused", "unsent", "strange", "cpu")},
        "relay": {"cpu": found["cpu"], "answers": found["answers"]},
        "cable": {**cable, "missing": missing},
        "timers": {"sender_late": sent["late"], "relay_late": found["timers"].pop("late"), **found["timers"]},
    }


@click.command(
    name="flow",
    epilog=examples(
        """sudo sluice lab flow
        sudo sluice lab flow --scenario codel --controller cubic --seconds 10
        sudo sluice lab flow --scenario overload --mode mmsg --json"""
    ),
)
@click.option("--scenario", "names", multiple=True, metavar="NAME",
              help=f"Of `sluice simulate flow`; may be repeated.  [default: {', '.join(USUAL)}]")  # fmt: skip
@click.option("--controller", "controllers", multiple=True, metavar="NAME",
              help="Instead of the one that the scenario's thresholds are for; may be repeated.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(1, 600),
              help="Of each run.  [default: as the scenario says]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True,
              help="Of all chance in the network; what the machine does is not repeated.")  # fmt: skip
@click.option("--mode", type=click.Choice(get_args(Mode)), default="auto", show_default=True,
              help="Of the sender's lanes.")  # fmt: skip
@common_options
def flow(
    output: Output,
    names: Sequence[str],
    controllers: Sequence[str],
    seconds: float | None,
    seed: int,
    mode: Mode,
) -> int:
    """Run congestion controllers over real lanes, beside a simulation.

    The network is a relay on the other host: scenarios, figures and thresholds are those of `sluice simulate
    flow`, but packets and clock are real. Exit code 1 when a threshold is missed, or when a packet between
    the hosts is missing that no counter tells of.
    """
    chosen = [scenario(name) for name in dict.fromkeys(names or USUAL)]
    pairs = [(one, own) for one in chosen for own in controllers_of(one, tuple(dict.fromkeys(controllers)))]
    for name in (name for _, own in pairs for name in own):
        if name not in CONTROLLERS:
            raise UsageError(f"no controller {name!r}", hint=f"there are: {', '.join(CONTROLLERS)}")
    runs: list[dict[str, Any]] = []
    with Lab(static_neighbours=True) as lab:
        for one, own in pairs:
            task = Task(
                scenario=one.name, controllers=own, seconds=seconds or one.seconds, seed=seed,
                interface=lab.server.interface, peer="", mode=mode,
            )  # fmt: skip
            runs.append(_both(output, lab, one, task))
    ok = all(run["ok"] for run in runs)
    document = {"seed": seed, "runs": runs, "ok": ok}
    output.report(document, lambda: show(output, runs))
    return 0 if ok else 1


def _both(output: Output, lab: Lab, one: Scenario, task: Task) -> dict[str, Any]:
    """One after the other: they would take each other's time."""
    output.progress(f"{one.name}: {task.seconds:g} s over real lanes")
    real = run_real(lab, task)
    output.progress(f"{one.name}: the same in the simulator")
    # The relay was told the controllers of the scenario, or the ones that were asked for.
    simulated = simulate(one, task.controllers, seed=task.seed, seconds=task.seconds)[0].document()
    ok = real["ok"] and simulated["ok"] and real["cable"]["missing"] == 0
    return {"scenario": one.name, "controllers": list(task.controllers), "seconds": task.seconds,
            "mode": real["mode"], "real": real, "simulated": simulated, "ok": ok}  # fmt: skip
