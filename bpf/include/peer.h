/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Who sent it.  Configured peers live in "known", where no stranger can evict
 * them; everybody else lives in "strangers" (strangers.h).  Both hold a struct
 * sluice_peer: class, limit and counters, so that one look-up finds all that a
 * packet needs.
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
#include "strangers.h"

#define ADDRESS_BITS 128

BPF_TABLE("hash", struct sluice_address, struct sluice_known, known, SLUICE_MAX_KNOWN);
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

struct found {
	struct sluice_peer *peer; /* NULL: a stranger, not remembered */
	/* Of 64 bits: next to index the verifier would forget that a stranger's is 0. */
	u64 id; /* configured peer's number, 0: stranger */
	u32 index;
	u32 set; /* of a stranger */
};

/* Of a configured peer. */
static __always_inline struct sluice_away *known_away(const struct found *found)
{
	return &((struct sluice_known *)found->peer)->away;
}

static __always_inline void peer_find(struct found *found, struct sluice_address *address, u32 bank,
				      u32 cpu, u64 now, struct sluice_counters *row)
{
	struct sluice_known *configured;

	if (peer_may_be_known(address, bank)) {
		configured = known.lookup(address);
		if (configured) {
			found->peer = &configured->peer;
			found->id = configured->id;
			return;
		}
	}
	found->peer = stranger_find(address, cpu, now, row, &found->index, &found->set);
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

/* The part of struct sluice_peer that is one word. */
union stamp {
	struct {
		u32 generation;
		u16 home;
		u8 class_id;
		u8 shared;
	};
	u64 word;
};

/*
 * The peer's class in this generation; finds out whether this CPU is its home.
 *
 * A peer's packets mostly come to one CPU: the first one makes it its home and
 * adds without a lock.  That saves two locked additions, each of which waits
 * until all that this CPU has written before (the previous packet's copy into
 * its frame) is out of its store buffer: 10 ns and more.
 */
static __always_inline u32 peer_class(struct found *found, struct packet *packet, u64 generation,
				      u32 bank, u32 cpu)
{
	union stamp seen, wanted;
	u64 *word;

	if (!found->peer)
		return prefix_class(&packet->source, bank);
	word = (u64 *)&found->peer->generation;
	seen.word = *(volatile u64 *)word;
	if (seen.generation == (u32)generation && seen.home) {
		packet->at_home = seen.home == cpu + 1;
		return seen.class_id;
	}
	wanted.generation = generation;
	wanted.home = seen.home ? seen.home : cpu + 1;
	wanted.class_id = prefix_class(&packet->source, bank);
	wanted.shared = seen.shared;
	/* Who loses the race has its class all the same; the home is the winner's choice. */
	seen.word = __sync_val_compare_and_swap(word, seen.word, wanted.word);
	packet->at_home = (seen.home ? seen.home : wanted.home) == cpu + 1;
	return wanted.class_id;
}

static __always_inline void peer_count(const struct found *found, const struct packet *packet,
				       u64 now, u32 bytes, struct sluice_counters *row)
{
	struct sluice_peer *peer = found->peer;
	struct sluice_away *away;

	if (!peer)
		return;
	peer->last_seen_ns = now;
	if (*(volatile u8 *)&packet->at_home) {
		peer->packets++;
		peer->bytes += bytes;
		return;
	}
	away = found->id ? known_away(found) : stranger_away(peer, found->index, found->set, row);
	if (away) {
		__sync_fetch_and_add(&away->packets, 1);
		__sync_fetch_and_add(&away->bytes, bytes);
	}
}

/* After peer_count(). */
static __always_inline void peer_count_drop(const struct found *found, const struct packet *packet)
{
	struct sluice_away *away;

	if (!found->peer)
		return;
	if (*(volatile u8 *)&packet->at_home) {
		found->peer->drops++;
		return;
	}
	away = found->id ? known_away(found) : stranger_counted_away(found->peer, found->index);
	if (away)
		__sync_fetch_and_add(&away->drops, 1);
}

#endif /* SLUICE_PEER_H */
