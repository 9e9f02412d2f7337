# SPDX-License-Identifier: Apache-2.0
"""Runs scenarios of connections, seed by seed, and tells what broke and what was measured.

    outcome = run("partition", seed=7)
    outcome.broken                     # None, or when and what
    summary = Summary("partition")
    summary.add(outcome)

The same scenario, seed, scale and seconds are the same run, in any process.  Whatever the code under test
raises is a broken promise as well.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Final

import msgspec

from userspace.simulation.connection_promises import PromiseBrokenError
from userspace.simulation.connection_scenarios import Scenario, scenario
from userspace.simulation.connection_world import World
from userspace.simulation.figures import percentile
from xdp.errors import UsageError

#: Broken promises of one scenario that are told; of the others only the number is.
TOLD: Final = 10
#: Times until endpoints were back, or verdicts, that are kept of one scenario, for percentiles.
KEPT: Final = 200_000

#: Times as many peers: some fifty thousand of them take a gigabyte.
SCALE_MINIMUM: Final = 0.25
SCALE_MAXIMUM: Final = 10_000.0
#: Seconds, eleven days.
SECONDS_MAXIMUM: Final = 1_000_000.0


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A promise that did not hold: of which scenario and seed, after how many seconds, and what it is."""

    scenario: str
    seed: int
    at: float
    what: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    broken: Broken | None
    #: Counts by name, see :class:`Summary`.
    counts: dict[str, int]
    #: Seconds (those in which the loop was not stalled) until one who died was dead.
    found_after: list[float]
    #: Seconds until endpoints were back after all was well.
    back_after: list[float]


def run(
    name: str | Scenario, seed: int, *, scale: float = 1.0, seconds: float | None = None,
    tell: Callable[[float, str], object] | None = None,
) -> Outcome:  # fmt: skip
    """Run one seed of a scenario, ``scale`` times as large, for ``seconds`` instead of its own.

    ``tell`` is called with the time and what happens.
    """
    chosen = scenario(name) if isinstance(name, str) else name
    check(scale, chosen.seconds if seconds is None else seconds)
    broken: Broken | None = None
    world: World | None = None
    try:
        world = World(chosen, seed=seed, scale=scale, seconds=seconds, tell=tell)
        world.run()
    except PromiseBrokenError as error:
        broken = Broken(scenario=chosen.name, seed=seed, at=error.at, what=error.what)
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is what was looked for
        at = 0.0 if world is None else world.engine.now
        broken = Broken(scenario=chosen.name, seed=seed, at=at, what=_told(error))
    if world is None:
        return Outcome(seed=seed, broken=broken, counts={}, found_after=[], back_after=[])
    promises = world.promises
    return Outcome(
        seed=seed,
        broken=broken,
        counts=world.counts(),
        found_after=promises.found_after,
        back_after=promises.back_after,
    )


def check(scale: float, seconds: float) -> None:
    """Raises UsageError for what cannot be simulated."""
    if not SCALE_MINIMUM <= scale <= SCALE_MAXIMUM:
        raise UsageError(f"scale is {SCALE_MINIMUM:g} to {SCALE_MAXIMUM:g} times, not {scale!r}")
    if not 0.0 <= seconds <= SECONDS_MAXIMUM:
        raise UsageError(f"seconds is 0 to {SECONDS_MAXIMUM:g}, not {seconds!r}")


def _told(error: Exception) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " <- ".join(f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"
                        for frame in reversed(frames))  # fmt: skip
    return f"{type(error).__name__}: {error} in {where}"


class Summary:
    """All seeds of one scenario: counts are sums, times are all together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seeds = self.violations = 0
        self.broken: list[Broken] = []
        self.counts: dict[str, int] = {}
        self._found: list[float] = []
        self._back: list[float] = []

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.seeds += 1
        if outcome.broken is not None:
            self.violations += 1
            self.broken.append(outcome.broken)
            self.broken.sort(key=lambda one: one.seed)
            del self.broken[TOLD:]
        for name, count in outcome.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self._found += outcome.found_after[: KEPT - len(self._found)]
        self._back += outcome.back_after[: KEPT - len(self._back)]

    def figures(self) -> dict[str, float | None]:
        """Seconds: until verdicts, and until endpoints were back."""
        found, again = sorted(self._found), sorted(self._back)
        return {
            "found_p50": percentile(found, 50) if found else None,
            "found_most": found[-1] if found else None,
            "back_p50": percentile(again, 50) if again else None,
            "back_p99": percentile(again, 99) if again else None,
            "back_most": again[-1] if again else None,
        }

    def document(self) -> dict[str, object]:
        """For JSON."""
        return {
            "scenario": self.name,
            "seeds": self.seeds,
            "violations": self.violations,
            "broken": [msgspec.to_builtins(one) for one in self.broken],
            "counts": dict(sorted(self.counts.items())),
            "figures": self.figures(),
            "ok": not self.violations,
        }
