/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Who sent it.  Configured peers live in "known", where no stranger can evict
 * them; everybody else lives in "strangers", an LRU.  Both hold the same value:
 * class, limit and counters, so that one look-up finds all there is to know.
 *
 * The prefix tries are asked for a new peer, and once per peer after a policy
 * change: the class carries the generation it was looked up in.
 */
#ifndef SLUICE_PEER_H
#define SLUICE_PEER_H

#include "abi.h"

#define STAMP_SHIFT 8 /* class_stamp: generation << 8 | class */
#define STAMP_CLASS 0xff
#define ADDRESS_BITS 128

BPF_TABLE("hash", struct sluice_address, struct sluice_peer, known, SLUICE_MAX_KNOWN);
BPF_TABLE("lru_hash", struct sluice_address, struct sluice_peer, strangers, SLUICE_MAX_STRANGERS);
BPF_F_TABLE("lpm_trie", struct sluice_prefix, struct sluice_prefix_class, prefixes_0,
	    SLUICE_MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct sluice_prefix, struct sluice_prefix_class, prefixes_1,
	    SLUICE_MAX_PREFIXES, BPF_F_NO_PREALLOC);

/* NULL: a stranger for whom the LRU had no room (the same address is being added elsewhere). */
static __always_inline struct sluice_peer *peer_find(struct sluice_address *address, u64 now,
						     struct sluice_counters *row)
{
	struct sluice_peer fresh = {};
	struct sluice_peer *peer;

	peer = known.lookup(address);
	if (peer)
		return peer;
	peer = strangers.lookup(address);
	if (peer)
		return peer;
	fresh.first_seen_ns = now;
	if (!strangers.insert(address, &fresh))
		row->strangers_created++;
	peer = strangers.lookup(address);
	if (!peer)
		row->strangers_refused++;
	return peer;
}

static __always_inline u32 prefix_class(struct sluice_address *address, u32 bank)
{
	struct sluice_prefix_class *found;
	struct sluice_prefix prefix;

	prefix.prefixlen = ADDRESS_BITS;
	prefix.address = *address;
	found = bank ? prefixes_1.lookup(&prefix) : prefixes_0.lookup(&prefix);
	return found ? found->class_id : 0;
}

static __always_inline u32 peer_class(struct sluice_peer *peer, struct sluice_address *address,
				      u64 generation, u32 bank)
{
	u64 stamp;

	if (!peer)
		return prefix_class(address, bank);
	stamp = *(volatile u64 *)&peer->class_stamp;
	if (stamp >> STAMP_SHIFT != generation) {
		stamp = generation << STAMP_SHIFT | prefix_class(address, bank);
		/* One word: another CPU sees this class with this generation or neither. */
		*(volatile u64 *)&peer->class_stamp = stamp;
	}
	return stamp & STAMP_CLASS;
}

/* Several CPUs may serve one peer: atomic, and a value of its own for each peer. */
static __always_inline void peer_count(struct sluice_peer *peer, u64 now, u32 bytes)
{
	if (!peer)
		return;
	__sync_fetch_and_add(&peer->packets, 1);
	__sync_fetch_and_add(&peer->bytes, bytes);
	peer->last_seen_ns = now;
}

static __always_inline void peer_count_drop(struct sluice_peer *peer)
{
	if (peer)
		__sync_fetch_and_add(&peer->drops, 1);
}

#endif /* SLUICE_PEER_H */
