/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the operator wants: ports -> service, payload -> kind, and
 * service x class x kind -> rule.  Everything is looked up in the bank of the
 * generation that was read at the packet's start.
 *
 * struct frame and read_payload() are those of the kind of program: parse.h has
 * them for frames, datagram.h for what a socket gets.  One of them comes first.
 */
#ifndef SLUICE_POLICY_H
#define SLUICE_POLICY_H

#include "abi.h"
#include "packet.h"

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
