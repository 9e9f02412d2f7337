# SPDX-License-Identifier: Apache-2.0
"""What the policy calls the numbers that the program uses.

The kernel knows lane 0, service 1, class 2.  Whoever loaded the policy knows that these are "votes",
"turbine" and "staked", and leaves the names in its state file (:mod:`xdp.owner_state`); without them
tools show the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from xdp.errors import UsageError

if TYPE_CHECKING:
    from xdp.policy import Policy

Term = Literal["lane", "service", "class", "kind"]


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """Each tuple is indexed by the number; peers by their id, only those that have a name."""

    lanes: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    #: by service, then by kind
    kinds: tuple[tuple[str, ...], ...] = ()
    peers: dict[int, str] = {}

    @classmethod
    def from_policy(cls, policy: Policy) -> Names:
        """The names in a policy, numbered as :func:`xdp.tables.compile_policy` numbers them."""
        return cls(
            lanes=policy.lane_names,
            services=policy.service_names,
            classes=policy.class_names,
            kinds=((), *(service.kind_names for service in policy.services)),
            peers={peer.id: peer.name for peer in policy.peers if peer.name},
        )

    def of(self, term: Term, service: int | None = None) -> tuple[str, ...]:
        """All names of one sort; of kinds only those of ``service``, since each service has its own."""
        if term == "kind":
            known = service is not None and 0 <= service < len(self.kinds)
            return self.kinds[service] if known and service is not None else ()
        return {"lane": self.lanes, "service": self.services, "class": self.classes}[term]

    def show(self, term: Term, number: int, service: int | None = None) -> str:
        """The name of a number, or the number."""
        names = self.of(term, service)
        return names[number] if 0 <= number < len(names) else str(number)

    def number(self, term: Term, text: str, limit: int, service: int | None = None) -> int:
        """The number that a name or a decimal number stands for, below ``limit``.

        A name wins over a number.  Raises `UsageError` with what is known.
        """
        names = self.of(term, service)
        if text in names:
            return names.index(text)
        if text.isascii() and text.isdecimal() and int(text) < limit:
            return int(text)
        allowed = f"0 to {limit - 1}" + (f", {', '.join(names)}" if names else "")
        raise UsageError(f"no {term} {text!r}", hint=f"allowed: {allowed}")
