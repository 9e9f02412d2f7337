/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Unknown remote addresses, remembered while there is room.
 *
 * A set-associative table, as a CPU's cache is one: the hash of an address
 * chooses a set, and the address is in one of the set's 16 ways or nowhere.
 * "stranger_sets" holds for each way a tag (15 other bits of the hash) and the
 * number of its entry in "strangers", so that finding somebody touches two cache
 * lines: the set's, and the peer's own.  The kernel's LRU hash takes five, and a
 * lock of all CPUs for each new address.
 *
 * A way gets its entry when it is first needed, and keeps it.  So the entries in
 * use lie close together, whatever the hash says: 64 of them on a page.  Map memory
 * has no large pages, and a CPU knows the addresses of 2,000 pages; with an entry's
 * place given by set and way, 65,536 strangers lay on that many.
 *
 * Room.  Half as many addresses as there are entries find their place nearly
 * always (of 65,536, one in some thousand does not).  Of a set that is full, the
 * stranger is evicted that has been silent longest among four ways; the four
 * take turns.  So whoever keeps talking stays, while addresses that are invented
 * for one packet push out one another, each at the cost of one set.  (The coarse
 * clock tells that, packet.h: 10 million new ones a second take 10 ms for a whole
 * round of a set, more than a tick.)
 *
 * The hash has a salt (SLUICE_SALT, drawn by the loader), so nobody can aim at
 * the set of somebody else.
 *
 * Concurrency.  Finding takes no lock.  To add one, a CPU makes the set's turn
 * odd by compare-and-swap and looks once more; a program runs to its end, so no
 * lock stays behind.  The new entry is written while no tag leads to it.  An
 * entry that is evicted while another CPU counts in it takes that one count along
 * to the next owner; it had to be silent for the set's 12 last arrivals.
 *
 * User space (xdp/strangers.py) only reads, and clears an entry to forget it: the tag
 * that still leads there finds another address, and the entry is soon used again.
 */
#ifndef SLUICE_STRANGERS_H
#define SLUICE_STRANGERS_H

#include "abi.h"
#include "constant.h"

/* Odd 64-bit constants of MurmurHash3's finaliser. */
#define STRANGER_FIRST 0xff51afd7ed558ccdULL
#define STRANGER_SECOND 0xc4ceb9fe1a85ec53ULL
#define STRANGER_SET_SHIFT 51 /* the upper 13 bits: SLUICE_STRANGER_SETS is 2^13 */
#define STRANGER_TAG_SHIFT 36 /* the 15 bits below them */
#define STRANGER_TAG_MASK 0x7fff

#define NO_TAG 0

/* Ways that are compared for an eviction. */
#define STRANGER_CANDIDATES 4

/* Looks at a turn that another CPU has, some ns each, before a packet goes uncounted. */
#define STRANGER_ATTEMPTS 64

/* Mapped memory begins on a page, so that an entry and a set are one cache line each. */
BPF_F_TABLE("array", u32, struct sluice_stranger, strangers, SLUICE_STRANGER_ENTRIES,
	    BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct sluice_away, strangers_away, SLUICE_STRANGER_ENTRIES,
	    BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct sluice_stranger_set, stranger_sets, SLUICE_STRANGER_SETS,
	    BPF_F_MMAPABLE);
BPF_TABLE("array", u32, struct sluice_stranger_turn, stranger_turns, SLUICE_STRANGER_SETS);
BPF_TABLE("array", u32, struct sluice_stranger_room, stranger_room, 1);

static __always_inline u64 stranger_hash(const struct sluice_address *address)
{
	u64 upper = (u64)address->word[0] << 32 | address->word[1];
	u64 lower = (u64)address->word[2] << 32 | address->word[3];
	u64 hash = (upper ^ SLUICE_SALT) * STRANGER_FIRST;

	hash ^= hash >> 32;
	hash = (hash ^ lower) * STRANGER_SECOND;
	hash ^= hash >> 32;
	return hash * STRANGER_FIRST;
}

static __always_inline int same_address(const struct sluice_address *a,
					const struct sluice_address *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] && a->word[1] == b->word[1] &&
	       a->word[0] == b->word[0];
}

static __always_inline u32 way_tag(u32 way)
{
	return way >> SLUICE_STRANGER_INDEX_BITS;
}

static __always_inline u32 way_index(u32 way)
{
	return way & (SLUICE_STRANGER_ENTRIES - 1);
}

static __always_inline u32 way_with(u32 tag, u32 index)
{
	return tag << SLUICE_STRANGER_INDEX_BITS | index;
}

/* The first way with that tag, or SLUICE_STRANGER_WAYS. */
static __always_inline u32 stranger_way(const struct sluice_stranger_set *set, u32 tag)
{
	u32 way;

#pragma clang loop unroll(full)
	for (way = 0; way < SLUICE_STRANGER_WAYS; way++)
		if (way_tag(set->way[way]) == tag)
			break;
	return way;
}

/* True: it is this CPU's turn to change the set, and *turn its number, an odd one. */
static __always_inline int stranger_turn_take(struct sluice_stranger_turn *turns, u64 *turn)
{
	u64 seen;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < STRANGER_ATTEMPTS; i++) {
		seen = *(volatile u64 *)&turns->word;
		if (seen & 1)
			continue;
		*turn = seen | 1;
		if (__sync_val_compare_and_swap(&turns->word, seen, seen | 1) == seen)
			return 1;
	}
	return 0;
}

/*
 * BPF's atomics that return a value are full barriers.  Here between what was
 * written and the tag or flag that leads to it.
 */
static __always_inline void stranger_turn_publish(struct sluice_stranger_turn *turns)
{
	__sync_fetch_and_add(&turns->word, 2);
}

/* And here: whose turn is next sees all that was written in this one. */
static __always_inline void stranger_turn_end(struct sluice_stranger_turn *turns)
{
	__sync_fetch_and_add(&turns->word, -1);
}

/* The way to put a new stranger in. */
static __always_inline u32 stranger_victim(const struct sluice_stranger_set *set, u64 turn)
{
	u32 first = (turn >> 1) * STRANGER_CANDIDATES & (SLUICE_STRANGER_WAYS - 1);
	u32 way = stranger_way(set, NO_TAG);
	u64 oldest = ~0ULL;
	u32 i;

	if (way < SLUICE_STRANGER_WAYS)
		return way;
	way = first;
#pragma clang loop unroll(full)
	for (i = first; i < first + STRANGER_CANDIDATES; i++) {
		u32 index = way_index(set->way[i]);
		struct sluice_stranger *stranger = strangers.lookup(&index);

		if (stranger && stranger->peer.last_seen_ns < oldest) {
			oldest = stranger->peer.last_seen_ns;
			way = i;
		}
	}
	return way;
}

/*
 * The entry of a way, taken for it if it has none yet.  There are as many as ways, so
 * the lookup of this index never fails.
 */
static __always_inline u32 stranger_entry(u32 way)
{
	struct sluice_stranger_room *room;
	u32 zero = 0;

	if (way)
		return way_index(way);
	room = stranger_room.lookup(&zero);
	return room ? __sync_fetch_and_add(&room->used, 1) : SLUICE_STRANGER_ENTRIES;
}

/* Writes a new entry, to which no tag leads yet. */
static __always_inline void stranger_write(struct sluice_stranger *stranger,
					   const struct sluice_address *address, u32 cpu, u64 now)
{
	stranger->address = *address;
	stranger->peer.tat_ns = 0;
	stranger->peer.generation = 0;
	stranger->peer.home = cpu + 1;
	stranger->peer.class_id = 0;
	stranger->peer.shared = 0;
	stranger->peer.packets = 0;
	stranger->peer.bytes = 0;
	stranger->peer.drops = 0;
	stranger->peer.last_seen_ns = now;
}

static __always_inline struct sluice_peer *stranger_add(const struct sluice_address *address,
							struct sluice_stranger_set *set,
							u32 set_index, u32 tag, u32 cpu, u64 now,
							struct sluice_counters *row, u32 *index)
{
	struct sluice_stranger_turn *turns = stranger_turns.lookup(&set_index);
	struct sluice_stranger *stranger = NULL;
	u64 turn;
	u32 way;

	if (!turns || !stranger_turn_take(turns, &turn)) {
		row->strangers_refused++;
		return NULL;
	}
	/* Another CPU may have added it meanwhile; or two addresses have one tag. */
#pragma clang loop unroll(full)
	for (way = 0; way < SLUICE_STRANGER_WAYS; way++) {
		if (way_tag(set->way[way]) != tag)
			continue;
		*index = way_index(set->way[way]);
		stranger = strangers.lookup(index);
		if (stranger && same_address(&stranger->address, address))
			goto out;
	}
	way = stranger_victim(set, turn) & (SLUICE_STRANGER_WAYS - 1);
	*index = stranger_entry(set->way[way]);
	stranger = strangers.lookup(index);
	if (!stranger)
		goto out;
	*(volatile u32 *)&set->way[way] = way_with(NO_TAG, *index);
	stranger_write(stranger, address, cpu, now);
	stranger_turn_publish(turns);
	*(volatile u32 *)&set->way[way] = way_with(tag, *index);
	row->strangers_created++;
out:
	stranger_turn_end(turns);
	return stranger ? &stranger->peer : NULL;
}

/* The stranger, its entry and its set, added if it is not there; NULL: see strangers_refused. */
static __always_inline struct sluice_peer *stranger_find(const struct sluice_address *address,
							 u32 cpu, u64 now,
							 struct sluice_counters *row, u32 *index,
							 u32 *set_number)
{
	u64 hash = stranger_hash(address);
	u32 set_index = hash >> STRANGER_SET_SHIFT;
	u32 tag = hash >> STRANGER_TAG_SHIFT & STRANGER_TAG_MASK;
	struct sluice_stranger_set *set = stranger_sets.lookup(&set_index);
	struct sluice_stranger *stranger;
	u32 way;

	*set_number = set_index;
	if (!set)
		return NULL;
	tag += tag == NO_TAG;
	way = stranger_way(set, tag);
	if (way < SLUICE_STRANGER_WAYS) {
		*index = way_index(set->way[way]);
		stranger = strangers.lookup(index);
		if (stranger && same_address(&stranger->address, address))
			return &stranger->peer;
	}
	return stranger_add(address, set, set_index, tag, cpu, now, row, index);
}

/*
 * Where CPUs that are not the stranger's home count.  Cleared when it is needed for
 * the first time: most strangers never do, and it would cost each a cache miss.
 */
static __always_inline struct sluice_away *stranger_away(struct sluice_peer *peer, u32 index,
							 u32 set_index, struct sluice_counters *row)
{
	struct sluice_away *away = strangers_away.lookup(&index);
	struct sluice_stranger_turn *turns;
	u64 turn;

	if (!away || *(volatile u8 *)&peer->shared)
		return away;
	turns = stranger_turns.lookup(&set_index);
	if (!turns || !stranger_turn_take(turns, &turn)) {
		row->strangers_refused++;
		return NULL;
	}
	if (!*(volatile u8 *)&peer->shared) {
		away->packets = 0;
		away->bytes = 0;
		away->drops = 0;
		stranger_turn_publish(turns);
		*(volatile u8 *)&peer->shared = 1;
	}
	stranger_turn_end(turns);
	return away;
}

/* The same again, where stranger_away() has found it; NULL where it has not. */
static __always_inline struct sluice_away *stranger_counted_away(const struct sluice_peer *peer,
								 u32 index)
{
	return *(volatile u8 *)&peer->shared ? strangers_away.lookup(&index) : NULL;
}

#endif /* SLUICE_STRANGERS_H */
