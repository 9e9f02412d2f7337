/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the operator wants: ports -> service, payload -> kind, and
 * service x class x kind -> rule.  Everything is looked up in the bank of the
 * generation that was read at the packet's start.
 */
#ifndef SLUICE_POLICY_H
#define SLUICE_POLICY_H

#include "abi.h"
#include "parse.h"

BPF_TABLE("array", u32, struct sluice_generation, generation, 1);
BPF_TABLE("array", u32, struct sluice_policy, policies, SLUICE_BANKS);
BPF_TABLE("array", u32, struct sluice_port, ports, SLUICE_PORTS_SIZE);
BPF_TABLE("array", u32, struct sluice_patterns, patterns, SLUICE_PATTERNS_SIZE);
BPF_TABLE("array", u32, struct sluice_rule, rules, SLUICE_RULES_SIZE);

static __always_inline struct sluice_port *policy_port(u32 bank, u16 port)
{
	u32 index = bank * SLUICE_PORTS + port;

	return ports.lookup(&index);
}

/* Reads width bytes in network order; 0 where the frame is too short. */
static __always_inline int read_payload(const struct frame *frame, const struct packet *packet,
					u32 offset, u32 width, u64 *value)
{
	void *at = frame_at(frame, packet->payload_offset + offset);

	if (offset + width > packet->payload_length)
		return 0;
	switch (width) {
	case 1:
		if (at + 1 > frame->end)
			return 0;
		*value = *(u8 *)at;
		return 1;
	case 2:
		if (at + 2 > frame->end)
			return 0;
		*value = bpf_ntohs(*(__be16 *)at);
		return 1;
	case 4:
		if (at + 4 > frame->end)
			return 0;
		*value = bpf_ntohl(*(__be32 *)at);
		return 1;
	case 8:
		if (at + 8 > frame->end)
			return 0;
		*value = __be64_to_cpu(*(__be64 *)at);
		return 1;
	}
	return 0;
}

/* The kind of the first pattern that matches, 0 for none. */
static __always_inline u32 policy_kind(const struct frame *frame, const struct packet *packet,
				       u32 bank, const struct sluice_port *port)
{
	u32 index = bank * SLUICE_MAX_SERVICES + port->service;
	struct sluice_patterns *table;
	struct sluice_pattern *pattern;
	u64 value;
	u32 i;

	if (!port->patterns)
		return 0;
	table = patterns.lookup(&index);
	if (!table)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < SLUICE_MAX_PATTERNS; i++) {
		if (i >= port->patterns)
			break;
		pattern = &table->pattern[i];
		if (read_payload(frame, packet, pattern->offset, pattern->width, &value) &&
		    (value & pattern->mask) == pattern->value)
			return pattern->kind;
	}
	return 0;
}

static __always_inline struct sluice_rule *policy_rule(u32 bank, u32 service, u32 class_id,
						       u32 kind)
{
	u32 index = ((bank * SLUICE_MAX_SERVICES + service) * SLUICE_MAX_CLASSES + class_id) *
			    SLUICE_MAX_KINDS +
		    kind;

	return rules.lookup(&index);
}

#endif /* SLUICE_POLICY_H */
