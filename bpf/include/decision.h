/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The limits of a packet in their order, and where it goes when it is over one.
 * Shared by all programs that decide by the policy.
 */
#ifndef SLUICE_DECISION_H
#define SLUICE_DECISION_H

#include "abi.h"
#include "count.h"
#include "hold.h"
#include "limit.h"
#include "packet.h"
#include "peer.h"

/* What is known about a packet once its service is; passed between the steps. */
struct decision {
	u64 now; /* coarse_time() */
	struct sluice_policy *policy;
	struct sluice_rule *rule;
	struct found from;
	struct sluice_counters *row;
	u32 lane;
	u8 service;
	u8 kind;
	u8 class_id;
	u8 demoted;
};

/* over_limits() found nothing to object to */
#define WITHIN_LIMITS (-1)

/*
 * A peer's hold, the limit of its class, a stranger's prefix, the lane; the first that is
 * over decides.  may_demote: to a lower lane where the rule or the lane says so, which
 * a hold does not.  Returns the reason of the drop or WITHIN_LIMITS; may change
 * decision->lane.
 */
static __always_inline int over_limits(struct packet *packet, struct decision *decision,
				       int may_demote)
{
	struct sluice_rule *rule = decision->rule;
	struct sluice_lane *lane;
	int reason = WITHIN_LIMITS;
	u32 over = rule->over;
	u32 demote_lane = rule->demote_lane;
	u64 *tat;

	if (decision->from.id && hold_over(decision->from.id, packet, decision->row))
		return SLUICE_DROP_HELD;
	if (decision->from.peer &&
	    limit_over(&decision->from.peer->tat_ns, &rule->peer, packet, decision->row)) {
		reason = SLUICE_DROP_PEER_LIMIT;
	} else if (rule->prefix.interval_ns && !decision->from.id) {
		tat = limit_prefix_bucket(packet, decision->policy);
		if (tat && limit_over(tat, &rule->prefix, packet, decision->row))
			reason = SLUICE_DROP_PREFIX_LIMIT;
	}
	lane = &decision->policy->lane[decision->lane & (SLUICE_MAX_LANES - 1)];
	if (reason == WITHIN_LIMITS) {
		if (!lane->limit.interval_ns)
			return WITHIN_LIMITS;
		tat = limit_lane_bucket(decision->lane);
		if (!tat || !limit_over(tat, &lane->limit, packet, decision->row))
			return WITHIN_LIMITS;
		reason = SLUICE_DROP_LANE_LIMIT;
		over = lane->over;
		demote_lane = lane->demote_lane;
	}
	if (!may_demote || over != SLUICE_OVER_DEMOTE)
		return reason;

	decision->row->demoted_from[decision->lane & (SLUICE_MAX_LANES - 1)]++;
	decision->lane = demote_lane & (SLUICE_MAX_LANES - 1);
	decision->row->demoted_to[decision->lane]++;
	decision->demoted = 1;
	lane = &decision->policy->lane[decision->lane];
	tat = limit_lane_bucket(decision->lane);
	if (tat && limit_over(tat, &lane->limit, packet, decision->row))
		return SLUICE_DROP_LANE_LIMIT;
	return WITHIN_LIMITS;
}

#endif /* SLUICE_DECISION_H */
