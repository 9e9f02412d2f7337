# SPDX-License-Identifier: Apache-2.0
"""Congestion controllers by name, as users write them.

    make("cubic", now)                          # a controller for one path
    register("mine", MyController)              # from then on make("mine", now)

Options of a controller are given by a factory: ``register("cubic-classic", partial(Cubic, hystart=False))``.
"""

from __future__ import annotations

import re
from typing import Final

from userspace.flow.bbr import Bbr
from userspace.flow.congestion import MAX_DATAGRAM_SIZE, Congestion, CongestionFactory
from userspace.flow.copa import Copa
from userspace.flow.cubic import Cubic
from userspace.flow.newreno import NewReno
from xdp.errors import UsageError

#: Those there are; :func:`register` adds to them.
CONTROLLERS: Final[dict[str, CongestionFactory]] = {
    Bbr.name: Bbr,
    Copa.name: Copa,
    Cubic.name: Cubic,
    NewReno.name: NewReno,
}

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


def make(name: str, now: float, mtu: int = MAX_DATAGRAM_SIZE, seed: int = 0) -> Congestion:
    """A controller for a path: seconds, bytes of a full packet, seed of whatever it draws.

    Raises UsageError for a name that nobody registered, and for what the controller refuses.
    """
    try:
        factory = CONTROLLERS[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(CONTROLLERS))
        raise UsageError(f"no congestion controller {name!r}; there are {known}") from None
    return factory(now, mtu, seed)


def register(name: str, factory: CongestionFactory) -> None:
    """Make a controller known by a name of small letters, digits and hyphens.

    Raises UsageError for another kind of name, one that is taken, and a factory that can't be called.
    """
    if type(name) is not str or not _NAME.fullmatch(name):
        raise UsageError(
            f"a controller's name has 1 to 32 small letters, digits and hyphens, a letter first, not {name!r}"
        )
    if name in CONTROLLERS:
        raise UsageError(f"there is a congestion controller {name!r} already")
    if not callable(factory):
        raise UsageError(f"a congestion controller is made by a call of (now, mtu, seed), not by {factory!r}")
    CONTROLLERS[name] = factory
