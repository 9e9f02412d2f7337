/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Rate limits: the generic cell rate algorithm (ITU-T I.371), virtual
 * scheduling form.  One timestamp is the whole state, shared by all CPUs and
 * moved by compare-and-swap, so a limit holds however many queues the packets
 * arrive on.
 */
#ifndef SLUICE_LIMIT_H
#define SLUICE_LIMIT_H

#include "abi.h"
#include "constant.h"
#include "packet.h"

/*
 * Lost races before a packet is taken to be over its limit: a limit errs on
 * the strict side, and "limit_contended" shows it.  Losing 8 times in a row
 * takes that many other CPUs moving the same timestamp within some 100 ns.
 */
#define LIMIT_ATTEMPTS 8

/* Odd 64-bit constant of MurmurHash3's finaliser: spreads every input bit over the upper half. */
#define HASH_MULTIPLIER 0xff51afd7ed558ccdULL

BPF_TABLE("array", u32, struct sluice_bucket, lane_limits, SLUICE_MAX_LANES);
BPF_TABLE("array", u32, struct sluice_bucket, prefix_limits, SLUICE_PREFIX_BUCKETS);

static __always_inline int limit_over(u64 *tat, const struct sluice_limit *limit,
				      struct packet *packet, struct sluice_counters *row)
{
	u64 interval = limit->interval_ns;
	u64 seen, base, now;
	int i;

	if (!interval)
		return 0;
	now = exact_time(packet);
#pragma clang loop unroll(disable)
	for (i = 0; i < LIMIT_ATTEMPTS; i++) {
		seen = *(volatile u64 *)tat;
		base = seen > now ? seen : now;
		if (base - now > limit->burst_ns)
			return 1;
		if (__sync_val_compare_and_swap(tat, seen, base + interval) == seen)
			return 0;
	}
	row->limit_contended++;
	return 1;
}

/*
 * Strangers share the limit of their prefix.  Buckets are chosen by a hash
 * whose salt (SLUICE_SALT, drawn by the loader) nobody outside knows: two
 * prefixes may share a bucket, but nobody can aim at another's, and inventing
 * addresses makes no new bucket.
 */
static __always_inline u64 *limit_prefix_bucket(const struct packet *packet,
						const struct sluice_policy *policy)
{
	const u32 *word = packet->source.word;
	struct sluice_bucket *bucket;
	u64 bits, hash;
	u32 width, index;

	if (packet->version == 4) {
		bits = (u64)bpf_ntohl(word[3]) << 32;
		width = policy->stranger_bits_v4;
	} else {
		bits = (u64)bpf_ntohl(word[0]) << 32 | bpf_ntohl(word[1]);
		width = policy->stranger_bits_v6;
	}
	/* width is 1 to 64 (the policy sees to it); a shift by 64 is undefined */
	bits &= ~0ULL << ((64 - width) & 63);
	hash = (bits ^ SLUICE_SALT ^ packet->version) * HASH_MULTIPLIER;
	hash ^= hash >> 32;
	hash *= HASH_MULTIPLIER;
	index = (hash >> 32) & (SLUICE_PREFIX_BUCKETS - 1);
	bucket = prefix_limits.lookup(&index);
	return bucket ? &bucket->tat_ns : NULL;
}

static __always_inline u64 *limit_lane_bucket(u32 lane)
{
	struct sluice_bucket *bucket = lane_limits.lookup(&lane);

	return bucket ? &bucket->tat_ns : NULL;
}

#endif /* SLUICE_LIMIT_H */
