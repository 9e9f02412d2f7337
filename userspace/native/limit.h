/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rate limits of the classifier, as bpf/include/limit.h and bpf/include/hold.h have them
 * for the kernel.  A classifier belongs to one thread, so plain stores do.
 */
#ifndef SL_LIMIT_H
#define SL_LIMIT_H

#include <stdbool.h>
#include <stdint.h>

#include "abi.h"

/* GCRA (ITU-T I.371, virtual scheduling): true and the timestamp moved, or false and untouched. */
static inline bool sl_conforms(__u64 *tat, const struct sluice_limit *limit, uint64_t now)
{
	uint64_t at = *tat > now ? *tat : now;

	if (!limit->interval_ns)
		return true;
	if (at - now > limit->burst_ns)
		return false;
	*tat = at + limit->interval_ns;
	return true;
}

/* True: over the rate at which the peer is held. */
static inline bool sl_held_back(struct sluice_hold *hold, uint64_t now)
{
	struct sluice_limit limit = { hold->interval_ns,
				      (uint64_t)hold->burst * hold->interval_ns };

	if (hold->until_ns <= now || sl_conforms(&hold->tat_ns, &limit, now))
		return false;
	hold->drops++;
	return true;
}

/*
 * A new hold in place of *hold.  One that is in force keeps its drops and what it has let
 * through: its timestamp, but no further ahead than the new limit can put one.
 */
static inline void sl_hold_set(struct sluice_hold *hold, const struct sluice_hold *set,
			       uint64_t now)
{
	uint64_t furthest = now + (set->burst + 1ULL) * set->interval_ns;
	struct sluice_hold old = *hold;

	*hold = *set;
	hold->tat_ns = old.tat_ns < furthest ? old.tat_ns : furthest;
	hold->drops = old.drops;
	if (old.until_ns <= now)
		hold->tat_ns = hold->drops = 0;
}

#endif /* SL_LIMIT_H */
