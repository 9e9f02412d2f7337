# SPDX-License-Identifier: Apache-2.0
"""The C classifier for datagrams from kernel sockets, made from a policy.

The same compiled tables as the XDP program's (:mod:`xdp.tables`), so a datagram
gets the same reason, class, kind and lane whichever way it came; see
native/classify.h for what differs.
"""

from __future__ import annotations

import errno
import secrets
from typing import TYPE_CHECKING

from userspace.native._native import ffi, lib
from xdp._libbpf import ffi as table_ffi
from xdp.abi import REASONS, Address, pack_address
from xdp.errors import SluiceError, UsageError
from xdp.policy import Policy
from xdp.tables import Tables, check_times, compile_policy, hold_limit

if TYPE_CHECKING:
    from userspace.native._native import CData

_KEY_BYTES = 16


class DatagramClassifier:
    """Owns a ``struct sl_classifier``; belongs to one thread.

    ``key``: 16 secret bytes for its hashes, drawn at random unless a test needs
    to repeat a run.
    """

    def __init__(self, policy: Policy, *, key: bytes | None = None) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES) if key is None else key
        self.policy = policy
        tables = self._tables(policy)
        classifier = lib.sl_classifier_new(tables)
        if classifier == ffi.NULL:
            lib.sl_tables_free(tables)
            raise _out_of_memory()
        #: the ``struct sl_classifier *``, for C code; freed with this object
        self.native = ffi.gc(classifier, lib.sl_classifier_free)

    def _tables(self, policy: Policy) -> CData:
        compiled = compile_policy(policy)
        ports = ffi.new("struct sluice_port[]", lib.SLUICE_PORTS)
        raw = ffi.buffer(ports)
        size = ffi.sizeof("struct sluice_port")
        for port, entry in compiled.ports.items():
            raw[port * size : (port + 1) * size] = entry
        error = ffi.new("int *")
        # ffi.new keeps only what it owns alive; compiled and ports live until the copy is made.
        tables = lib.sl_tables_new(_source(compiled, ports), self._key, error)
        if tables == ffi.NULL and error[0] == errno.ENOMEM:
            raise _out_of_memory()
        if tables == ffi.NULL:
            raise SluiceError(
                "the compiled policy does not fit this build's tables",
                hint="rebuild the native modules: python userspace/native/build.py --force",
            )
        return tables

    def swap(self, policy: Policy) -> None:
        """Follow another policy from the next datagram on; peers keep their limits and counters."""
        tables = self._tables(policy)
        if lib.sl_classifier_swap(self.native, tables):
            lib.sl_tables_free(tables)
            raise _out_of_memory()
        self.policy = policy

    def hold(
        self, address: Address, packets_per_second: int, burst: int, *, until_ns: int, now_ns: int
    ) -> None:
        """Hold a configured peer at a rate until a time, as :meth:`xdp.holds.PeerHolds.hold` does.

        Raises UsageError for a stranger and for what is out of range.
        """
        check_times(until_ns, now_ns)
        self._hold(address, (*hold_limit(packets_per_second, burst), until_ns, 0, 0), now_ns)

    def release(self, address: Address) -> None:
        """End the hold of a configured peer.  Raises UsageError for a stranger."""
        self._hold(address, (0, 0, 0, 0, 0), 0)

    def _hold(self, address: Address, fields: tuple[int, ...], now_ns: int) -> None:
        held = ffi.new("struct sluice_hold *", fields)
        if lib.sl_classifier_hold(self.native, _raw_address(address), held, now_ns):
            raise UsageError(f"{address} is no configured peer, and only those can be held")

    @property
    def strangers(self) -> int:
        """How many addresses outside of the configured peers are remembered."""
        return lib.sl_classifier_strangers(self.native)

    def verdicts(self) -> dict[tuple[int, str], tuple[int, int]]:
        """(row, reason) -> (datagrams, payload bytes), without zeros; a row is a lane or SLUICE_NO_LANE."""
        table = lib.sl_classifier_counters(self.native).verdict
        found: dict[tuple[int, str], tuple[int, int]] = {}
        for row in range(lib.SLUICE_NO_LANE + 1):
            for number, reason in enumerate(REASONS):
                count = table[row * lib.SLUICE_REASONS + number]
                if count.packets:
                    found[row, reason] = (count.packets, count.bytes)
        return found

    def peer(self, address: Address) -> dict[str, int] | None:
        """Counters of one sender, or None when it was never seen or is forgotten."""
        peer = lib.sl_classifier_peer(self.native, _raw_address(address))
        if peer == ffi.NULL:
            return None
        names = ("id", "packets", "bytes", "drops", "tat_ns", "last_seen_ns", "first_seen_ns")
        return {name: getattr(peer, name) for name in names}


def _raw_address(address: Address) -> CData:
    raw = ffi.new("struct sluice_address *")
    ffi.memmove(raw, pack_address(address), ffi.sizeof("struct sluice_address"))
    return raw


def _source(compiled: Tables, ports: CData) -> CData:
    """``struct sl_policy_source`` over arrays of the other cffi module, whose types are not ours."""

    def here(kind: str, data: CData) -> CData:
        return ffi.cast(f"{kind} *", int(table_ffi.cast("uintptr_t", data)))

    return ffi.new(
        "struct sl_policy_source *",
        {
            "policy": here("struct sluice_policy", compiled.policy),
            "ports": ports,
            "patterns": here("struct sluice_patterns", compiled.patterns),
            "rules": here("struct sluice_rule", compiled.rules),
            "prefixes": here("struct sluice_prefix", compiled.prefixes.keys),
            "classes": here("struct sluice_prefix_class", compiled.prefixes.values),
            "known": here("struct sluice_address", compiled.known.keys),
            "known_ids": here("uint32_t", compiled.known.ids),
            "prefix_count": compiled.prefixes.count,
            "known_count": compiled.known.count,
        },
    )


def _out_of_memory() -> SluiceError:
    return SluiceError("no memory for the tables of the policy", hint="free memory or shorten the policy")
