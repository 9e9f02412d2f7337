# SPDX-License-Identifier: Apache-2.0
"""A callback that takes away what is being dealt with."""

from __future__ import annotations

from tests.unit.connection_world import ONE, World, warm
from userspace.connection.grading import Status


def test_an_endpoint_is_removed_because_of_an_answer() -> None:
    """The answer that took too long makes it degraded, and whoever is told does not want it any more."""
    world = World(settings=ONE)
    warm(world, "a", "b")
    world.run(60.0)
    conductor = world.conductor

    def on_status(connection: int, _: Status, new: Status) -> None:
        if new is Status.DEGRADED and conductor.endpoint(connection) == "a":
            conductor.remove_endpoint(world.now, "a")

    conductor.monitor.subscribe(on_status)
    world.rtt = 0.2
    world.run(60.0)
    assert "a" not in conductor.pool
    assert [conductor.endpoint(one) for one in conductor.links] == ["b"]
    assert conductor.monitor.summary().callback_errors == 0
