// SPDX-License-Identifier: Apache-2.0
#include "classify.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "limit.h"

/* One byte hashed behind every address keeps the uses of one key apart; prefix lengths are 0..128. */
#define TAG_PEER 129
#define TAG_BUCKET 130

#define STRANGER_CHAINS (2 * SLUICE_MAX_STRANGERS) /* power of 2; half an entry per chain */
#define NO_STRANGER UINT32_MAX
/* Entries looked at for one eviction: bounds the work an invented address can cause. */
#define EVICTION_SCAN 64

struct known {
	struct sl_words address;
	struct sl_peer peer;
	struct sluice_hold hold;
	bool used;
};

struct stranger {
	struct sl_words address;
	struct sl_peer peer;
	uint32_t next;   /* in its chain */
	uint16_t bucket; /* of its prefix, valid while the peer's class is */
	bool referenced; /* seen again since the hand passed */
};

struct peer_ref {
	struct sl_peer *peer;
	struct stranger *stranger; /* NULL: a known peer .. */
	struct sluice_hold *hold;  /* .. which may be held; NULL: a stranger */
};

struct sl_classifier {
	struct peer_ref recent; /* the last one, NULL: none; senders come in bursts */
	struct sl_words recent_address;
	struct sl_tables *tables;
	struct known *known;
	uint32_t known_mask;
	uint32_t strangers;
	uint32_t hand;
	uint64_t generation;
	struct sluice_counters counters;
	__u64 lane_tat[SLUICE_MAX_LANES];
	__u64 prefix_tat[SLUICE_PREFIX_BUCKETS];
	uint32_t chain[STRANGER_CHAINS];
	struct stranger stranger[SLUICE_MAX_STRANGERS];
};

static struct known *known_slot(struct known *known, uint32_t mask, uint64_t h, struct sl_words a)
{
	uint32_t i = h & mask;

	while (known[i].used && !sl_same(known[i].address, a))
		i = (i + 1) & mask;
	return &known[i];
}

static struct stranger *find_stranger(struct sl_classifier *c, uint64_t h, struct sl_words a)
{
	uint32_t i = c->chain[h & (STRANGER_CHAINS - 1)];

	while (i != NO_STRANGER && !sl_same(c->stranger[i].address, a))
		i = c->stranger[i].next;
	return i == NO_STRANGER ? NULL : &c->stranger[i];
}

static void unlink_stranger(struct sl_classifier *c, const struct stranger *gone)
{
	uint32_t index = gone - c->stranger;
	uint32_t *at =
		&c->chain[sl_hash(c->tables, gone->address, TAG_PEER) & (STRANGER_CHAINS - 1)];

	while (*at != index)
		at = &c->stranger[*at].next;
	*at = gone->next;
}

/*
 * A free entry, at the cost of a stranger not seen again lately when all are
 * taken (CLOCK).  New entries start unreferenced: addresses that are invented
 * for one packet push out one another before any peer that keeps talking.
 */
static struct stranger *take_stranger(struct sl_classifier *c)
{
	struct stranger *s;

	if (c->strangers < SLUICE_MAX_STRANGERS)
		return &c->stranger[c->strangers++];
	for (int i = 0; i < EVICTION_SCAN; i++) {
		s = &c->stranger[c->hand];
		if (!s->referenced)
			break;
		s->referenced = false;
		c->hand = (c->hand + 1) % SLUICE_MAX_STRANGERS;
	}
	s = &c->stranger[c->hand];
	c->hand = (c->hand + 1) % SLUICE_MAX_STRANGERS;
	unlink_stranger(c, s);
	return s;
}

static struct stranger *add_stranger(struct sl_classifier *c, uint64_t h, struct sl_words a)
{
	struct stranger *s = take_stranger(c);
	uint32_t *head = &c->chain[h & (STRANGER_CHAINS - 1)];

	*s = (struct stranger){ .address = a, .next = *head };
	*head = s - c->stranger;
	return s;
}

/* Chains hold no entry twice, so rehashing under a new key is taking all in again. */
static void rehash_strangers(struct sl_classifier *c)
{
	memset(c->chain, 0xff, sizeof(c->chain));
	for (uint32_t i = 0; i < c->strangers; i++) {
		uint64_t h = sl_hash(c->tables, c->stranger[i].address, TAG_PEER);
		uint32_t *head = &c->chain[h & (STRANGER_CHAINS - 1)];

		c->stranger[i].next = *head;
		*head = i;
	}
}

struct sl_classifier *sl_classifier_new(struct sl_tables *tables)
{
	struct sl_classifier *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	memset(c->chain, 0xff, sizeof(c->chain));
	if (sl_classifier_swap(c, tables)) {
		free(c);
		return NULL;
	}
	return c;
}

void sl_classifier_free(struct sl_classifier *classifier)
{
	if (!classifier)
		return;
	sl_tables_free(classifier->tables);
	free(classifier->known);
	free(classifier);
}

int sl_classifier_swap(struct sl_classifier *c, struct sl_tables *tables)
{
	uint32_t slots = sl_slots_for(tables->known_count);
	struct known *old = c->known, *fresh = calloc(slots, sizeof(*fresh));
	struct sl_tables *old_tables = c->tables;
	uint32_t old_slots = c->known_mask + 1;

	if (!fresh)
		return -ENOMEM;
	for (uint32_t i = 0; i < tables->known_count; i++) {
		struct sl_words a = sl_words_of(&tables->known[i]);
		struct known *k = known_slot(fresh, slots - 1, sl_hash(tables, a, TAG_PEER), a);

		k->address = a;
		k->used = true;
		if (old_tables) {
			uint64_t h = sl_hash(old_tables, a, TAG_PEER);
			struct known *before = known_slot(old, c->known_mask, h, a);
			struct stranger *s = find_stranger(c, h, a);

			if (before->used) {
				k->peer = before->peer;
				k->hold = before->hold;
			} else if (s)
				k->peer = s->peer;
		}
		k->peer.id = tables->known_ids[i];
	}
	c->tables = tables;
	c->known = fresh;
	c->known_mask = slots - 1;
	c->generation++; /* every cached class and bucket is void */
	c->recent.peer = NULL;
	rehash_strangers(c);
	for (uint32_t i = 0; old && i < old_slots; i++) {
		struct sl_words a = old[i].address;
		uint64_t h = sl_hash(tables, a, TAG_PEER);
		struct stranger *s;

		if (!old[i].used || !old[i].peer.packets ||
		    known_slot(fresh, slots - 1, h, a)->used)
			continue;
		/* It may have been a stranger before it was known; that entry is the older one. */
		s = find_stranger(c, h, a);
		if (!s)
			s = add_stranger(c, h, a);
		s->peer = old[i].peer;
		s->peer.id = 0;
	}
	free(old);
	sl_tables_free(old_tables);
	return 0;
}

const struct sluice_counters *sl_classifier_counters(const struct sl_classifier *classifier)
{
	return &classifier->counters;
}

uint32_t sl_classifier_strangers(const struct sl_classifier *classifier)
{
	return classifier->strangers;
}

const struct sl_peer *sl_classifier_peer(struct sl_classifier *classifier,
					 const struct sluice_address *address)
{
	struct sl_words a = sl_words_of(address);
	uint64_t h = sl_hash(classifier->tables, a, TAG_PEER);
	struct known *k = known_slot(classifier->known, classifier->known_mask, h, a);
	struct stranger *s = k->used ? NULL : find_stranger(classifier, h, a);

	return k->used ? &k->peer : s ? &s->peer : NULL;
}

int sl_classifier_hold(struct sl_classifier *c, const struct sluice_address *address,
		       const struct sluice_hold *hold, uint64_t now_ns)
{
	struct sl_words a = sl_words_of(address);
	struct known *k = known_slot(c->known, c->known_mask, sl_hash(c->tables, a, TAG_PEER), a);

	if (!k->used)
		return -ENOENT;
	sl_hold_set(&k->hold, hold, now_ns);
	return 0;
}

/* The entry of the source, made when it is new, with its class of this policy. */
static struct peer_ref peer_of(struct sl_classifier *c, struct sl_words a, uint64_t now)
{
	const struct sl_tables *t = c->tables;
	struct peer_ref ref;
	struct known *k;
	uint64_t h;

	/* A stranger's entry may have become another's in the meantime. */
	if (c->recent.peer && sl_same(c->recent_address, a) &&
	    (!c->recent.stranger || sl_same(c->recent.stranger->address, a))) {
		if (c->recent.stranger)
			c->recent.stranger->referenced = true;
		return c->recent;
	}
	h = sl_hash(t, a, TAG_PEER);
	k = known_slot(c->known, c->known_mask, h, a);
	ref = (struct peer_ref){ &k->peer, NULL, &k->hold };
	if (!k->used) {
		ref.hold = NULL;
		ref.stranger = find_stranger(c, h, a);
		if (ref.stranger) {
			ref.stranger->referenced = true;
		} else {
			ref.stranger = add_stranger(c, h, a);
			c->counters.strangers_created++;
		}
		ref.peer = &ref.stranger->peer;
	}
	if (!ref.peer->first_seen_ns)
		ref.peer->first_seen_ns = now;
	if (ref.peer->generation != c->generation) {
		ref.peer->generation = c->generation;
		ref.peer->class_id = sl_class_of(t, a);
		if (ref.stranger) {
			unsigned int bits = sl_is_v4(a) ? 96 + t->policy.stranger_bits_v4 :
							  t->policy.stranger_bits_v6;

			ref.stranger->bucket = sl_hash(t, sl_masked(a, bits), TAG_BUCKET) &
					       (SLUICE_PREFIX_BUCKETS - 1);
		}
	}
	c->recent = ref;
	c->recent_address = a;
	return ref;
}

static uint64_t read_be(const uint8_t *bytes, unsigned int width)
{
	uint64_t value = 0;

	while (width--)
		value = value << 8 | *bytes++;
	return value;
}

static uint8_t kind_of(const struct sl_tables *t, const struct sluice_port *port,
		       const uint8_t *payload, uint32_t length)
{
	const struct sluice_pattern *p = t->patterns[port->service].pattern;

	for (const struct sluice_pattern *end = p + port->patterns; p < end; p++)
		if (p->width && (uint32_t)p->offset + p->width <= length &&
		    (read_be(payload + p->offset, p->width) & p->mask) == p->value)
			return p->kind;
	return 0;
}

static bool is_probe(const uint8_t *payload, uint32_t length)
{
	return length == sizeof(struct sluice_heartbeat) &&
	       read_be(payload, 4) == SLUICE_HEARTBEAT_MAGIC &&
	       payload[4] == SLUICE_HEARTBEAT_PROBE;
}

/* No source that a host may have; loopback is legal here, see the header. */
static bool bad_source(struct sl_words a)
{
	if (sl_is_v4(a))
		return (uint8_t)(a.low >> 24) == 0 || (uint8_t)(a.low >> 24) >= 224;
	return (a.high == 0 && a.low == 0) || a.high >> 56 == 0xff;
}

/* Limits in their order; the first one over decides.  Sets *lane when it demotes. */
static uint8_t limited(struct sl_classifier *c, const struct sluice_rule *rule, struct peer_ref ref,
		       bool reply, uint8_t *lane, uint64_t now)
{
	const struct sluice_lane *lanes = c->tables->policy.lane;
	uint8_t over = SLUICE_OVER_DROP, to = rule->demote_lane, drop = 0;

	if (ref.hold && sl_held_back(ref.hold, now))
		return SLUICE_DROP_HELD;
	if (!sl_conforms(&ref.peer->tat_ns, &rule->peer, now))
		drop = SLUICE_DROP_PEER_LIMIT;
	else if (ref.stranger &&
		 !sl_conforms(&c->prefix_tat[ref.stranger->bucket], &rule->prefix, now))
		drop = SLUICE_DROP_PREFIX_LIMIT;
	if (drop) {
		over = rule->over;
	} else if (!sl_conforms(&c->lane_tat[*lane], &lanes[*lane].limit, now)) {
		drop = SLUICE_DROP_LANE_LIMIT;
		over = lanes[*lane].over;
		to = lanes[*lane].demote_lane;
	}
	if (!drop)
		return reply ? SLUICE_REPLY : lanes[*lane].end ? SLUICE_PASS_LANE : SLUICE_STEER;
	/* A reply has no lower lane to go to. */
	if (over != SLUICE_OVER_DEMOTE || reply)
		return drop;
	c->counters.demoted_from[*lane]++;
	*lane = to;
	c->counters.demoted_to[to]++;
	if (!sl_conforms(&c->lane_tat[to], &lanes[to].limit, now))
		return SLUICE_DROP_LANE_LIMIT;
	return lanes[to].end ? SLUICE_PASS_DEMOTED : SLUICE_STEER_DEMOTED;
}

static bool is_drop(uint8_t reason)
{
	return reason >= SLUICE_DROP_FRAGMENT && reason <= SLUICE_DROP_LANE_LIMIT;
}

static void classify_one(struct sl_classifier *c, const struct sl_datagrams *d, uint32_t i,
			 uint64_t now)
{
	const struct sl_tables *t = c->tables;
	const struct sluice_port *port = &t->port[d->port[i]];
	const uint8_t *payload = d->area + d->offset[i];
	struct sl_words a = sl_words_of(&d->address[i]);
	const struct sluice_rule *rule;
	struct peer_ref ref;
	bool reply;

	d->service[i] = port->service;
	d->lane[i] = SLUICE_NO_LANE;
	d->class_id[i] = 0;
	d->kind[i] = 0;
	d->peer[i] = 0;
	if (!port->service || bad_source(a)) {
		d->reason[i] = port->service ? SLUICE_PASS_SOURCE : SLUICE_PASS_NOT_OURS;
		return;
	}
	ref = peer_of(c, a, now);
	d->peer[i] = ref.peer->id;
	d->class_id[i] = ref.peer->class_id;
	d->kind[i] = kind_of(t, port, payload, d->length[i]);
	rule = &t->rule[(port->service * SLUICE_MAX_CLASSES + d->class_id[i]) * SLUICE_MAX_KINDS +
			d->kind[i]];
	if (rule->action == SLUICE_ACTION_LANE || rule->action == SLUICE_ACTION_REPLY) {
		reply = rule->action == SLUICE_ACTION_REPLY && is_probe(payload, d->length[i]);
		d->lane[i] = rule->lane;
		c->counters.lane_seen[rule->lane].packets++;
		c->counters.lane_seen[rule->lane].bytes += d->length[i];
		d->reason[i] = limited(c, rule, ref, reply, &d->lane[i], now);
	} else {
		d->reason[i] = rule->action == SLUICE_ACTION_DENY ? SLUICE_DROP_DENIED :
			       rule->action == SLUICE_ACTION_DROP ? SLUICE_DROP_POLICY :
								    SLUICE_PASS_POLICY;
	}
	ref.peer->packets++;
	ref.peer->bytes += d->length[i];
	ref.peer->drops += is_drop(d->reason[i]);
	ref.peer->last_seen_ns = now;
}

static void classify_and_count(struct sl_classifier *c, const struct sl_datagrams *d, uint32_t i,
			       uint64_t now)
{
	struct sluice_count *verdict;

	classify_one(c, d, i, now);
	verdict = &c->counters.verdict[d->lane[i] * SLUICE_REASONS + d->reason[i]];
	verdict->packets++;
	verdict->bytes += d->length[i];
	c->counters.seen.packets++;
	c->counters.seen.bytes += d->length[i];
}

void sl_classify(struct sl_classifier *classifier, const struct sl_datagrams *datagrams, uint32_t n,
		 uint64_t now_ns)
{
	for (uint32_t i = 0; i < n; i++)
		classify_and_count(classifier, datagrams, i, now_ns);
}

/* Whether a rule, with or without a limit's demotion, leads into that lane. */
static bool leads_to(const struct sl_tables *t, const struct sluice_rule *rule, uint8_t lane)
{
	const struct sluice_lane *chosen = &t->policy.lane[rule->lane];

	if (rule->action != SLUICE_ACTION_LANE && rule->action != SLUICE_ACTION_REPLY)
		return false;
	return rule->lane == lane ||
	       (rule->over == SLUICE_OVER_DEMOTE && rule->demote_lane == lane) ||
	       (chosen->over == SLUICE_OVER_DEMOTE && chosen->demote_lane == lane);
}

/* False: the policy would never have put it there. */
static bool describe_one(struct sl_classifier *c, const struct sl_datagrams *d, uint32_t i,
			 uint8_t lane, uint64_t now)
{
	const struct sl_tables *t = c->tables;
	const struct sluice_port *port = &t->port[d->port[i]];
	const uint8_t *payload = d->area + d->offset[i];
	struct sl_words a = sl_words_of(&d->address[i]);
	const struct sluice_rule *rule;
	struct peer_ref ref;

	if (!port->service || bad_source(a))
		return false;
	ref = peer_of(c, a, now);
	d->service[i] = port->service;
	d->peer[i] = ref.peer->id;
	d->class_id[i] = ref.peer->class_id;
	d->kind[i] = kind_of(t, port, payload, d->length[i]);
	rule = &t->rule[(port->service * SLUICE_MAX_CLASSES + d->class_id[i]) * SLUICE_MAX_KINDS +
			d->kind[i]];
	if (!leads_to(t, rule, lane))
		return false;
	d->lane[i] = lane;
	d->reason[i] = rule->action == SLUICE_ACTION_REPLY && is_probe(payload, d->length[i]) ?
			       SLUICE_REPLY :
			       SLUICE_STEER;
	ref.peer->packets++;
	ref.peer->bytes += d->length[i];
	ref.peer->last_seen_ns = now;
	return true;
}

void sl_describe(struct sl_classifier *classifier, const struct sl_datagrams *datagrams, uint32_t n,
		 uint8_t lane, uint64_t now_ns)
{
	for (uint32_t i = 0; i < n; i++)
		if (!describe_one(classifier, datagrams, i, lane, now_ns))
			classify_and_count(classifier, datagrams, i, now_ns);
}

void sl_heartbeat_reply(uint8_t *payload)
{
	payload[4] = SLUICE_HEARTBEAT_REPLY; /* struct sluice_heartbeat.type */
}
