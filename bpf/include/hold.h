/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Configured peers that are held at a rate of their own (abi.h, struct sluice_hold),
 * set while traffic flows by whoever sees that a peer does not slow down.
 *
 * A packet of a peer that is not held costs one look at a byte.  The marks of all
 * 131,072 peers are 128 KiB; the holds themselves would be 4 MiB, and a cache miss
 * for each peer that comes by.
 *
 * User space (xdp/holds.py) clears what belongs to a peer's number before it gives the
 * number to another one.
 */
#ifndef SLUICE_HOLD_H
#define SLUICE_HOLD_H

#include "abi.h"
#include "limit.h"

BPF_F_TABLE("array", u32, struct sluice_hold, peer_holds, SLUICE_MAX_KNOWN, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct sluice_hold_marks, hold_marks, SLUICE_HOLD_LINES, BPF_F_MMAPABLE);

/* The part of struct sluice_hold that is one word. */
union hold_limit {
	struct {
		u32 interval_ns;
		u32 burst;
	};
	u64 word;
};

/* True: the packet is over the rate at which the peer of that number is held. */
static __always_inline int hold_over(u32 id, struct packet *packet, struct sluice_counters *row)
{
	u32 index = id - 1;
	u32 line = index / SLUICE_HOLD_MARKS;
	struct sluice_hold_marks *marks = hold_marks.lookup(&line);
	struct sluice_limit limit;
	struct sluice_hold *hold;
	union hold_limit set;

	if (!marks || !*(volatile u8 *)&marks->held[index & (SLUICE_HOLD_MARKS - 1)])
		return 0;
	hold = peer_holds.lookup(&index);
	if (!hold || *(volatile u64 *)&hold->until_ns <= exact_time(packet))
		return 0;
	set.word = *(volatile u64 *)&hold->interval_ns;
	limit.interval_ns = set.interval_ns;
	limit.burst_ns = (u64)set.burst * set.interval_ns;
	if (!limit_over(&hold->tat_ns, &limit, packet, row))
		return 0;
	__sync_fetch_and_add(&hold->drops, 1);
	return 1;
}

#endif /* SLUICE_HOLD_H */
