// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The policy of the steer program for kernel sockets: chooses among the sockets
 * that share a port (SO_REUSEPORT), one for each lane and worker.
 *
 *   service -> peer -> policy -> limit -> count -> lane -> worker
 *
 * So each lane has a socket buffer of its own, and what floods a low lane costs a
 * high one nothing.  The program belongs to a group of sockets, which is bound to
 * one port (and address family); the kernel runs it for unicast, not for what came
 * by broadcast or multicast, which all sockets of the group get.
 *
 * Verdicts are those of abi.h.  Behind a socket there is nobody to pass a datagram
 * to, so what differs from the steer program is this:
 *
 *   STEER, STEER_DEMOTED, PASS_LANE, PASS_DEMOTED   entered its lane's socket
 *   REPLY           a probe within its limits: so did it; who reads it answers
 *   PASS_NO_SOCKET  no worker has a socket in that lane: dropped
 *   PASS_NOT_OURS, PASS_SOURCE, PASS_POLICY and all DROP_*: dropped
 *
 * Dropping.  SK_DROP would do, but the kernel then acts as if nobody listened, and
 * sends "port unreachable" to the sender: connected sockets of a peer that is over
 * its limit would report the service as gone.  Therefore each group has a drain: a socket
 * whose filter refuses everything.
 *
 * Bytes are those of payloads, for a socket sees no frames.  A message with several
 * datagrams of one flow (UDP_SEGMENT from this machine) is one here.
 *
 * The compiler is given:
 *   SLUICE_CPUS     number of possible CPUs
 *   SLUICE_SOCKETS  stands for the descriptor of the map of sockets, which bcc can't make
 * and the loader (xdp/select.py) draws the salt of the hashes, see constant.h.
 */
#include <uapi/linux/bpf.h>
#include "abi.h"
#include "count.h"
#include "datagram.h"
#include "peer.h"
#include "policy.h"
#include "decision.h"

BPF_TABLE("array", u32, struct sluice_selection, selection, 1);
BPF_TABLE("array", u32, struct sluice_group, groups, SLUICE_PORTS);

/* True: the socket at that place of the map gets the datagram. */
static __always_inline int choose(struct sk_reuseport_md *context, u32 place)
{
	return !bpf_sk_select_reuseport(context, (void *)bpf_pseudo_fd(1, SLUICE_SOCKETS), &place,
					0);
}

/* A number below count for each upper half of a hash. */
static __always_inline u32 below(u64 hash, u32 count)
{
	return (hash >> 32) * count >> 32;
}

/*
 * A peer has one worker, whatever port and lane its datagrams go to.  When that one
 * is gone, the kernel has taken its sockets out of the map; its peers are then spread
 * over the others by other bits of the hash.  Never to another lane.
 */
static __always_inline int choose_worker(struct sk_reuseport_md *context, u32 first, u32 workers,
					 u64 hash, struct sluice_counters *row)
{
	u32 i, start;

	if (choose(context, first + below(hash, workers)))
		return 1;
	start = below(hash << 32, workers);
#pragma clang loop unroll(disable)
	for (i = 0; i < SLUICE_MAX_WORKERS; i++) {
		/* Keeps the compiler from counting another way, whose end the verifier can't see. */
		asm volatile("" : "+r"(i));
		if (i >= workers)
			break;
		if (choose(context, first + (start + i) % workers)) {
			row->worker_gone++;
			return 1;
		}
	}
	return 0;
}

/* What the policy says; sets the lane where it says one. */
static __always_inline int decide(const struct frame *frame, struct packet *packet,
				  struct decision *decision)
{
	int reason, probe = 0;

	switch (decision->rule->action) {
	case SLUICE_ACTION_LANE:
		break;
	case SLUICE_ACTION_REPLY:
		probe = is_probe(frame, packet);
		break;
	case SLUICE_ACTION_DENY:
		return SLUICE_DROP_DENIED;
	case SLUICE_ACTION_DROP:
		return SLUICE_DROP_POLICY;
	default:
		return SLUICE_PASS_POLICY;
	}
	decision->lane = decision->rule->lane & (SLUICE_MAX_LANES - 1);
	count_add(&decision->row->lane_seen[decision->lane], packet->payload_length);
	reason = over_limits(packet, decision, !probe);
	if (reason != WITHIN_LIMITS)
		return reason;
	if (probe)
		return SLUICE_REPLY;
	if (decision->policy->lane[decision->lane & (SLUICE_MAX_LANES - 1)].end ==
	    SLUICE_END_KERNEL)
		return decision->demoted ? SLUICE_PASS_DEMOTED : SLUICE_PASS_LANE;
	return decision->demoted ? SLUICE_STEER_DEMOTED : SLUICE_STEER;
}

static __always_inline int is_drop(int reason)
{
	return reason >= SLUICE_DROP_FRAGMENT && reason <= SLUICE_DROP_LANE_LIMIT;
}

/* The reason, with the lane in the decision where one was chosen; nothing is selected yet. */
static __always_inline int classify(const struct frame *frame, struct packet *packet,
				    struct decision *decision, u64 number, u32 cpu)
{
	u32 bank = number & (SLUICE_BANKS - 1);
	struct sluice_port *port = policy_port(bank, packet->destination_port);
	int reason;

	if (!port || !port->service)
		return SLUICE_PASS_NOT_OURS;
	if (is_impossible_source(packet))
		return SLUICE_PASS_SOURCE;
	decision->now = coarse_time(packet);
	decision->service = port->service;
	peer_find(&decision->from, &packet->source, bank, cpu, decision->now, decision->row);
	decision->class_id = peer_class(&decision->from, packet, number, bank, cpu);
	peer_count(&decision->from, packet, decision->now, packet->payload_length, decision->row);

	decision->kind = policy_kind(frame, packet, bank, port);
	decision->rule = policy_rule(bank, decision->service, decision->class_id, decision->kind);
	reason = decision->rule ? decide(frame, packet, decision) : SLUICE_PASS_POLICY;
	if (is_drop(reason))
		peer_count_drop(&decision->from, packet);
	return reason;
}

/*
 * Into a socket of the lane, or into the drain.  Takes reason and lane from the map where the
 * packet is, so that the verifier follows all that was decided as one (packet.h).
 */
static __always_inline int enter(struct sk_reuseport_md *context, const struct packet *packet,
				 u32 group, struct sluice_counters *row)
{
	u32 length = packet->payload_length, reason = packet->reason, lane = packet->lane;
	struct sluice_selection *all;
	u32 zero = 0, place;

	all = selection.lookup(&zero);
	if (!all)
		return SK_DROP;
	if (lane < SLUICE_MAX_LANES && !is_drop(reason)) {
		place = (group * SLUICE_MAX_LANES + lane) * all->workers;
		if (choose_worker(context, place, all->workers, stranger_hash(&packet->source),
				  row)) {
			count_verdict(row, lane, reason, length);
			return SK_PASS;
		}
		reason = SLUICE_PASS_NO_SOCKET;
	}
	count_verdict(row, lane, reason, length);
	place = all->groups * SLUICE_MAX_LANES * all->workers + group;
	return choose(context, place) ? SK_PASS : SK_DROP;
}

int sluice_select(struct sk_reuseport_md *context)
{
	struct frame frame = { .context = context };
	struct decision decision = { .lane = SLUICE_NO_LANE };
	u32 cpu = bpf_get_smp_processor_id();
	struct sluice_generation *newest;
	u32 zero = 0, bank, of_port;
	struct sluice_group *group;
	struct packet *packet;
	u64 number;

	decision.row = counters.lookup(&cpu);
	packet = scratch.lookup(&cpu);
	newest = generation.lookup(&zero);
	if (!decision.row || !packet || !newest || !read_datagram(&frame, packet))
		return SK_DROP;
	count_add(&decision.row->seen, packet->payload_length);

	/* Read once: everything below belongs to this generation. */
	number = *(volatile u64 *)&newest->number;
	bank = number & (SLUICE_BANKS - 1);
	of_port = packet->destination_port;
	decision.policy = policies.lookup(&bank);
	group = groups.lookup(&of_port);
	if (!decision.policy || !group)
		return SK_DROP;
	packet->reason = classify(&frame, packet, &decision, number, cpu);
	packet->lane = decision.lane;
	return enter(context, packet, (packet->version == 4 ? group->ipv4 : group->ipv6) - 1,
		     decision.row);
}
