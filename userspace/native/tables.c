// SPDX-License-Identifier: Apache-2.0
#include "tables.h"

#include <errno.h>
#include <stdlib.h>

/* Longest interval and burst: a timestamp plus both stays below 2^63 for a century of uptime. */
#define LIMIT_MAX_NS (1ULL << 61)

static struct sl_prefix *prefix_slot(const struct sl_tables *t, struct sl_words a, uint8_t length)
{
	uint32_t i = sl_hash(t, a, length) & t->prefix_mask;

	while (t->prefix[i].used &&
	       (t->prefix[i].length != length || !sl_same(t->prefix[i].address, a)))
		i = (i + 1) & t->prefix_mask;
	return &t->prefix[i];
}

uint32_t sl_class_of(const struct sl_tables *t, struct sl_words a)
{
	for (unsigned int i = 0; i < t->lengths; i++) {
		struct sl_prefix *slot = prefix_slot(t, sl_masked(a, t->length[i]), t->length[i]);

		if (slot->used)
			return slot->class_id;
	}
	return 0;
}

uint32_t sl_tables_class(const struct sl_tables *tables, const struct sluice_address *address)
{
	return sl_class_of(tables, sl_words_of(address));
}

uint32_t sl_slots_for(uint32_t count)
{
	uint32_t slots = 16;

	while (slots < 2 * count)
		slots *= 2;
	return slots;
}

static bool limit_fits(const struct sluice_limit *limit)
{
	return limit->interval_ns <= LIMIT_MAX_NS && limit->burst_ns <= LIMIT_MAX_NS;
}

/* Everything that the hot path uses as an index is checked here, once. */
static bool source_fits(const struct sl_policy_source *s)
{
	if (s->prefix_count > SLUICE_MAX_PREFIXES || s->known_count > SLUICE_MAX_KNOWN ||
	    s->policy->stranger_bits_v4 > 32 || s->policy->stranger_bits_v6 > 128)
		return false;
	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		const struct sluice_lane *lane = &s->policy->lane[i];

		if (lane->demote_lane >= SLUICE_MAX_LANES || !limit_fits(&lane->limit))
			return false;
	}
	for (int i = 0; i < SLUICE_PORTS; i++)
		if (s->ports[i].service >= SLUICE_MAX_SERVICES ||
		    s->ports[i].patterns > SLUICE_MAX_PATTERNS)
			return false;
	for (int i = 0; i < SLUICE_MAX_SERVICES * SLUICE_MAX_PATTERNS; i++) {
		const struct sluice_pattern *p =
			&s->patterns[i / SLUICE_MAX_PATTERNS].pattern[i % SLUICE_MAX_PATTERNS];

		if (p->kind >= SLUICE_MAX_KINDS || p->width > 8 || (p->width & (p->width - 1)))
			return false;
	}
	for (int i = 0; i < SLUICE_MAX_SERVICES * SLUICE_MAX_CLASSES * SLUICE_MAX_KINDS; i++) {
		const struct sluice_rule *r = &s->rules[i];

		if (r->action > SLUICE_ACTION_REPLY || r->lane >= SLUICE_MAX_LANES ||
		    r->demote_lane >= SLUICE_MAX_LANES || !limit_fits(&r->peer) ||
		    !limit_fits(&r->prefix))
			return false;
	}
	for (uint32_t i = 0; i < s->prefix_count; i++)
		if (s->prefixes[i].prefixlen > 128 || s->classes[i].class_id >= SLUICE_MAX_CLASSES)
			return false;
	return true;
}

static void add_prefixes(struct sl_tables *t, const struct sl_policy_source *s)
{
	bool present[129] = { false };

	for (uint32_t i = 0; i < s->prefix_count; i++) {
		uint8_t length = s->prefixes[i].prefixlen;
		struct sl_words a = sl_masked(sl_words_of(&s->prefixes[i].address), length);
		struct sl_prefix *slot = prefix_slot(t, a, length);

		*slot = (struct sl_prefix){ a, length, s->classes[i].class_id, true };
		present[length] = true;
	}
	for (int length = 128; length >= 0; length--)
		if (present[length])
			t->length[t->lengths++] = length;
}

struct sl_tables *sl_tables_new(const struct sl_policy_source *source, const uint8_t *key,
				int *error)
{
	uint32_t slots = sl_slots_for(source->prefix_count);
	struct sl_tables *t;

	*error = EINVAL;
	if (!source_fits(source))
		return NULL;
	*error = ENOMEM;
	t = calloc(1, sizeof(*t));
	if (!t)
		return NULL;
	t->prefix = calloc(slots, sizeof(*t->prefix));
	t->known = calloc(source->known_count + 1, sizeof(*t->known));
	t->known_ids = calloc(source->known_count + 1, sizeof(*t->known_ids));
	if (!t->prefix || !t->known || !t->known_ids) {
		sl_tables_free(t);
		return NULL;
	}
	memcpy(t->key, key, sizeof(t->key));
	t->prefix_mask = slots - 1;
	t->policy = *source->policy;
	memcpy(t->port, source->ports, sizeof(t->port));
	memcpy(t->patterns, source->patterns, sizeof(t->patterns));
	memcpy(t->rule, source->rules, sizeof(t->rule));
	add_prefixes(t, source);
	t->known_count = source->known_count;
	if (source->known_count) {
		memcpy(t->known, source->known, source->known_count * sizeof(*t->known));
		memcpy(t->known_ids, source->known_ids,
		       source->known_count * sizeof(*t->known_ids));
	}
	*error = 0;
	return t;
}

void sl_tables_free(struct sl_tables *tables)
{
	if (!tables)
		return;
	free(tables->prefix);
	free(tables->known);
	free(tables->known_ids);
	free(tables);
}
