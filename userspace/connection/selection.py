# SPDX-License-Identifier: Apache-2.0
"""Whom to choose: in proportion to weights, the better one of two, always the same one for the same key.

    candidates = WeightedSet[Endpoint]()
    candidates.add(endpoint)                       # endpoint.weight: a stake, say
    candidates.pick(rng.random)                    # each in proportion to its weight
    better(candidates, rng.random, cost)           # two such picks, and the cheaper of them
    cheaper(connections, rng.random)               # the same for a list in which all weigh the same

    ring = Rendezvous[Endpoint](secret)
    ring.add(endpoint, b"192.0.2.7:8009")
    ring.first(b"user 4711", fits)                 # the same for each call, as long as it fits

**Two choices.**  Who looks at two candidates and takes the better one does nearly as well as who looks at all
of them (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001), and unlike that one does
not send everybody to the same place.  When both cost the same the first is taken, so as long as nothing is
known the choice is exactly in proportion to the weights.

**Weights.**  Whole numbers that may differ by any factor.  Adding, removing and picking take the same time
for ten candidates and ten thousand: candidates are binned by powers of two, a bin is drawn by its size, a
place within it evenly, and what weighs less than its bin allows is drawn again in proportion (at most one
draw in two; Matias, Vitter and Ni, Dynamic Generation of Discrete Random Variates, 2003).  Sums are whole
numbers, so nothing drifts.

**The same for the same key.**  Weighted rendezvous hashing (Thaler and Ravishankar 1998; Schindelhauer and
Schomaker 2005): each candidate gets a score from the key, the best wins.  When one fails, its keys are
spread over all others and no other key moves; they return when it does.  A choice costs two short walks
instead of a long one, over groups and then within one (:data:`GROUPS`), for which some more keys move when
candidates come and go: at most twice as many as must.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from hashlib import blake2b
from math import inf, log
from typing import Final, Generic, Protocol, TypeVar

from xdp.errors import UsageError

#: As many lamports as there can be, and many more: weights are stakes.
WEIGHT_MAXIMUM: Final = 1 << 63
#: Groups of a Rendezvous: for 1,000 candidates 64 + 16 scores are computed instead of 1,000, for 10,000 it
#: is 64 + 156.  Members of a group are found by hash, so this must not depend on how many there are.
GROUPS: Final = 64
#: Up to so many candidates all are compared when the first choice fails: then no two share a group often.
FEW: Final = 4 * GROUPS
#: How often the second of two choices is drawn again because it was the first one, which is the rule where
#: one candidate has most of the weight.
_REDRAWS: Final = 3
#: Bytes of a secret of hashes: all that matters, and blake2b takes up to 64.
SECRET_LENGTH: Final = 16

_MASK: Final = (1 << 64) - 1
#: Odd multipliers of the finalizer of splitmix64 (Steele, Lea and Flood 2014).
_MULTIPLIER_1: Final = 0xBF58476D1CE4E5B9
_MULTIPLIER_2: Final = 0x94D049BB133111EB
_SCALE: Final = 2.0**-64


class Weighted(Hashable, Protocol):
    """Something with a weight, a whole number from 1, that does not change while it is in a set."""

    @property
    def weight(self) -> int:
        """What it weighs."""


class Costly(Protocol):
    """Something that has a cost: seconds, times what is under way already."""

    @property
    def cost(self) -> float:
        """What it costs to choose it."""


class Ranked(Weighted, Protocol):
    """Something that a Rendezvous can hold, and remember its hash in."""

    seed: int


C = TypeVar("C", bound=Costly)
R = TypeVar("R", bound=Ranked)
W = TypeVar("W", bound=Weighted)


def checked_weight(weight: object) -> int:
    """The weight as an int; UsageError unless it is a whole number, 1.0 too, from 1 to WEIGHT_MAXIMUM."""
    if type(weight) not in {int, float} or not 1 <= weight <= WEIGHT_MAXIMUM or weight % 1:  # type: ignore[operator]
        raise UsageError(f"a weight is a whole number from 1 to 2**63, not {weight!r}")
    return int(weight)  # type: ignore[call-overload, no-any-return]


def cheaper(items: Sequence[C], draw: Callable[[], float]) -> C:
    """The cheaper of two that are drawn; there must be one at least."""
    count = len(items)
    if count == 1:
        return items[0]
    first = int(draw() * count)
    second = int(draw() * (count - 1))
    if second >= first:
        second += 1
    one, other = items[first], items[second]
    return other if other.cost < one.cost else one


class _Bin(Generic[W]):
    """Those that weigh more than half of ``unit``, and no more than it."""

    __slots__ = ("items", "places", "total", "unit")

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.items: list[W] = []
        self.places: dict[W, int] = {}
        self.total = 0  # of as many units


class WeightedSet(Generic[W]):
    """Candidates that are picked in proportion to their weights; see the module.

    What has a weight of more than WEIGHT_MAXIMUM or less than 1 must not be added.
    """

    __slots__ = ("_bins", "_count", "_order", "_total")

    def __init__(self) -> None:
        self._bins: dict[int, _Bin[W]] = {}
        self._order: list[_Bin[W]] = []  # those with members, the heaviest first
        self._total = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    @property
    def total(self) -> int:
        """Of all members, each rounded up to a power of two: what one pick is a part of."""
        return self._total

    def add(self, item: W) -> None:
        """Add one that is not in it."""
        exponent = (item.weight - 1).bit_length()
        bin_ = self._bins.get(exponent)
        if bin_ is None:
            bin_ = self._bins[exponent] = _Bin[W](1 << exponent)
        if not bin_.items:
            self._order.append(bin_)
            self._order.sort(key=lambda one: -one.unit)
        bin_.places[item] = len(bin_.items)
        bin_.items.append(item)
        bin_.total += bin_.unit
        self._total += bin_.unit
        self._count += 1

    def remove(self, item: W) -> None:
        """Remove one that is in it."""
        bin_ = self._bins[(item.weight - 1).bit_length()]
        place = bin_.places.pop(item)
        last = bin_.items.pop()
        if last is not item:
            bin_.items[place] = last
            bin_.places[last] = place
        bin_.total -= bin_.unit
        self._total -= bin_.unit
        self._count -= 1
        if not bin_.items:
            self._order.remove(bin_)

    def pick(self, draw: Callable[[], float]) -> W:
        """One of them; there must be one at least.  ``draw`` gives numbers from 0 to below 1."""
        order = self._order
        while True:
            at = draw() * self._total
            for bin_ in order:
                if at < bin_.total:
                    break
                at -= bin_.total
            unit = bin_.unit
            place = int(at / unit)
            if place < len(bin_.items):  # rounded, it may be one too many
                item = bin_.items[place]
                if at - place * unit < item.weight:
                    return item


def better(candidates: WeightedSet[W], draw: Callable[[], float], cost: Callable[[W], float]) -> W:
    """The cheaper of two picks; there must be one candidate at least."""
    first = candidates.pick(draw)
    if len(candidates) == 1:
        return first
    second = candidates.pick(draw)
    for _ in range(_REDRAWS):
        if second is not first:
            break
        second = candidates.pick(draw)
    return second if cost(second) < cost(first) else first


def name_of(key: Hashable) -> bytes:
    """What is hashed of a key: bytes as they are, of all else its repr.

    So the keys of a Rendezvous that is to choose the same in another process need a repr that tells them:
    strings, numbers, addresses, and tuples of such have one.
    """
    return key if isinstance(key, bytes) else repr(key).encode("utf-8", "backslashreplace")


def _score(point: int, seed: int, weight: int) -> float:
    """Of one candidate for one key; the highest wins.

    The logarithm of an even number between 0 and 1, divided by the weight: minus the arrival time of an event
    with that rate, so each is the first with a probability that is its part of the sum of weights.
    """
    mixed = (point ^ seed) * _MULTIPLIER_1 & _MASK
    mixed = (mixed ^ mixed >> 29) * _MULTIPLIER_2 & _MASK
    return log(((mixed ^ mixed >> 32) + 0.5) * _SCALE) / weight


class _Scored(Protocol):
    @property
    def seed(self) -> int: ...
    @property
    def weight(self) -> int: ...


S = TypeVar("S", bound=_Scored)


def _winner(items: Sequence[S], point: int) -> S:
    """The one with the highest score; there must be one at least."""
    best, highest = items[0], -inf
    for item in items:
        score = _score(point, item.seed, item.weight)
        if score > highest:
            best, highest = item, score
    return best


class _Group(Generic[R]):
    __slots__ = ("members", "seed", "weight")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.members: list[R] = []
        self.weight = 0


class Rendezvous(Generic[R]):
    """Candidates of which each key has one of its own; see the module.

    ``secret`` keys the hashes: with the same one the choices are the same in every process, and who does not
    know it cannot make keys that all meet at one candidate.  UsageError if it is not SECRET_LENGTH bytes.
    """

    __slots__ = ("_count", "_groups", "_secret", "_used")

    def __init__(self, secret: bytes) -> None:
        if type(secret) is not bytes or len(secret) != SECRET_LENGTH:
            raise UsageError(f"a secret is {SECRET_LENGTH} bytes")
        self._secret = secret
        self._groups = [_Group[R](self._hash(b"group %d" % number)) for number in range(GROUPS)]
        self._used: list[_Group[R]] = []  # those with members
        self._count = 0

    def _hash(self, name: bytes) -> int:
        return int.from_bytes(blake2b(name, digest_size=8, key=self._secret).digest(), "little")

    def add(self, item: R, name: bytes) -> None:
        """Add one that is not in it, under a name that no other has; sets its ``seed``."""
        item.seed = self._hash(name)
        group = self._groups[item.seed % GROUPS]
        if not group.members:
            self._used.append(group)
        group.members.append(item)
        self._count += 1
        group.weight += item.weight

    def remove(self, item: R) -> None:
        """Remove one that is in it, with the weight that it was added with."""
        group = self._groups[item.seed % GROUPS]
        group.members.remove(item)
        self._count -= 1
        group.weight -= item.weight
        if not group.members:
            self._used.remove(group)

    def first(self, key: bytes, fits: Callable[[R], bool]) -> R | None:
        """The one of a key; if it does not fit the next one, and so on; None when none fits."""
        if not self._used:
            return None
        point = self._hash(key)
        item = _winner(_winner(self._used, point).members, point)
        if fits(item):
            return item
        if self._count > FEW:
            # The keys of one that fails go to the other groups, not to its few neighbours.
            for group in sorted(self._used, key=lambda one: -_score(point, one.seed, one.weight))[1:]:
                item = _winner(group.members, point)
                if fits(item):
                    return item
        rest = [item for group in self._used for item in group.members if fits(item)]
        return _winner(rest, point) if rest else None
