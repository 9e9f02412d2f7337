# SPDX-License-Identifier: Apache-2.0
"""The pin by which ``sluice up --persist`` keeps a program on an interface without any process."""

from __future__ import annotations

import contextlib
from pathlib import Path

from xdp.bpffs import mount_bpffs
from xdp.errors import BusyError, PermissionsError
from xdp.inventory import PIN_ROOT
from xdp.link import Link, program_name
from xdp.program import SteerProgram
from xdp.state import pin_folder


def foreign(interface: str, program_id: int, how: str) -> BusyError:
    """The interface is somebody else's, or our own earlier self's."""
    return BusyError(
        f"{interface} already carries program {program_id} ({program_name(program_id)}, {how})",
        hint="take it off (`sluice down`, or `ip link set NAME xdp off`), or say --replace",
    )


def pin_link(link: Link, interface: str) -> Path:
    """Pin the link of an interface of this network namespace; where it is pinned.

    Mounts the bpffs where none is. Raises what mounting and pinning raise; nothing is left then.
    """
    mount_bpffs()
    path = pin_folder(interface) / "link"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        link.pin(path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        raise
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise PermissionsError(
            f"looking for {path} is not permitted", hint="owning an interface needs root"
        ) from error


def refuse_pinned(interface: str, ifindex: int) -> None:
    """Raises BusyError when an earlier ``--persist`` keeps a program on this interface."""
    path = pin_folder(interface) / "link"
    if _is_there(path):
        with contextlib.closing(Link.from_pin(path)) as link:
            if link.ifindex == ifindex:
                raise foreign(interface, link.program_id, "kept by an earlier --persist")


def take_over(interface: str, ifindex: int, program: SteerProgram) -> Link | None:
    """The pinned link, now with ``program`` and without its pin; None when there is none.

    Packets meet the old program or the new one, never none. A pin of an interface that is gone
    is removed.
    """
    path = pin_folder(interface) / "link"
    if not _is_there(path):
        return None
    link = Link.from_pin(path)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(link.close)
        if link.ifindex != ifindex:
            _unpin(path)
            return None
        link.update(program)
        _unpin(path)
        cleanup.pop_all()
    return link


def sweep_pins() -> list[Path]:
    """Remove pins whose interface was deleted: they keep a program in memory that sees no packet."""
    removed = []
    for path in sorted(PIN_ROOT.glob("*/link")):
        with contextlib.closing(Link.from_pin(path)) as link:
            if link.ifindex == 0:
                _unpin(path)
                removed.append(path)
    return removed


def _unpin(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others' pins are in it
        path.parent.rmdir()
