# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: a veth pair between two network namespaces.

    with Lab(queues=2) as lab:
        lab.server.run(["ip", "address"])
        with lab.client.enter():
            sock = socket.socket(...)        # lives in the client's namespace

The server is where a program under test is attached, the client is where traffic comes from.
Both have IPv4 and IPv6 addresses and a link-local address that is usable at once.  Nothing of
a lab is ever visible outside its two namespaces, so all labs use the same addresses.

Only the network namespace is entered: /sys and a mounted bpffs stay those of the caller (unlike
with ``ip netns exec``), so /sys/class/net shows the caller's interfaces, not the host's.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pyroute2 import IPRoute, NetlinkError, netns
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from sluice_cli import lab_nics
from sluice_cli.lab_pass import load_pass
from sluice_cli.lab_state import (
    Marker,
    check_name,
    locked,
    process_started,
    read_marker,
    read_markers,
    remove_marker,
    write_marker,
)
from xdp._libbpf import lib
from xdp.errors import (
    BusyError,
    InterfaceGoneError,
    NotLoadedError,
    SluiceError,
    UnsupportedError,
    UsageError,
)

__all__ = ["Host", "Lab", "reclaim", "remove"]

SERVER_INTERFACE: Final = "srv0"
CLIENT_INTERFACE: Final = "cli0"
# Wide prefixes, so that a generator can invent many source addresses that are on the link.
SERVER_V4: Final = IPv4Interface("10.81.0.1/16")
CLIENT_V4: Final = IPv4Interface("10.81.0.2/16")
SERVER_V6: Final = IPv6Interface("fd81::1/64")
CLIENT_V6: Final = IPv6Interface("fd81::2/64")

#: drivers/net/veth.c: up to here packet, headroom and skb_shared_info share a page.
ONE_PAGE_MTU: Final = 3498

NETNS_DIRECTORY: Final = Path("/run/netns")
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h: usable at once, no duplicate address detection
_IFA_F_UNUSABLE: Final = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_SETTLE_SECONDS: Final = 15.0  # a veth takes some ms, a card that negotiates its speed some seconds
_STOP_SECONDS: Final = 2.0  # for a process that we started, between SIGTERM and SIGKILL

# The link is silent unless somebody uses it: no duplicate address detection, no router solicitations.
_SYSCTLS: Final = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/router_solicitations": "0",
}


class Host:
    """One end of the lab's cable.

    ``namespace`` is its name in /run/netns; ``interface``, ``ifindex``, ``mac`` are those of its only
    link; ``ipv4``, ``ipv6``, ``link_local`` the addresses on it.  ``frags``: its MTU takes programs that
    are made for packets in several pages.
    """

    def __init__(
        self,
        namespace: str,
        interface: str,
        ipv4: IPv4Interface,
        ipv6: IPv6Interface,
        *,
        frags: bool = False,
    ) -> None:
        self.namespace = namespace
        self.interface = interface
        self.ipv4: IPv4Address = ipv4.ip
        self.ipv6: IPv6Address = ipv6.ip
        self.networks = (ipv4, ipv6)
        self.ifindex = 0
        self.mac = ""
        self.link_local = IPv6Address("::")
        self._frags = frags
        self._children: list[subprocess.Popen[Any]] = []

    @property
    def path(self) -> Path:
        """The file that keeps the namespace alive."""
        return NETNS_DIRECTORY / self.namespace

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Put the calling thread, and only it, into this host's network namespace.

        Sockets opened inside stay in the namespace after the block is left.
        """
        with _opened("/proc/thread-self/ns/net") as home, _opened(self.path) as there:
            netns.setns(there)
            try:
                yield
            finally:
                netns.setns(home)

    def popen(self, arguments: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """`subprocess.Popen` in this namespace; a process still there when the lab ends is terminated."""
        with self.enter():
            child = subprocess.Popen(arguments, **options)
        self._children.append(child)
        return child

    def run(
        self, arguments: Sequence[str | os.PathLike[str]], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """`subprocess.run` in this namespace, with its options; output is captured as text by default.

        Raises:
            subprocess.CalledProcessError: exit code not 0, unless ``check=False``.
        """
        options = {"capture_output": True, "text": True, **options}
        with self.enter():
            return subprocess.run(arguments, check=check, **options)

    def statistics(self) -> dict[str, int]:
        """The driver's counters of the interface, as ``ethtool -S`` shows them.

        Raises:
            InterfaceGoneError: there is no such interface any more.
        """
        try:
            with self.enter(), closing(IoctlEthtool(self.interface)) as ethtool:
                return {str(name): int(value) for name, value in ethtool.get_statistics()}
        except (FileNotFoundError, EthtoolError) as error:
            raise InterfaceGoneError(
                f"no {self.interface} in {self.namespace}",
                hint="does the lab still exist? see: sluice lab list",
                detail=repr(error),
            ) from None

    def attach_pass(self) -> None:
        """Attach a program that passes everything, natively; it stays as long as the interface.

        A veth end takes frames sent by XDP_TX or by a live-frames generator only when it has a native
        program itself.  The client has one from the start; the server's end is left free for the
        program under test and needs this call only in a comparison without one.

        Raises:
            BusyError: the interface has a program.
        """
        self.attach(load_pass(frags=self._frags))

    def detach(self) -> None:
        """Remove what `attach_pass` or `attach` attached."""
        self.attach(-1)

    def attach(self, descriptor: int) -> None:
        """Attach a program natively, and close its descriptor; -1 removes it. Raises BusyError."""
        try:
            with _route(self.namespace) as route:
                attributes: list[tuple[str, int]] = [("IFLA_XDP_FD", descriptor)]
                # UPDATE_IF_NOEXIST | DRV_MODE (linux/if_link.h)
                attributes.append(("IFLA_XDP_FLAGS", 0x5 if descriptor >= 0 else 0x4))
                route.link("set", index=self.ifindex, IFLA_XDP={"attrs": attributes})
        except NetlinkError as error:
            raise BusyError(
                f"{self.interface} in {self.namespace}: no program: {os.strerror(error.code)}",
                hint=f"see what is attached: ip netns exec {self.namespace} ip -d link show {self.interface}",
            ) from None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def settle(self) -> None:
        """Wait until the link is usable: some cards lose carrier when a program is attached.

        Raises:
            UnsupportedError: not after 15 s.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        with _route(self.namespace) as route:
            while not self._read_link(route):
                if time.monotonic() > deadline:
                    raise UnsupportedError(
                        f"{self.interface} in {self.namespace} has no carrier or IPv6 address"
                        f" after {_SETTLE_SECONDS:.0f} s",
                        hint="look at it with: sluice lab shell; is IPv6 switched off (ipv6.disable=1)?",
                    )
                time.sleep(0.001)

    def _stop_children(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.terminate()
        for child in self._children:
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()

    def _read_link(self, route: IPRoute) -> bool:
        """Learn the interface; True when it is up and its link-local address is usable."""
        links = list(route.link("get", ifname=self.interface))
        self.ifindex = int(links[0]["index"])
        self.mac = str(links[0].get("address"))
        if links[0].get("operstate") != "UP":
            return False
        for message in route.get_addr(index=self.ifindex):
            address = str(message.get("address"))
            if message["family"] == 10 and IPv6Address(address).is_link_local:
                self.link_local = IPv6Address(address)
                return not int(message.get("flags") or 0) & _IFA_F_UNUSABLE
        return False


class Lab:
    """Two connected hosts; a context manager that leaves nothing behind.

    Args:
        name: of the lab; a random one by default.
        queues: receive and transmit queues of each end, 1 to 64.  A veth end receives on the queue
            that the *sending CPU* selects: CPU modulo queues.
        persistent: the lab stays when the block or the process ends, until ``sluice lab down``.
        static_neighbours: write each host's addresses into the other's neighbour table.
        mtu: of both ends, 1280 to 65535; above 3498 a packet is in several pages, which a native
            program on veth has to be made for (jumbo frames), and Linux 5.18 or later is needed.

    A lab of a process that was killed is removed by the next start of any lab.

    Raises (from entering):
        PermissionsError: not root.
        BusyError: a lab of this name exists.
        UnsupportedError: the kernel has no veth, namespaces or IPv6.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        queues: int = 1,
        persistent: bool = False,
        static_neighbours: bool = False,
        mtu: int = 1500,
    ) -> None:
        if not 1 <= queues <= lib.SLUICE_MAX_QUEUES:
            raise UsageError(f"queues is {queues}; allowed: 1 to {lib.SLUICE_MAX_QUEUES}")
        if not 1280 <= mtu <= 65535:
            raise UsageError(f"mtu is {mtu}; allowed: 1280 (IPv6's minimum) to 65535")
        self.name = check_name(secrets.token_hex(4) if name is None else name)
        self.queues = queues
        self.mtu = mtu
        self.static_neighbours = static_neighbours
        self._persistent = persistent
        self._built = False
        started = process_started(os.getpid())
        owner = (0, 0) if persistent else (os.getpid(), started or 0)
        self._marker = Marker(self.name, queues, *owner, ready=False)
        server, client = self._marker.namespaces
        self.nics = lab_nics.named()
        interfaces = self.nics or (SERVER_INTERFACE, CLIENT_INTERFACE)
        frags = mtu > ONE_PAGE_MTU
        self.server = Host(server, interfaces[0], SERVER_V4, SERVER_V6, frags=frags)
        self.client = Host(client, interfaces[1], CLIENT_V4, CLIENT_V6, frags=frags)

    @classmethod
    def open(cls, name: str) -> Lab:
        """A lab that exists already; leaving its block stops only what was started through it.

        Raises:
            NotLoadedError: there is no such lab.
        """
        marker = read_marker(check_name(name))
        if marker is None or marker.abandoned or not marker.ready:
            raise NotLoadedError(f"no lab {name!r}", hint=f"make it with: sluice lab up --name {name}")
        lab = cls(name, queues=marker.queues, persistent=True)
        lab._learn()
        lab._built = True
        return lab

    @property
    def hosts(self) -> tuple[Host, Host]:
        """The server, then the client."""
        return self.server, self.client

    def __enter__(self) -> Self:
        if not self._built:
            self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def up(self) -> None:
        """Build the lab; what entering the block does."""
        with locked():
            reclaim_locked()
            if read_marker(self.name) is not None:
                raise BusyError(
                    f"a lab {self.name!r} exists already",
                    hint=f"remove it with: sluice lab down --name {self.name}",
                )
            for host in self.hosts:
                if host.path.exists():
                    raise BusyError(
                        f"a network namespace {host.namespace} exists, but it is no lab's",
                        hint=f"choose another name, or remove it with: ip netns delete {host.namespace}",
                    )
            try:
                write_marker(self._marker)
                self._build()
                self._learn()
                self.client.attach_pass()
                self.client.settle()
                write_marker(replace(self._marker, ready=True))
                self._built = True
            except BaseException as error:
                _remove_locked(self.name)
                if isinstance(error, NetlinkError | OSError):
                    raise _unsupported(error) from error
                raise

    def close(self) -> None:
        """Stop the processes started through this object and, unless persistent, remove the lab."""
        try:
            self._close()
        except KeyboardInterrupt:
            # A second Ctrl-C must not leave half of it behind; every step can be repeated.
            self._close()
            raise

    def _close(self) -> None:
        for host in self.hosts:
            host._stop_children()
        if self._built and not self._persistent:
            with locked():
                _remove_locked(self.name)
            self._built = False

    def _build(self) -> None:
        for host in self.hosts:
            netns.create(host.namespace)
            with host.enter():
                for key, value in _SYSCTLS.items():
                    Path("/proc/sys", key).write_text(value, encoding="ascii")
        if self.nics:
            for host in self.hosts:
                with _opened(host.path) as namespace:
                    lab_nics.borrow(host.interface, namespace, self.queues, self.mtu)
        else:
            self._lay_veth()
        for host in self.hosts:
            with _route(host.namespace) as route:
                index = route.link_lookup(ifname=host.interface)[0]
                for network in host.networks:
                    flags = _IFA_F_NODAD if network.version == 6 else 0
                    route.addr(
                        "add",
                        index=index,
                        address=str(network.ip),
                        prefixlen=network.network.prefixlen,
                        flags=flags,
                    )
                for link in (route.link_lookup(ifname="lo")[0], index):
                    route.link("set", index=link, state="up")

    def _lay_veth(self) -> None:
        with _route(self.server.namespace) as route, _opened(self.client.path) as peer:
            shape = {"num_tx_queues": self.queues, "num_rx_queues": self.queues, "mtu": self.mtu}
            route.link(
                "add",
                ifname=SERVER_INTERFACE,
                kind="veth",
                peer={"ifname": CLIENT_INTERFACE, "net_ns_fd": peer, **shape},
                **shape,
            )
        for host in self.hosts:
            # A checksum left to the "hardware" is still partial when XDP sees the packet; what the
            # program then sends on is dropped by the receiver.
            with host.enter(), closing(IoctlEthtool(host.interface)) as ethtool:
                ethtool.set_offload_flag("tx-checksumming", False)

    def _learn(self) -> None:
        """Read ifindexes, MACs and link-local addresses, waiting for carrier."""
        for host in self.hosts:
            host.settle()
        if self.static_neighbours:
            for host, other in ((self.server, self.client), (self.client, self.server)):
                with _route(host.namespace) as route:
                    for address in (other.ipv4, other.ipv6, other.link_local):
                        entry = {"dst": str(address), "lladdr": other.mac, "ifindex": host.ifindex}
                        route.neigh("replace", state="permanent", **entry)


def reclaim() -> list[str]:
    """Remove the labs whose owner was killed; returns their names."""
    with locked():
        return reclaim_locked()


def reclaim_locked() -> list[str]:
    """`reclaim` for a caller that holds the lock."""
    names = [marker.name for marker in read_markers()[0] if marker.abandoned]
    for name in names:
        _remove_locked(name)
    return names


def remove(name: str) -> bool:
    """Remove a lab whatever its state; False when there was none.  Its processes are left alone.

    Raises:
        BusyError: it belongs to a process that is alive.
    """
    check_name(name)
    with locked():
        try:
            marker = read_marker(name)
        except UsageError:
            marker = None  # damaged; to remove it is what was asked for
        else:
            if marker is None:
                return False
        if marker is not None and not marker.persistent and not marker.abandoned:
            raise BusyError(
                f"lab {name!r} belongs to process {marker.owner_pid}",
                hint=f"it goes when that process ends: kill {marker.owner_pid}",
            )
        _remove_locked(name)
    return True


def _remove_locked(name: str) -> None:
    """Remove cable, namespaces and marker; any of them may be missing already."""
    for namespace in Marker(name, 1, 0, 0, ready=False).namespaces:
        path = NETNS_DIRECTORY / namespace
        if not path.exists():
            continue
        # Killed while building, it left a file that no namespace is mounted on.
        mounted = path.stat().st_dev != path.parent.stat().st_dev
        if mounted:
            # A process inside keeps a namespace alive, so the cable is cut by hand.
            with suppress(NetlinkError), _route(namespace) as route:
                lab_nics.give_back(route)
                for interface in (SERVER_INTERFACE, CLIENT_INTERFACE):
                    for index in route.link_lookup(ifname=interface):
                        route.link("del", index=index)
        netns.remove(namespace)
    remove_marker(name)


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _route(namespace: str) -> IPRoute:
    """Netlink in a namespace that exists; without the flag pyroute2 would make it."""
    return IPRoute(netns=namespace, flags=0)


def _unsupported(error: NetlinkError | OSError) -> SluiceError:
    number = int(error.code if isinstance(error, NetlinkError) else error.errno or 0)
    return UnsupportedError.from_errno(
        "cannot make a lab",
        number,
        hint="it needs veth, network namespaces, IPv6, and more rights than a plain container has",
        detail=str(error),
    )
