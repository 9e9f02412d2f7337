# SPDX-License-Identifier: Apache-2.0
"""Destinations that come together differently in every batch, and what `Fanout` needs of each.

Making a `Fanout` costs 3 µs a destination: as much as sending the packet.  Here an address is parsed once;
a `Fanout` is put together of the parts, at a tenth of that, and kept in case the same sequence of
destinations comes again (as it does when every packet goes to the same peers in turn).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from userspace.datagram.destination import Endpoint
from userspace.datagram.fanout import Fanout
from userspace.native._native import ffi
from xdp.errors import UsageError

#: Destinations that are remembered, about 1 KiB each.
_DESTINATIONS: Final = 16_384
#: Fan-outs that are kept, some 6 KiB each with 64 destinations and their headers.
_FANOUTS: Final = 128


class Target:
    """A destination; compares by identity."""

    __slots__ = ("alone", "endpoint", "source")

    def __init__(self, alone: Fanout) -> None:
        self.alone = alone
        self.endpoint: Endpoint = alone.endpoints[0]
        #: ``struct sl_source``
        self.source = bytes(ffi.buffer(alone.sources))


class Targets(dict[Endpoint, Target]):
    """The destinations that were used before, at most ``kept``; asked for a new one, it learns that.

    Raises UsageError for what is not an (address, port).
    """

    def __init__(self, kept: int = _DESTINATIONS) -> None:
        super().__init__()
        self._kept = kept

    def __missing__(self, destination: Endpoint) -> Target:
        try:
            alone = Fanout([destination])
        except (TypeError, ValueError):
            raise UsageError(f"destination {destination!r} is not an (address, port) pair") from None
        endpoint = alone.endpoints[0]
        if len(self) + 2 > self._kept:
            self.clear()
        # Also as the caller writes it: with an address object, say.
        target = self[destination] = self.get(endpoint) or Target(alone)
        self[endpoint] = target
        return target


class Fanouts:
    """The fan-outs that were used last; their number is bounded."""

    def __init__(self, kept: int = _FANOUTS) -> None:
        self._kept = kept
        self._known: OrderedDict[tuple[Target, ...], Fanout] = OrderedDict()

    def find(self, targets: tuple[Target, ...]) -> Fanout:
        """To all of these, in that order."""
        fanout = self._known.get(targets)
        if fanout is not None:
            self._known.move_to_end(targets)
            return fanout
        fanout = self._known[targets] = _Assembled(targets)
        if len(self._known) > self._kept:
            self._known.popitem(last=False)
        return fanout

    def __len__(self) -> int:
        return len(self._known)


class _Assembled(Fanout):
    """Made of what was parsed before."""

    __slots__ = ()

    def __init__(self, targets: Sequence[Target]) -> None:
        self.endpoints = tuple([target.endpoint for target in targets])
        self.addresses = tuple([target.alone.addresses[0] for target in targets])
        self.sources = ffi.from_buffer("struct sl_source[]", b"".join([target.source for target in targets]))
