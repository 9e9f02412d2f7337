// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Decides about every packet before the network stack sees it:
 *
 *   parse -> service -> peer -> policy -> limit -> count -> lane
 *
 * and ends in one verdict: steered into a lane's AF_XDP socket, passed to the
 * kernel, dropped, or answered.  abi.h lists the verdicts.  Only UDP ports that
 * the policy names are ever steered or dropped (fragments, if it says so, are
 * the one exception): the operator's SSH, ARP, ND and routing are never touched.
 *
 * The compiler is given:
 *   SLUICE_CPUS    number of possible CPUs
 *   SLUICE_FRAGS   (jumbo frames) loaded with BPF_F_XDP_HAS_FRAGS: packets may lie
 *                  in several buffers
 *   SLUICE_BENCH_RANDOM_PEERS  (bench only) draw each packet's source among 2^n
 * and the loader draws what constant.h says.
 */
#include <uapi/linux/bpf.h>
#include "abi.h"
#include "constant.h"
#include "count.h"
#include "parse.h"
#include "peer.h"
#include "policy.h"
#include "decision.h"
#include "reply.h"

BPF_XSKMAP(xsks, SLUICE_XSKS_SIZE);

/*
 * Directly below the packet, where the reader of the frame finds it.  Metadata
 * that the driver has put there is written over: two pieces cannot lie there.
 */
static __always_inline int write_metadata(struct xdp_md *ctx, struct packet *packet,
					  const struct decision *decision,
					  const struct sluice_lane *lane)
{
	int there = (void *)(long)ctx->data - (void *)(long)ctx->data_meta;
	struct sluice_meta *meta;

	if (bpf_xdp_adjust_meta(ctx, there - (int)sizeof(*meta)))
		return 0;
	meta = (void *)(long)ctx->data_meta;
	if ((void *)(meta + 1) > (void *)(long)ctx->data)
		return 0;
	meta->cookie = SLUICE_COOKIE;
	meta->peer = decision->from.id;
	meta->time_ns = lane->timestamps ? exact_time(packet) : 0;
	meta->payload_offset = packet->payload_offset;
	meta->payload_length = packet->payload_length;
	meta->lane = decision->lane;
	meta->service = decision->service;
	meta->kind = decision->kind;
	meta->class_id = decision->class_id;
	return 1;
}

/* Hands the packet to its lane; returns the reason, and the action through *action. */
static __always_inline int enter_lane(struct xdp_md *ctx, struct packet *packet,
				      struct decision *decision, int *action)
{
	const struct sluice_lane *lane =
		&decision->policy->lane[decision->lane & (SLUICE_MAX_LANES - 1)];
	u32 queue = ctx->rx_queue_index;

	if (lane->end == SLUICE_END_KERNEL)
		return decision->demoted ? SLUICE_PASS_DEMOTED : SLUICE_PASS_LANE;
	if (queue >= SLUICE_MAX_QUEUES)
		return SLUICE_PASS_NO_SOCKET;
	/* The flags are the action for an empty slot (Linux 5.3 and later). */
	if (xsks.redirect_map(queue * SLUICE_MAX_LANES + decision->lane, XDP_PASS) != XDP_REDIRECT)
		return SLUICE_PASS_NO_SOCKET;
	*action = XDP_REDIRECT;
	/* Not before: in the kernel nobody reads it, and it would keep GRO from merging. */
	if (!write_metadata(ctx, packet, decision, lane))
		decision->row->metadata_refused++;
	return decision->demoted ? SLUICE_STEER_DEMOTED : SLUICE_STEER;
}

/* A packet of one of our services: returns the reason, sets lane and *action. */
static __always_inline int decide(struct xdp_md *ctx, const struct frame *frame,
				  struct packet *packet, struct decision *decision, int *action)
{
	int reason, probe;

	switch (decision->rule->action) {
	case SLUICE_ACTION_LANE:
		probe = 0;
		break;
	case SLUICE_ACTION_REPLY:
		probe = is_probe(frame, packet);
		break;
	case SLUICE_ACTION_DENY:
		*action = XDP_DROP;
		return SLUICE_DROP_DENIED;
	case SLUICE_ACTION_DROP:
		*action = XDP_DROP;
		return SLUICE_DROP_POLICY;
	default:
		return SLUICE_PASS_POLICY;
	}
	decision->lane = decision->rule->lane & (SLUICE_MAX_LANES - 1);
	count_add(&decision->row->lane_seen[decision->lane], frame->length);
	reason = over_limits(packet, decision, !probe);
	if (reason != WITHIN_LIMITS) {
		*action = XDP_DROP;
		return reason;
	}
	if (probe && make_reply(frame, packet)) {
		*action = XDP_TX;
		return SLUICE_REPLY;
	}
	return enter_lane(ctx, packet, decision, action);
}

int sluice_steer(struct xdp_md *ctx)
{
	struct frame frame = {
		.data = (void *)(long)ctx->data,
		.end = (void *)(long)ctx->data_end,
	};
	struct decision decision = {
		.lane = SLUICE_NO_LANE,
	};
	struct sluice_generation *newest;
	struct sluice_port *port;
	struct packet *packet;
#ifdef SLUICE_FRAGS
	u32 length = bpf_xdp_get_buff_len(ctx);
#else
	u32 length = frame.end - frame.data;
#endif
	u32 cpu = bpf_get_smp_processor_id();
	u32 zero = 0, bank;
	u64 number;
	int action = XDP_PASS, reason;

	frame.length = length;
#ifdef SLUICE_FRAGS
	frame.context = ctx;
#endif
	decision.row = counters.lookup(&cpu);
	packet = scratch.lookup(&cpu);
	if (!decision.row || !packet)
		return XDP_PASS;
	count_add(&decision.row->seen, length);

	/* Read once: everything below belongs to this generation. */
	newest = generation.lookup(&zero);
	if (!newest)
		return XDP_PASS;
	number = *(volatile u64 *)&newest->number;
	bank = number & (SLUICE_BANKS - 1);
	decision.policy = policies.lookup(&bank);
	if (!decision.policy)
		return XDP_PASS;

	reason = parse_frame(&frame, packet);
	if (reason != PARSE_UDP) {
		if (reason == SLUICE_PASS_FRAGMENT &&
		    decision.policy->flags & SLUICE_POLICY_DROP_FRAGMENTS) {
			reason = SLUICE_DROP_FRAGMENT;
			action = XDP_DROP;
		}
		goto out;
	}

	port = policy_port(bank, packet->destination_port);
	if (!port || !port->service) {
		reason = SLUICE_PASS_NOT_OURS;
		goto out;
	}
	if (is_impossible_source(packet)) {
		reason = SLUICE_PASS_SOURCE;
		goto out;
	}
#ifdef SLUICE_BENCH_RANDOM_PEERS
	packet->source.word[3] =
		bpf_htonl(0x0a000000 | (bpf_get_prandom_u32() & (SLUICE_BENCH_RANDOM_PEERS - 1)));
#endif

	decision.now = coarse_time(packet);
	decision.service = port->service;
	peer_find(&decision.from, &packet->source, bank, cpu, decision.now, decision.row);
	decision.class_id = peer_class(&decision.from, packet, number, bank, cpu);
	peer_count(&decision.from, packet, decision.now, length, decision.row);

	decision.kind = policy_kind(&frame, packet, bank, port);
	decision.rule = policy_rule(bank, decision.service, decision.class_id, decision.kind);
	if (decision.rule)
		reason = decide(ctx, &frame, packet, &decision, &action);
	else
		reason = SLUICE_PASS_POLICY;
	if (action == XDP_DROP)
		peer_count_drop(&decision.from, packet);
out:
	count_verdict(decision.row, decision.lane, reason, length);
	return action;
}
