/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Who sent it.  Configured peers live in "known", where no stranger can evict
 * them; everybody else lives in "strangers", an LRU.  Both hold the same value:
 * class, limit and counters, so that one look-up finds all there is to know.
 *
 * A filter of one bit per configured peer says for most strangers that they are
 * none, which saves a look-up and the cache miss that comes with it.
 *
 * The prefix tries are asked for a new peer, and once per peer after a policy
 * change: the class carries the generation it was looked up in.
 */
#ifndef SLUICE_PEER_H
#define SLUICE_PEER_H

#include "abi.h"
#include "filter.h"

#define STAMP_SHIFT 8 /* class_stamp: generation << 8 | class */
#define STAMP_CLASS 0xff
#define ADDRESS_BITS 128

BPF_TABLE("hash", struct sluice_address, struct sluice_peer, known, SLUICE_MAX_KNOWN);
BPF_TABLE("lru_hash", struct sluice_address, struct sluice_peer, strangers, SLUICE_MAX_STRANGERS);
BPF_F_TABLE("lpm_trie", struct sluice_prefix, struct sluice_prefix_class, prefixes_0,
	    SLUICE_MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct sluice_prefix, struct sluice_prefix_class, prefixes_1,
	    SLUICE_MAX_PREFIXES, BPF_F_NO_PREALLOC);

BPF_TABLE("array", u32, struct sluice_filter, known_filter, SLUICE_FILTER_SIZE);

static __always_inline int peer_may_be_known(const struct sluice_address *address, u32 bank)
{
	u32 bit = filter_bit(address);
	u32 index = bank * SLUICE_FILTER_WORDS + (bit >> FILTER_WORD_SHIFT);
	struct sluice_filter *word = known_filter.lookup(&index);

	return word && word->bits >> (bit & 63) & 1;
}

/* NULL: a stranger for whom the LRU had no room (the same address is being added elsewhere). */
static __always_inline struct sluice_peer *peer_find(struct sluice_address *address, u32 bank,
						     u32 cpu, u64 now, struct sluice_counters *row)
{
	struct sluice_peer fresh = {};
	struct sluice_peer *peer;

	if (peer_may_be_known(address, bank)) {
		peer = known.lookup(address);
		if (peer)
			return peer;
	}
	peer = strangers.lookup(address);
	if (peer)
		return peer;
	fresh.first_seen_ns = now;
	fresh.home = cpu + 1;
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

/*
 * A peer's packets mostly come to one CPU: the first one makes it its home and
 * adds without a lock.  That saves two locked additions, each of which waits
 * until all that this CPU has written before (the previous packet's copy into
 * its frame) is out of its store buffer: 10 ns and more.
 */
static __always_inline int peer_is_home(struct sluice_peer *peer, u32 cpu)
{
	/* id and home as one word, for bcc's compiler compares and swaps 64 bits only */
	union {
		struct {
			u32 id;
			u32 home;
		};
		u64 word;
	} seen, wanted;

	if (!peer)
		return 0;
	seen.word = *(volatile u64 *)&peer->id;
	if (!seen.home) {
		wanted = seen;
		wanted.home = cpu + 1;
		seen.word = __sync_val_compare_and_swap((u64 *)&peer->id, seen.word, wanted.word);
		if (!seen.home)
			return 1;
	}
	return seen.home == cpu + 1;
}

static __always_inline void peer_count(struct sluice_peer *peer, int at_home, u64 now, u32 bytes)
{
	if (!peer)
		return;
	if (at_home) {
		peer->packets++;
		peer->bytes += bytes;
	} else {
		__sync_fetch_and_add(&peer->packets_elsewhere, 1);
		__sync_fetch_and_add(&peer->bytes_elsewhere, bytes);
	}
	peer->last_seen_ns = now;
}

static __always_inline void peer_count_drop(struct sluice_peer *peer, int at_home)
{
	if (!peer)
		return;
	if (at_home)
		peer->drops++;
	else
		__sync_fetch_and_add(&peer->drops_elsewhere, 1);
}

#endif /* SLUICE_PEER_H */
