# SPDX-License-Identifier: Apache-2.0
"""The reference classifier: what the kernel program does with a packet, in plain Python.

    classifier = Classifier(Policy.load("validator.toml"))
    verdict = classifier.classify(frame, time.monotonic_ns())
    REASONS[verdict.reason], verdict.lane

Tests hold the program against it, and where there is no kernel program (the
portable backend) it decides about datagrams from ordinary sockets.  Frames go
through classify_frame, then service, peer, policy, limit and lane as in
bpf/steer.bpf.c; the state is that of the limits alone.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from typing import NamedTuple

from xdp._libbpf import lib
from xdp.abi import Address, pack_address
from xdp.classify_frame import MAPPED, is_impossible_source, parse
from xdp.classify_heartbeat import is_answerable, is_probe, reply_frame, reply_payload
from xdp.classify_limit import HoldTimestamps, Limit, PrefixTimestamps, StrangerTimestamps, Timestamps
from xdp.classify_policy import Decision, PolicyView
from xdp.errors import UsageError
from xdp.policy import Policy
from xdp.tables import check_times, hold_limit

#: Texts of addresses that are kept with their bytes; sockets give text for every datagram.
_MAX_ADDRESS_TEXTS = 65536


class Verdict(NamedTuple):
    """What happens to one packet, and why.

    reason        enum sluice_reason (xdp.abi.REASONS has the names)
    lane          the row that the packet is counted in: where it went or was dropped; None: no lane
    chosen        the lane that the rule chose, before demotion; None: none
    service, class_id, kind, peer    0 where it did not come to that
    payload_offset, payload_length   bytes, of the frame or of the datagram; 0 where there is none
    reply_frame   with SLUICE_REPLY: the whole frame, or the payload for classify_datagram
    """

    reason: int
    lane: int | None = None
    service: int = 0
    class_id: int = 0
    kind: int = 0
    payload_offset: int = 0
    payload_length: int = 0
    peer: int = 0
    chosen: int | None = None
    reply_frame: bytes | None = None

    @property
    def demoted(self) -> bool:
        """Whether a limit moved the packet to a lower lane."""
        return self.lane != self.chosen


class Classifier:
    """Decides as the program does; not thread-safe, as its limits are plain numbers.

    ``open_lanes``: numbers of the lanes that have a socket, None for all.  Packets
    of the others are passed (SLUICE_PASS_NO_SOCKET).
    """

    def __init__(self, policy: Policy, *, open_lanes: Collection[int] | None = None) -> None:
        self._view = PolicyView(policy)
        self._open_lanes = open_lanes
        self._holds = HoldTimestamps()
        self._known = Timestamps()
        self._strangers = StrangerTimestamps()
        self._prefixes = PrefixTimestamps()
        self._lanes = Timestamps()
        self._packed: dict[str, bytes] = {}

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._view.policy

    def swap(self, policy: Policy) -> None:
        """Replaces the policy; limits go on from where they are, as in the kernel, and holds of who stays."""
        self._view = view = PolicyView(policy)
        self._holds.keep(lambda source: bool(view.identify(source)[0]))

    def hold(
        self, address: Address, packets_per_second: int, burst: int, *, until_ns: int, now_ns: int
    ) -> None:
        """Hold a configured peer at a rate until a time, as :meth:`xdp.holds.PeerHolds.hold` does.

        Raises UsageError for a stranger and for what is out of range.
        """
        check_times(until_ns, now_ns)
        interval, more = hold_limit(packets_per_second, burst)
        source = pack_address(address)
        if not self._view.identify(source)[0]:
            raise UsageError(f"{address} is no configured peer, and only those can be held")
        self._holds.set(source, Limit(interval, more * interval), until_ns, now_ns)

    def release(self, address: Address) -> None:
        """End a hold, if there is one."""
        self._holds.clear(pack_address(address))

    def classify(self, frame: bytes, now_ns: int, *, reach: int | None = None) -> Verdict:
        """The verdict for an Ethernet frame (without FCS) at a monotonic time in nanoseconds.

        ``reach``: bytes in the first of several buffers, None: it is in one.
        """
        view = self._view
        datagram = parse(frame, reach)
        if isinstance(datagram, int):
            if datagram == lib.SLUICE_PASS_FRAGMENT and view.drop_fragments:
                return Verdict(lib.SLUICE_DROP_FRAGMENT)
            return Verdict(datagram)
        service = view.service_of_port.get(datagram.port, 0)
        if not service:
            return Verdict(lib.SLUICE_PASS_NOT_OURS)
        if is_impossible_source(datagram):
            return Verdict(lib.SLUICE_PASS_SOURCE, service=service)
        start = datagram.payload_offset
        payload = frame[start : start + datagram.payload_length]
        verdict = self._decide(
            datagram.source, service, payload, now_ns, answerable=is_answerable(frame, datagram)
        )
        reply = reply_frame(frame, datagram) if verdict.reason == lib.SLUICE_REPLY else None
        return verdict._replace(payload_offset=start, reply_frame=reply)

    def classify_datagram(
        self, source: Address | str, port: int, payload: bytes | memoryview, now_ns: int
    ) -> Verdict:
        """The verdict for a datagram that a socket received on local port ``port``.

        ``source`` is the sender's address, as text the way sockets give it (scope
        and IPv4 in IPv6 form are understood).  Loopback is an ordinary source here:
        the kernel has already refused what cannot be.

        Raises:
            ValueError: ``source`` is no address.
        """
        service = self._view.service_of_port.get(port, 0)
        if not service:
            return Verdict(lib.SLUICE_PASS_NOT_OURS)
        packed = self._pack_text(source) if isinstance(source, str) else pack_address(source)
        verdict = self._decide(packed, service, payload, now_ns, answerable=True)
        if verdict.reason == lib.SLUICE_REPLY:
            return verdict._replace(reply_frame=reply_payload(payload))
        return verdict

    def _pack_text(self, text: str) -> bytes:
        packed = self._packed.get(text)
        if packed is None:
            try:
                if ":" in text:
                    packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
                else:
                    packed = MAPPED + socket.inet_pton(socket.AF_INET, text)
            except OSError:
                raise ValueError(f"{text!r} is no address") from None
            if len(self._packed) >= _MAX_ADDRESS_TEXTS:
                self._packed.clear()
            self._packed[text] = packed
        return packed

    def _decide(
        self, source: bytes, service: int, payload: bytes | memoryview, now_ns: int, *, answerable: bool
    ) -> Verdict:
        view = self._view
        peer, class_id = view.identify(source)
        kind = view.kind_of(service, payload)
        decision = view.decide(service, class_id, kind)
        if decision.lane < 0:
            return Verdict(decision.reason, None, service, class_id, kind, 0, len(payload), peer)
        probe = decision.reply and answerable and is_probe(payload)
        reason, lane = self._limited(decision, source, peer, now_ns, probe=probe)
        return Verdict(reason, lane, service, class_id, kind, 0, len(payload), peer, decision.lane)

    def _limited(
        self, decision: Decision, source: bytes, peer: int, now_ns: int, *, probe: bool
    ) -> tuple[int, int]:
        """Reason and final lane: hold, peer, prefix and lane limits in this order, the first over decides."""
        lane = decision.lane
        if peer and self._holds.over(source, now_ns):
            return lib.SLUICE_DROP_HELD, lane
        over, demote = self._over(decision, source, peer, now_ns)
        if over is not None:
            if demote is None or probe:
                return over, lane
            lane = demote
            limit = self._view.lanes[lane].limit
            if limit is not None and self._lanes.over(lane, limit, now_ns):
                return lib.SLUICE_DROP_LANE_LIMIT, lane
        elif probe:
            return lib.SLUICE_REPLY, lane
        if self._view.lanes[lane].in_kernel:
            return (lib.SLUICE_PASS_LANE if over is None else lib.SLUICE_PASS_DEMOTED), lane
        if self._open_lanes is not None and lane not in self._open_lanes:
            return lib.SLUICE_PASS_NO_SOCKET, lane
        return (lib.SLUICE_STEER if over is None else lib.SLUICE_STEER_DEMOTED), lane

    def _over(
        self, decision: Decision, source: bytes, peer: int, now_ns: int
    ) -> tuple[int | None, int | None]:
        """The reason to drop and the lane to demote to instead; (None, None) within all limits."""
        if decision.peer is not None:
            tats = self._known if peer else self._strangers
            if tats.over(source, decision.peer, now_ns):
                return lib.SLUICE_DROP_PEER_LIMIT, decision.demote
        if decision.prefix is not None and not peer:
            prefix = self._view.stranger_prefix(source)
            if self._prefixes.over(prefix, decision.prefix, now_ns):
                return lib.SLUICE_DROP_PREFIX_LIMIT, decision.demote
        lane = self._view.lanes[decision.lane]
        if lane.limit is not None and self._lanes.over(decision.lane, lane.limit, now_ns):
            return lib.SLUICE_DROP_LANE_LIMIT, lane.demote
        return None, None
