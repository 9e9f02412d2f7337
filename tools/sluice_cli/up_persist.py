# SPDX-License-Identifier: Apache-2.0
"""``sluice up --persist`` a second time: the pinned program gets the new policy, nothing else changes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from sluice_cli.tuning_text import tuned_documents
from userspace.datagram.policy_document import known_ids, with_ids
from xdp import inventory
from xdp.bpffs import mount_bpffs
from xdp.link import Link
from xdp.maps import BpfMap
from xdp.names import Names
from xdp.owner_state import OwnerState, read_state, start_time, state_path, write_state
from xdp.policy import Policy
from xdp.policy_maps import PolicyMaps
from xdp.state import InterfaceLock, pin_folder, prepare
from xdp.tables import compile_policy
from xdp.watch import interface_index


def refresh(interface: str, path: Path, policy: Policy) -> dict[str, object] | None:
    """Swap the policy of a program that an earlier ``--persist`` left; None when there is none.

    Raises BusyError when somebody owns the interface.
    """
    mount_bpffs()
    pin = pin_folder(interface) / "link"
    if not pin.exists():
        return None
    ifindex = interface_index(interface)
    prepare()
    lock = InterfaceLock.take(interface, ifindex)
    with ExitStack() as cleanup:
        cleanup.callback(lock.release)
        link = Link.from_pin(pin)
        cleanup.callback(link.close)
        if link.ifindex != ifindex:
            return None
        one = inventory.find(interface)
        maps: dict[str, BpfMap] = {}
        for name in one.maps:
            maps[name] = one.map(name)
            cleanup.callback(maps[name].close)
        written = PolicyMaps(maps)
        generation = written.swap(compile_policy(policy))
        assert written.tables is not None
        policy = with_ids(policy, known_ids(written.tables))
        state = _write_state(one, path, policy)
        return {
            "event": "ready",
            "interface": interface,
            "ifindex": ifindex,
            "mode": state.mode,
            "refused": [{"mode": entry.mode, "reason": entry.reason} for entry in state.refused],
            "program": one.id,
            "link": link.id,
            "policy": state.policy,
            "generation": generation,
            "lanes": list(policy.lane_names),
            "pid": os.getpid(),
            "tuned": tuned_documents(state.tuned),
            "pin": str(pin),
        }


def _write_state(one: inventory.Loaded, path: Path, policy: Policy) -> OwnerState:
    file = state_path(one.interface, inventory.namespace_inode())
    before = read_state(file)
    known = before is not None and before.program_id == one.id
    started = start_time(os.getpid())
    assert started is not None
    state = OwnerState(
        pid=os.getpid(),
        started=started,
        program_id=one.id,
        interface=one.interface,
        mode=before.mode if known and before is not None else one.mode,
        refused=before.refused if known and before is not None else (),
        policy=str(path.absolute()),
        persisted=True,
        names=Names.from_policy(policy),
        tuned=before.tuned if known and before is not None else (),
    )
    write_state(file, state)
    return state
