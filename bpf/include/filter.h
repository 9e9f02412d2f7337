/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Which bit of "known_filter" stands for an address.  Shared by the program,
 * which tests the bit, and by xdp/_libbpf, which sets it.
 *
 * No salt: whoever aims at the bits of configured peers makes the program look
 * them up, which is what it would do without a filter.
 */
#ifndef SLUICE_FILTER_H
#define SLUICE_FILTER_H

#include "abi.h"

#define FILTER_WORD_SHIFT 6   /* 64 bits a word */
#define FILTER_INDEX_SHIFT 44 /* the upper 20 bits: SLUICE_FILTER_WORDS * 64 = 2^20 */

/* MurmurHash3's finaliser and its second constant: odd, and every bit counts. */
#define FILTER_FIRST 0xff51afd7ed558ccdULL
#define FILTER_SECOND 0xc4ceb9fe1a85ec53ULL

static inline __attribute__((always_inline)) __u32 filter_bit(const struct sluice_address *address)
{
	__u64 upper = (__u64)address->word[0] << 32 | address->word[1];
	__u64 lower = (__u64)address->word[2] << 32 | address->word[3];
	__u64 hash = (upper ^ lower * FILTER_FIRST) * FILTER_SECOND;

	hash ^= hash >> 32;
	hash *= FILTER_FIRST;
	return hash >> FILTER_INDEX_SHIFT;
}

#endif /* SLUICE_FILTER_H */
