# SPDX-License-Identifier: Apache-2.0
"""Settings of an interface that matter to lanes: read, changed, and put back by :mod:`xdp.journal`.

Channels and offloads through ethtool's ioctl, the NAPI timers through sysfs. /sys shows the
interfaces of the network namespace that it was mounted in, which need not be ours (nsenter and
setns keep the mount): so a private sysfs is opened for each access, without mounting it
anywhere (fsopen(2), Linux 5.2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from xdp import policy_model
from xdp.errors import InterfaceGoneError, PermissionsError, SluiceError, UnsupportedError, UsageError

# The same numbers on all architectures (asm-generic/unistd.h and up from 424).
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC, _FSCONFIG_CMD_CREATE, _FSMOUNT_CLOEXEC = 1, 6, 1

_CHANNELS = re.compile(r"rx=(\d+) tx=(\d+) combined=(\d+)")


@dataclass(frozen=True)
class Setting:
    """One thing that can be read and written, as text; the text that was read can be written back."""

    key: str
    read: Callable[[str], str]
    write: Callable[[str, str], None]


def _check_name(interface: str) -> None:
    """Raises `UsageError` for what no interface can be called (dev_valid_name, net/core/dev.c)."""
    if not 1 <= len(interface.encode()) <= 15 or "/" in interface or interface in {".", ".."}:
        raise UsageError(f"{interface!r} is no name for an interface")


@contextmanager
def _explained(interface: str, key: str) -> Iterator[None]:
    """Turn what the kernel says into our errors."""
    try:
        yield
    except OSError as error:
        code = error.errno or errno.EIO
        what = f"{interface}: {key}"
        if code in {errno.ENODEV, errno.ENOENT, errno.ENXIO}:
            raise InterfaceGoneError(f"{what}: there is no such interface") from error
        if code in {errno.EPERM, errno.EACCES}:
            raise PermissionsError(f"{what}: not permitted", hint="run as root") from error
        if code in {errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE}:
            raise UnsupportedError(
                f"{what}: refused by the driver: {os.strerror(code)}",
                hint=f"`ethtool -l {interface}` and `ethtool -k {interface}` show what it can do",
            ) from error
        raise SluiceError.from_errno(what, code) from error


@contextmanager
def _sysfs() -> Iterator[int]:
    """A sysfs of the calling thread's network namespace, as a directory's descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> int:
        result = int(libc.syscall(*arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    context = call(_SYS_FSOPEN, b"sysfs", _FSOPEN_CLOEXEC)
    try:
        call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield mount
    finally:
        os.close(mount)


def _sysfs_access(interface: str, name: str, value: str | None) -> str:
    _check_name(interface)
    with _explained(interface, name), _sysfs() as root:
        flags = os.O_RDONLY if value is None else os.O_WRONLY
        descriptor = os.open(f"class/net/{interface}/{name}", flags | os.O_CLOEXEC, dir_fd=root)
        try:
            if value is not None:
                os.write(descriptor, value.encode("ascii"))
                return value
            return os.read(descriptor, 4096).decode("ascii").strip()
        finally:
            os.close(descriptor)


def sysfs_text(interface: str, name: str) -> str:
    """A file of the interface's folder in sysfs; "" where it has none of that name."""
    try:
        return _sysfs_access(interface, name, None)
    except (InterfaceGoneError, UnsupportedError):
        return ""


def device_of(interface: str) -> str:
    """The name of its device on its bus, such as "0000:3b:00.0" or "virtio2"; "" of a virtual one."""
    _check_name(interface)
    with _sysfs() as root:
        try:
            return Path(os.readlink(f"class/net/{interface}/device", dir_fd=root)).name
        except OSError:
            return ""


def _timer(name: str) -> Setting:
    def write(interface: str, value: str) -> None:
        _sysfs_access(interface, name, value)

    return Setting(name, lambda interface: _sysfs_access(interface, name, None), write)


@contextmanager
def _ethtool(interface: str, key: str) -> Iterator[object]:
    from pyroute2.ethtool.ioctl import IoctlEthtool, NoSuchDevice, NotSupportedError

    _check_name(interface)
    with _explained(interface, key):
        try:
            with closing(IoctlEthtool(interface)) as opened:
                yield opened
        except NotSupportedError as error:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
        except NoSuchDevice as error:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error


def _offload(key: str, flag: str) -> Setting:
    def read(interface: str) -> str:
        with _ethtool(interface, key) as opened:
            return "on" if opened.get_offload_flags()[flag] else "off"  # type: ignore[attr-defined]

    def write(interface: str, value: str) -> None:
        with _ethtool(interface, key) as opened:
            opened.set_offload_flag(flag, int(value == "on"))  # type: ignore[attr-defined]

    return Setting(key, read, write)


def _read_channels(interface: str) -> str:
    with _ethtool(interface, "channels") as opened:
        found = opened.get_channels()  # type: ignore[attr-defined]
        return f"rx={found.rx_count} tx={found.tx_count} combined={found.combined_count}"


def _write_channels(interface: str, value: str) -> None:
    match = _CHANNELS.fullmatch(value)
    if match is None:
        raise UsageError(f"{interface}: channels {value!r}; allowed: rx=N tx=N combined=N")
    with _ethtool(interface, "channels") as opened:
        wanted = opened.get_channels()  # type: ignore[attr-defined]
        wanted.rx_count, wanted.tx_count, wanted.combined_count = map(int, match.groups())
        opened.set_channels(wanted)  # type: ignore[attr-defined]


#: All settings by key. NAPI timers: Documentation/networking/napi.rst.
SETTINGS: Mapping[str, Setting] = {
    setting.key: setting
    for setting in (
        Setting("channels", _read_channels, _write_channels),
        _timer("napi_defer_hard_irqs"),  # interrupts to leave out
        _timer("gro_flush_timeout"),  # nanoseconds
        _offload("gro", "generic-receive-offload"),
        _offload("lro", "large-receive-offload"),
    )
}


def channels_for(interface: str, queues: int) -> str:
    """The value of "channels" that gives an interface that many receive queues.

    Raises `UsageError` when it has not that many, `UnsupportedError` where they can't be chosen.
    """
    with _ethtool(interface, "channels") as opened:
        found = opened.get_channels()  # type: ignore[attr-defined]
    most = found.max_combined or found.max_rx
    if not 1 <= queues <= most:
        raise UsageError(f"{interface}: {queues} queues; allowed: 1 to {most}")
    if found.max_combined:
        return f"rx=0 tx=0 combined={queues}"
    return f"rx={queues} tx={min(queues, found.max_tx)} combined=0"


@dataclass(frozen=True)
class Tuning:
    """What a start asks to change; None leaves a setting alone."""

    queues: int | None = None
    napi_defer_hard_irqs: int | None = None
    gro_flush_timeout: int | None = None
    gro: bool | None = None
    lro: bool | None = None

    def before(self, policy: policy_model.Tuning) -> policy_model.Tuning:
        """The policy's ``[tuning]``, with what this says in place of what that says."""
        given = {key: getattr(self, key) for key in ("napi_defer_hard_irqs", "gro_flush_timeout")}
        said = {key: value for key, value in given.items() if value is not None}
        return msgspec.structs.replace(policy, **said)

    def over(self, policy: policy_model.Tuning) -> Tuning:
        """The same, and what the policy says of the interface where this says nothing."""
        both = self.before(policy)
        return replace(
            self,
            napi_defer_hard_irqs=both.napi_defer_hard_irqs,
            gro_flush_timeout=both.gro_flush_timeout,
        )

    def values(self, interface: str) -> list[tuple[Setting, str]]:
        """The settings with their wanted values, in the order to make the changes."""
        wanted: list[tuple[str, str]] = []
        if self.queues is not None:
            wanted.append(("channels", channels_for(interface, self.queues)))
        for key, number in (
            ("napi_defer_hard_irqs", self.napi_defer_hard_irqs),
            ("gro_flush_timeout", self.gro_flush_timeout),
        ):
            if number is not None:
                wanted.append((key, str(number)))
        for key, on in (("gro", self.gro), ("lro", self.lro)):
            if on is not None:
                wanted.append((key, "on" if on else "off"))
        return [(SETTINGS[key], value) for key, value in wanted]
