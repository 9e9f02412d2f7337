# SPDX-License-Identifier: Apache-2.0
"""Test runs of the steer program, with the verdict of each packet read from the mapped counters."""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

from xdp._libbpf import ffi, lib
from xdp.abi import REASONS
from xdp.maps import BpfMap
from xdp.policy import Policy
from xdp.program import SteerProgram
from xdp.strangers import Strangers
from xdp.tables import compile_policy

XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = 1, 2, 3, 4

#: What the kernel does for each sort of reason.
ACTIONS = {"pass": XDP_PASS, "drop": XDP_DROP, "steer": XDP_REDIRECT, "reply": XDP_TX}

#: BPF_PROG_TEST_RUN refuses less than an Ethernet header, and more than a page less its head and tail room.
SHORTEST, LONGEST = 14, 3500

#: With packets in several buffers the first one has a page less 256 bytes of head room and 320 of
#: skb_shared_info; what is longer than that and 17 pages is refused.
FIRST_BUFFER, LONGEST_JUMBO = 4096 - 256 - 320, 65_536

_COUNT = 16  # bytes of struct sluice_count
_META = ffi.sizeof("struct sluice_meta")


class Meta(NamedTuple):
    """struct sluice_meta, as it lies below a steered packet."""

    cookie: int
    peer: int
    time_ns: int
    payload_offset: int
    payload_length: int
    lane: int
    service: int
    kind: int
    class_id: int


class Outcome(NamedTuple):
    """What became of one packet; ``lane`` None: counted under no lane."""

    reason: int
    lane: int | None
    frame: bytes
    meta: Meta | None

    @property
    def name(self) -> str:
        return REASONS[self.reason]


class SteerRuns:
    """Runs frames one at a time.  The calling thread has to stay on one CPU (the fixture pins it)."""

    def __init__(self, program: SteerProgram) -> None:
        self.program = program
        cpu = min(os.sched_getaffinity(0))
        stride = (ffi.sizeof("struct sluice_counters") + 7) // 8 * 8
        self._memory = program.maps["counters"].map_memory()
        base = cpu * stride
        self._seen = base + ffi.offsetof("struct sluice_counters", "seen")
        self._first = base + ffi.offsetof("struct sluice_counters", "verdict")
        self._last = self._first + lib.SLUICE_VERDICTS_SIZE * _COUNT
        self._out = ffi.new("char[]", 2 * LONGEST_JUMBO)
        self._run = ffi.new("struct sluice_test_run *")
        self.policy: Policy | None = None
        self.strangers = Strangers.open(self._map_again, program.maps["known"].info)

    def _map_again(self, name: str) -> BpfMap:
        return BpfMap(os.dup(self.program.maps[name].fd))

    def use(self, text: str | Policy) -> Policy:
        """Put a policy in force."""
        policy = Policy.parse(text) if isinstance(text, str) else text
        self.program.swap(compile_policy(policy))
        self.policy = policy
        return policy

    def peer_number(self, policy_id: int) -> int:
        """The number by which the program reports a configured peer: its own while it stays in the policy."""
        tables = self.program.policy_maps.tables
        assert tables is not None
        return int(tables.known.ids[policy_id - 1]) if policy_id else 0

    def __call__(self, frame: bytes) -> Outcome:
        """Run once and account for every counter that moved: one verdict, by one packet and its bytes."""
        seen = struct.unpack_from("=QQ", self._memory, self._seen)
        before = self._memory[self._first : self._last]
        action, data = self.raw(frame)
        after = self._memory[self._first : self._last]
        packets, size = struct.unpack_from("=QQ", self._memory, self._seen)
        assert (packets - seen[0], size - seen[1]) == (1, len(frame))

        changed = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
        assert changed, "no verdict was counted"
        index = ((changed & -changed).bit_length() - 1) // 8 // _COUNT
        old = struct.unpack_from("=QQ", before, index * _COUNT)
        new = struct.unpack_from("=QQ", after, index * _COUNT)
        assert (new[0] - old[0], new[1] - old[1]) == (1, len(frame))
        assert changed >> ((index + 1) * _COUNT * 8) == 0, "more than one verdict was counted"

        row, reason = divmod(index, lib.SLUICE_REASONS)
        assert action == ACTIONS[REASONS[reason].split("_", 1)[0]], (REASONS[reason], action)
        lane = None if row == lib.SLUICE_NO_LANE else row
        meta = None
        if action == XDP_REDIRECT:
            meta, data = Meta._make(struct.unpack_from("=IIQHHBBBB", data)), data[_META:]
        assert len(data) == len(frame)
        return Outcome(reason, lane, data, meta)

    def raw(self, frame: bytes) -> tuple[int, bytes]:
        """XDP action and what is in the buffer afterwards, metadata first if there is any."""
        run = self._run
        held = ffi.from_buffer("char[]", frame)
        run.data_in, run.data_size_in = held, len(frame)
        run.data_out, run.data_size_out = self._out, len(self._out)
        run.repeat = 1
        result = lib.sluice_prog_test_run(self.program.fd, run)
        assert result == 0, os.strerror(-result)
        return run.retval, bytes(ffi.buffer(self._out, run.data_size_out))

    def peer(self, address: bytes) -> Any:
        """``struct sluice_known`` of an address, wherever it is, or None."""
        raw = self.program.maps["known"].lookup(address) or self.strangers.lookup(address)
        return None if raw is None else ffi.from_buffer("struct sluice_known *", raw)

    def forget_limits(self) -> None:
        """All limits start anew."""
        for name in ("lane_limits", "prefix_limits"):
            rows = self.program.maps[name]
            count = rows.info.max_entries
            keys = ffi.new("uint32_t[]", list(range(count)))
            rows.update_many(keys, ffi.new("struct sluice_bucket[]", count), count)
        for peers in (self.program.maps["known"], self.strangers):
            for key, value in list(peers.items()):
                known = ffi.new("struct sluice_known *")
                ffi.memmove(known, value, len(value))
                known.peer.tat_ns = 0
                peers.update(key, bytes(ffi.buffer(known)))

    def forget_strangers(self) -> None:
        """As after loading; the turns go on, as they do whatever happens to the rest."""
        for name in ("strangers", "stranger_sets"):
            with self.program.maps[name].map_memory(writable=True) as memory:
                memory[:] = bytes(len(memory))
        self.program.maps["stranger_room"].update(bytes(4), bytes(8))
