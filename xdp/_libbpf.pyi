# SPDX-License-Identifier: Apache-2.0
"""Types of the cffi module that xdp/_libbpf_build.py makes.

C data is ``Any``: mypy cannot see into it.  Functions return 0, a descriptor or
a count, or a negative errno.
"""

from typing import Any

from typing_extensions import Buffer

CData = Any

class _CType:
    elements: dict[int, str]
    relements: dict[str, int]
    fields: list[tuple[str, Any]]
    length: int

class _FFI:
    NULL: CData
    def new(self, declaration: str, init: Any = ...) -> CData: ...
    def cast(self, declaration: str, value: Any) -> CData: ...
    def sizeof(self, declaration: Any) -> int: ...
    def offsetof(self, declaration: str, *fields: str | int) -> int: ...
    def typeof(self, declaration: Any) -> _CType: ...
    def buffer(self, data: CData, size: int = ...) -> Any: ...
    def from_buffer(self, declaration: str, buffer: Buffer, require_writable: bool = ...) -> CData: ...
    def string(self, data: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, data: CData, length: int) -> Any: ...
    def memmove(self, destination: Any, source: Any, size: int) -> None: ...
    def addressof(self, data: CData, *fields: str | int) -> CData: ...

class _Lib:
    # bpf/include/abi.h: sizes, limits, enum values
    SLUICE_ABI_VERSION: int
    SLUICE_BANKS: int
    SLUICE_MARK_COOKIE: int
    SLUICE_MARK_SALT: int
    SLUICE_MAX_LANES: int
    SLUICE_MAX_SERVICES: int
    SLUICE_MAX_CLASSES: int
    SLUICE_MAX_KINDS: int
    SLUICE_MAX_PATTERNS: int
    SLUICE_MAX_QUEUES: int
    SLUICE_MAX_WORKERS: int
    SLUICE_MAX_STRANGERS: int
    SLUICE_STRANGER_SETS: int
    SLUICE_STRANGER_WAYS: int
    SLUICE_STRANGER_INDEX_BITS: int
    SLUICE_STRANGER_ENTRIES: int
    SLUICE_MAX_KNOWN: int
    SLUICE_MAX_PREFIXES: int
    SLUICE_PREFIX_BUCKETS: int
    SLUICE_PORTS: int
    SLUICE_FILTER_WORDS: int
    SLUICE_HOLD_MARKS: int
    SLUICE_HOLD_LINES: int
    SLUICE_FILTER_SIZE: int
    SLUICE_PORTS_SIZE: int
    SLUICE_PATTERNS_SIZE: int
    SLUICE_RULES_SIZE: int
    SLUICE_XSKS_SIZE: int
    SLUICE_REASONS: int
    SLUICE_COUNTER_ROWS: int
    SLUICE_NO_LANE: int
    SLUICE_VERDICTS_SIZE: int
    SLUICE_POLICY_DROP_FRAGMENTS: int
    SLUICE_HEARTBEAT_MAGIC: int
    SLUICE_HEARTBEAT_PROBE: int
    SLUICE_HEARTBEAT_REPLY: int
    SLUICE_HEARTBEAT_PING: int
    SLUICE_HEARTBEAT_PONG: int
    SLUICE_PASS_TRUNCATED: int
    SLUICE_PASS_NOT_IP: int
    SLUICE_PASS_VLAN_DEPTH: int
    SLUICE_PASS_IP_HEADER: int
    SLUICE_PASS_EXTENSION: int
    SLUICE_PASS_FRAGMENT: int
    SLUICE_PASS_NOT_UDP: int
    SLUICE_PASS_UDP_LENGTH: int
    SLUICE_PASS_NOT_OURS: int
    SLUICE_PASS_SOURCE: int
    SLUICE_PASS_POLICY: int
    SLUICE_PASS_LANE: int
    SLUICE_PASS_NO_SOCKET: int
    SLUICE_DROP_FRAGMENT: int
    SLUICE_DROP_DENIED: int
    SLUICE_DROP_POLICY: int
    SLUICE_DROP_HELD: int
    SLUICE_DROP_PEER_LIMIT: int
    SLUICE_DROP_PREFIX_LIMIT: int
    SLUICE_DROP_LANE_LIMIT: int
    SLUICE_STEER: int
    SLUICE_STEER_DEMOTED: int
    SLUICE_PASS_DEMOTED: int
    SLUICE_REPLY: int
    SLUICE_ACTION_PASS: int
    SLUICE_ACTION_LANE: int
    SLUICE_ACTION_DROP: int
    SLUICE_ACTION_DENY: int
    SLUICE_ACTION_REPLY: int
    SLUICE_OVER_DROP: int
    SLUICE_OVER_DEMOTE: int
    SLUICE_END_SOCKET: int
    SLUICE_END_KERNEL: int

    # linux/bpf.h
    BPF_ANY: int
    BPF_NOEXIST: int
    BPF_EXIST: int
    BPF_XDP: int
    BPF_LINK_TYPE_XDP: int
    BPF_PROG_TYPE_XDP: int
    BPF_PROG_TYPE_SCHED_CLS: int
    BPF_PROG_TYPE_SK_REUSEPORT: int
    BPF_SK_REUSEPORT_SELECT: int
    BPF_F_XDP_HAS_FRAGS: int
    BPF_F_TEST_XDP_LIVE_FRAMES: int
    BPF_OBJ_NAME_LEN: int
    BPF_MAP_TYPE_HASH: int
    BPF_MAP_TYPE_ARRAY: int
    BPF_MAP_TYPE_PERCPU_HASH: int
    BPF_MAP_TYPE_PERCPU_ARRAY: int
    BPF_MAP_TYPE_LRU_HASH: int
    BPF_MAP_TYPE_LRU_PERCPU_HASH: int
    BPF_MAP_TYPE_LPM_TRIE: int
    BPF_MAP_TYPE_ARRAY_OF_MAPS: int
    BPF_MAP_TYPE_HASH_OF_MAPS: int
    BPF_MAP_TYPE_XSKMAP: int
    BPF_MAP_TYPE_REUSEPORT_SOCKARRAY: int
    BPF_F_MMAPABLE: int
    XDP_FLAGS_SKB_MODE: int
    XDP_FLAGS_DRV_MODE: int

    def sluice_prog_load(
        self,
        type: int,
        name: bytes,
        license: bytes,
        insns: CData,
        insn_count: int,
        expected_attach_type: int,
        prog_flags: int,
        log: CData,
        log_size: int,
        log_level: int,
    ) -> int: ...
    def sluice_prog_test_run(self, prog_fd: int, run: CData) -> int: ...
    def sluice_prog_info(self, fd: int, info: CData) -> int: ...
    def sluice_map_info(self, fd: int, info: CData) -> int: ...
    def sluice_link_info(self, fd: int, info: CData) -> int: ...
    def sluice_map_create(
        self,
        type: int,
        name: bytes,
        key_size: int,
        value_size: int,
        max_entries: int,
        flags: int,
        inner_fd: int,
    ) -> int: ...
    def sluice_link_create(self, prog_fd: int, ifindex: int, attach_type: int, flags: int) -> int: ...
    def sluice_link_update(self, link_fd: int, new_prog_fd: int) -> int: ...
    def sluice_map_lookup(self, fd: int, key: CData, value: CData) -> int: ...
    def sluice_map_update(self, fd: int, key: CData, value: CData, flags: int) -> int: ...
    def sluice_map_delete(self, fd: int, key: CData) -> int: ...
    def sluice_map_next_key(self, fd: int, key: CData, next: CData) -> int: ...
    def sluice_map_lookup_batch(
        self, fd: int, in_batch: CData, out_batch: CData, keys: CData, values: CData, count: CData
    ) -> int: ...
    def sluice_map_update_batch(
        self, fd: int, keys: CData, values: CData, count: CData, flags: int
    ) -> int: ...
    def sluice_map_delete_batch(self, fd: int, keys: CData, count: CData) -> int: ...
    def sluice_prog_next_id(self, start: int, next: CData) -> int: ...
    def sluice_map_next_id(self, start: int, next: CData) -> int: ...
    def sluice_link_next_id(self, start: int, next: CData) -> int: ...
    def sluice_prog_by_id(self, id: int) -> int: ...
    def sluice_map_by_id(self, id: int) -> int: ...
    def sluice_link_by_id(self, id: int) -> int: ...
    def sluice_map_make(self, info: CData, btf_fd: int) -> int: ...
    def sluice_btf_load(self, types: CData, size: int) -> int: ...
    def sluice_btf_by_id(self, id: int) -> int: ...
    def sluice_btf_raw(self, btf_fd: int, buffer: CData, size: int, kernel_btf: CData) -> int: ...
    def sluice_map_freeze(self, fd: int) -> int: ...
    def sluice_obj_pin(self, fd: int, path: bytes) -> int: ...
    def sluice_obj_get(self, path: bytes) -> int: ...
    def sluice_probe_prog_type(self, type: int) -> int: ...
    def sluice_probe_map_type(self, type: int) -> int: ...
    def sluice_probe_helper(self, prog_type: int, helper_id: int) -> int: ...
    def sluice_probe_xsk_sg(self) -> int: ...
    def sluice_possible_cpus(self) -> int: ...
    def sluice_filter_add(self, words: CData, addresses: CData, count: int) -> None: ...
    def sluice_libbpf_version(self) -> CData: ...

ffi: _FFI
lib: _Lib
