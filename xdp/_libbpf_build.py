# SPDX-License-Identifier: Apache-2.0
"""Build script of the cffi module ``xdp._libbpf``: libbpf's calls and all of bpf/include/abi.h.

The layouts are not written a second time: the text of abi.h is fed to cffi as it
stands (without comments and preprocessor conditionals), and the C compiler
checks every size against the same header.

Run ``python xdp/_libbpf_build.py`` from the repository's root to build in place.
"""

from __future__ import annotations

import re
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parent.parent
ABI_HEADER = ROOT / "bpf" / "include" / "abi.h"

# As in asm-generic/int-ll64.h: the compiler tells unsigned long from unsigned long long.
FIXED_WIDTH_TYPES = """
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
"""

INFO_STRUCTS = """
/* Copies of the kernel's info structs in the order and width that Python reads. */
struct sluice_prog_info {
    uint32_t type, id, ifindex, nr_map_ids, btf_id, xlated_len, jited_len;
    uint64_t load_time_ns, run_time_ns, run_count;
    uint8_t tag[8];
    char name[17];
    uint32_t map_ids[64];
};
struct sluice_map_info {
    uint32_t type, id, key_size, value_size, max_entries, map_flags, ifindex;
    uint32_t btf_id, btf_key_type_id, btf_value_type_id;
    char name[17];
};
struct sluice_link_info { uint32_t type, id, prog_id, ifindex; };
struct sluice_test_run {
    const void *data_in; void *data_out;
    uint32_t data_size_in, data_size_out;       /* out: in capacity, out length */
    const void *ctx_in; uint32_t ctx_size_in;
    uint32_t repeat, flags, batch_size;
    uint32_t retval, duration_ns;
};
"""

LIBBPF_CALLS = """
#define BPF_ANY ...
#define BPF_NOEXIST ...
#define BPF_EXIST ...
#define BPF_XDP ...
#define BPF_LINK_TYPE_XDP ...
#define BPF_PROG_TYPE_XDP ...
#define BPF_PROG_TYPE_SCHED_CLS ...
#define BPF_PROG_TYPE_SK_REUSEPORT ...
#define BPF_SK_REUSEPORT_SELECT ...
#define BPF_F_XDP_HAS_FRAGS ...
#define BPF_F_TEST_XDP_LIVE_FRAMES ...
#define BPF_OBJ_NAME_LEN ...
#define BPF_MAP_TYPE_HASH ...
#define BPF_MAP_TYPE_ARRAY ...
#define BPF_MAP_TYPE_PERCPU_HASH ...
#define BPF_MAP_TYPE_PERCPU_ARRAY ...
#define BPF_MAP_TYPE_LRU_HASH ...
#define BPF_MAP_TYPE_LRU_PERCPU_HASH ...
#define BPF_MAP_TYPE_LPM_TRIE ...
#define BPF_MAP_TYPE_ARRAY_OF_MAPS ...
#define BPF_MAP_TYPE_HASH_OF_MAPS ...
#define BPF_MAP_TYPE_XSKMAP ...
#define BPF_MAP_TYPE_REUSEPORT_SOCKARRAY ...
#define BPF_F_MMAPABLE ...
#define XDP_FLAGS_SKB_MODE ...
#define XDP_FLAGS_DRV_MODE ...

/* All that return an int return 0 or a descriptor or count >= 0, else -errno. */
int sluice_prog_load(uint32_t type, const char *name, const char *license,
    const void *insns, uint32_t insn_count, uint32_t expected_attach_type,
    uint32_t prog_flags, char *log, uint32_t log_size, uint32_t log_level);
int sluice_prog_test_run(int prog_fd, struct sluice_test_run *run);
int sluice_prog_info(int fd, struct sluice_prog_info *info);
int sluice_map_info(int fd, struct sluice_map_info *info);
int sluice_link_info(int fd, struct sluice_link_info *info);
int sluice_map_create(uint32_t type, const char *name, uint32_t key_size,
    uint32_t value_size, uint32_t max_entries, uint32_t flags, int inner_fd);
int sluice_map_make(const struct sluice_map_info *info, int btf_fd);
int sluice_btf_load(const void *types, uint32_t size);
int sluice_link_create(int prog_fd, int ifindex, uint32_t attach_type, uint32_t flags);
int sluice_link_update(int link_fd, int new_prog_fd);
int sluice_map_lookup(int fd, const void *key, void *value);
int sluice_map_update(int fd, const void *key, const void *value, uint64_t flags);
int sluice_map_delete(int fd, const void *key);
int sluice_map_next_key(int fd, const void *key, void *next);
int sluice_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys,
    void *values, uint32_t *count);
int sluice_map_update_batch(int fd, const void *keys, const void *values,
    uint32_t *count, uint64_t flags);
int sluice_map_delete_batch(int fd, const void *keys, uint32_t *count);
int sluice_prog_next_id(uint32_t start, uint32_t *next);
int sluice_map_next_id(uint32_t start, uint32_t *next);
int sluice_link_next_id(uint32_t start, uint32_t *next);
int sluice_prog_by_id(uint32_t id);
int sluice_map_by_id(uint32_t id);
int sluice_link_by_id(uint32_t id);
int sluice_btf_by_id(uint32_t id);
/* raw BTF of a descriptor; returns its whole size, copies at most size bytes */
int sluice_btf_raw(int btf_fd, void *buffer, uint32_t size, uint32_t *kernel_btf);
/* no more writes from user space, by system call or mapping; programs still write */
int sluice_map_freeze(int fd);
int sluice_obj_pin(int fd, const char *path);
int sluice_obj_get(const char *path);
int sluice_probe_prog_type(uint32_t type);
int sluice_probe_map_type(uint32_t type);
int sluice_probe_helper(uint32_t prog_type, uint32_t helper_id);
int sluice_possible_cpus(void);
/* whether AF_XDP sockets can be bound with XDP_USE_SG: 0, -EINVAL: not, or another -errno */
int sluice_probe_xsk_sg(void);
/* sets the addresses' bits in SLUICE_FILTER_WORDS words (bpf/include/filter.h) */
void sluice_filter_add(struct sluice_filter *words, const struct sluice_address *addresses,
    uint32_t count);
const char *sluice_libbpf_version(void);
"""

SOURCE = r"""
#include <errno.h>
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include "abi.h"
#include "filter.h"

/* Newer than the headers this may be built with; values are kernel ABI (linux/bpf.h). */
#ifndef BPF_F_XDP_HAS_FRAGS
#define BPF_F_XDP_HAS_FRAGS (1U << 5)
#endif
#ifndef BPF_F_TEST_XDP_LIVE_FRAMES
#define BPF_F_TEST_XDP_LIVE_FRAMES (1U << 1)
#endif
#ifndef XDP_USE_SG
#define XDP_USE_SG (1 << 4) /* linux/if_xdp.h */
#endif

@INFO_STRUCTS@
/* Warnings of libbpf would go to stderr past our one-line errors. */
static int quiet(enum libbpf_print_level level, const char *format, va_list args)
{
    (void)level; (void)format; (void)args;
    return 0;
}

__attribute__((constructor)) static void be_quiet(void)
{
    libbpf_set_print(quiet);
}

static int result(int value)
{
    return value < 0 ? -errno : value;
}

static int sluice_prog_load(uint32_t type, const char *name, const char *license,
    const void *insns, uint32_t insn_count, uint32_t expected_attach_type,
    uint32_t prog_flags, char *log, uint32_t log_size, uint32_t log_level)
{
    LIBBPF_OPTS(bpf_prog_load_opts, opts,
        .expected_attach_type = expected_attach_type,
        .prog_flags = prog_flags,
        .log_level = log_level,
        .log_size = log_level ? log_size : 0,
        .log_buf = log_level ? log : NULL);

    return result(bpf_prog_load(type, name, license, insns, insn_count, &opts));
}

static int sluice_prog_test_run(int prog_fd, struct sluice_test_run *run)
{
    LIBBPF_OPTS(bpf_test_run_opts, opts,
        .data_in = run->data_in, .data_out = run->data_out,
        .data_size_in = run->data_size_in, .data_size_out = run->data_size_out,
        .ctx_in = run->ctx_in, .ctx_size_in = run->ctx_size_in,
        .repeat = run->repeat, .flags = run->flags, .batch_size = run->batch_size);
    int error = result(bpf_prog_test_run_opts(prog_fd, &opts));

    run->data_size_out = opts.data_size_out;
    run->retval = opts.retval;
    run->duration_ns = opts.duration;
    return error;
}

static int sluice_prog_info(int fd, struct sluice_prog_info *info)
{
    struct bpf_prog_info raw;
    uint32_t length = sizeof(raw);

    memset(&raw, 0, sizeof(raw));
    memset(info, 0, sizeof(*info));
    raw.nr_map_ids = 64;
    raw.map_ids = (uintptr_t)info->map_ids;
    if (bpf_obj_get_info_by_fd(fd, &raw, &length))
        return -errno;
    info->type = raw.type;
    info->id = raw.id;
    info->ifindex = raw.ifindex;
    info->nr_map_ids = raw.nr_map_ids;
    info->btf_id = raw.btf_id;
    info->xlated_len = raw.xlated_prog_len;
    info->jited_len = raw.jited_prog_len;
    info->load_time_ns = raw.load_time;
    info->run_time_ns = raw.run_time_ns;
    info->run_count = raw.run_cnt;
    memcpy(info->tag, raw.tag, 8);
    memcpy(info->name, raw.name, BPF_OBJ_NAME_LEN);
    return 0;
}

static int sluice_map_info(int fd, struct sluice_map_info *info)
{
    struct bpf_map_info raw;
    uint32_t length = sizeof(raw);

    memset(&raw, 0, sizeof(raw));
    memset(info, 0, sizeof(*info));
    if (bpf_obj_get_info_by_fd(fd, &raw, &length))
        return -errno;
    info->type = raw.type;
    info->id = raw.id;
    info->key_size = raw.key_size;
    info->value_size = raw.value_size;
    info->max_entries = raw.max_entries;
    info->map_flags = raw.map_flags;
    info->ifindex = raw.ifindex;
    info->btf_id = raw.btf_id;
    info->btf_key_type_id = raw.btf_key_type_id;
    info->btf_value_type_id = raw.btf_value_type_id;
    memcpy(info->name, raw.name, BPF_OBJ_NAME_LEN);
    return 0;
}

static int sluice_link_info(int fd, struct sluice_link_info *info)
{
    struct bpf_link_info raw;
    uint32_t length = sizeof(raw);

    memset(&raw, 0, sizeof(raw));
    memset(info, 0, sizeof(*info));
    if (bpf_obj_get_info_by_fd(fd, &raw, &length))
        return -errno;
    info->type = raw.type;
    info->id = raw.id;
    info->prog_id = raw.prog_id;
    if (raw.type == BPF_LINK_TYPE_XDP)
        info->ifindex = raw.xdp.ifindex;
    return 0;
}

static int sluice_map_create(uint32_t type, const char *name, uint32_t key_size,
    uint32_t value_size, uint32_t max_entries, uint32_t flags, int inner_fd)
{
    LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);

    if (inner_fd >= 0)
        opts.inner_map_fd = inner_fd;
    return result(bpf_map_create(type, name, key_size, value_size, max_entries, &opts));
}

/* As info describes it; btf_fd < 0: without types. */
static int sluice_map_make(const struct sluice_map_info *info, int btf_fd)
{
    LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = info->map_flags);

    if (btf_fd >= 0) {
        opts.btf_fd = btf_fd;
        opts.btf_key_type_id = info->btf_key_type_id;
        opts.btf_value_type_id = info->btf_value_type_id;
    }
    return result(bpf_map_create(info->type, info->name, info->key_size, info->value_size,
                                 info->max_entries, &opts));
}

static int sluice_btf_load(const void *types, uint32_t size)
{
    return result(bpf_btf_load(types, size, NULL));
}

static int sluice_link_create(int prog_fd, int ifindex, uint32_t attach_type, uint32_t flags)
{
    LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

    return result(bpf_link_create(prog_fd, ifindex, attach_type, &opts));
}

static int sluice_link_update(int link_fd, int new_prog_fd)
{
    return result(bpf_link_update(link_fd, new_prog_fd, NULL));
}

static int sluice_map_lookup(int fd, const void *key, void *value)
{
    return result(bpf_map_lookup_elem(fd, key, value));
}

static int sluice_map_update(int fd, const void *key, const void *value, uint64_t flags)
{
    return result(bpf_map_update_elem(fd, key, value, flags));
}

static int sluice_map_delete(int fd, const void *key)
{
    return result(bpf_map_delete_elem(fd, key));
}

static int sluice_map_next_key(int fd, const void *key, void *next)
{
    return result(bpf_map_get_next_key(fd, key, next));
}

static int sluice_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys,
    void *values, uint32_t *count)
{
    return result(bpf_map_lookup_batch(fd, in_batch, out_batch, keys, values, count, NULL));
}

static int sluice_map_update_batch(int fd, const void *keys, const void *values,
    uint32_t *count, uint64_t flags)
{
    LIBBPF_OPTS(bpf_map_batch_opts, opts, .elem_flags = flags);

    return result(bpf_map_update_batch(fd, keys, values, count, &opts));
}

static int sluice_map_delete_batch(int fd, const void *keys, uint32_t *count)
{
    return result(bpf_map_delete_batch(fd, keys, count, NULL));
}

static int sluice_prog_next_id(uint32_t start, uint32_t *next)
{
    return result(bpf_prog_get_next_id(start, next));
}

static int sluice_map_next_id(uint32_t start, uint32_t *next)
{
    return result(bpf_map_get_next_id(start, next));
}

static int sluice_link_next_id(uint32_t start, uint32_t *next)
{
    return result(bpf_link_get_next_id(start, next));
}

static int sluice_prog_by_id(uint32_t id)
{
    return result(bpf_prog_get_fd_by_id(id));
}

static int sluice_map_by_id(uint32_t id)
{
    return result(bpf_map_get_fd_by_id(id));
}

static int sluice_link_by_id(uint32_t id)
{
    return result(bpf_link_get_fd_by_id(id));
}

static int sluice_btf_by_id(uint32_t id)
{
    return result(bpf_btf_get_fd_by_id(id));
}

static int sluice_btf_raw(int btf_fd, void *buffer, uint32_t size, uint32_t *kernel_btf)
{
    struct bpf_btf_info raw;
    uint32_t length = sizeof(raw);

    memset(&raw, 0, sizeof(raw));
    raw.btf = (uintptr_t)buffer;
    raw.btf_size = size;
    if (bpf_obj_get_info_by_fd(btf_fd, &raw, &length))
        return -errno;
    if (kernel_btf)
        *kernel_btf = raw.kernel_btf;
    return raw.btf_size;
}

static int sluice_map_freeze(int fd)
{
    return result(bpf_map_freeze(fd));
}

static int sluice_obj_pin(int fd, const char *path)
{
    return result(bpf_obj_pin(fd, path));
}

static int sluice_obj_get(const char *path)
{
    return result(bpf_obj_get(path));
}

/* libbpf_probe_* return -errno themselves. */
static int sluice_probe_prog_type(uint32_t type)
{
    return libbpf_probe_bpf_prog_type(type, NULL);
}

static int sluice_probe_map_type(uint32_t type)
{
    return libbpf_probe_bpf_map_type(type, NULL);
}

static int sluice_probe_helper(uint32_t prog_type, uint32_t helper_id)
{
    return libbpf_probe_bpf_helper(prog_type, helper_id, NULL);
}

/*
 * The kernel looks at flags before anything else: unknown ones are EINVAL, then the
 * interface 0, which never is, ENODEV.  Nothing is bound either way.
 */
static int sluice_probe_xsk_sg(void)
{
    struct sockaddr_xdp address = { .sxdp_family = AF_XDP, .sxdp_flags = XDP_USE_SG };
    int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0), error;

    if (fd < 0)
        return -errno;
    error = bind(fd, (struct sockaddr *)&address, sizeof(address)) ? -errno : 0;
    close(fd);
    return error == -ENODEV ? 0 : error;
}

static int sluice_possible_cpus(void)
{
    return libbpf_num_possible_cpus();
}

static void sluice_filter_add(struct sluice_filter *words, const struct sluice_address *addresses,
    uint32_t count)
{
    uint32_t i, bit;

    for (i = 0; i < count; i++) {
        bit = filter_bit(&addresses[i]);
        words[bit >> FILTER_WORD_SHIFT].bits |= 1ULL << (bit & 63);
    }
}

static const char *sluice_libbpf_version(void)
{
    return libbpf_version_string();
}
"""


def abi_declarations(text: str) -> str:
    """The enums, structs and numbers of abi.h as cffi reads them."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = [
        line
        for line in text.splitlines()
        if not re.match(r"\s*#\s*(ifndef|endif|include)\b|\s*#define\s+\w+\s*$", line)
    ]
    return "\n".join(lines)


ffi = cffi.FFI()
ffi.cdef(FIXED_WIDTH_TYPES)
ffi.cdef(abi_declarations(ABI_HEADER.read_text(encoding="utf-8")))
ffi.cdef(INFO_STRUCTS)
ffi.cdef(LIBBPF_CALLS)
ffi.set_source(
    "xdp._libbpf",
    SOURCE.replace("@INFO_STRUCTS@", INFO_STRUCTS),
    libraries=["bpf"],
    include_dirs=[str(ABI_HEADER.parent)],
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffi.compile(tmpdir=str(ROOT), verbose=False)
