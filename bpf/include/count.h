/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Counters: one row of "counters" per CPU, written by that CPU alone, so plain
 * additions suffice.  A packet is counted as seen when the program starts and
 * under exactly one verdict when it ends.
 */
#ifndef SLUICE_COUNT_H
#define SLUICE_COUNT_H

#include "abi.h"

/* SLUICE_CPUS comes from the loader: the number of possible CPUs. */
BPF_F_TABLE("array", u32, struct sluice_counters, counters, SLUICE_CPUS, BPF_F_MMAPABLE);

static __always_inline void count_add(struct sluice_count *count, u32 bytes)
{
	count->packets++;
	count->bytes += bytes;
}

/* lane is SLUICE_NO_LANE where none was chosen. */
static __always_inline void count_verdict(struct sluice_counters *row, u32 lane, u32 reason,
					  u32 bytes)
{
	u32 index = lane * SLUICE_REASONS + reason;

	/* always true; the verifier cannot know */
	if (index < SLUICE_VERDICTS_SIZE)
		count_add(&row->verdict[index], bytes);
}

#endif /* SLUICE_COUNT_H */
