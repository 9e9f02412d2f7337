/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One compiled policy, made for look-ups from the arrays that abi.h describes.
 * Never changed once made; a new policy is a new struct sl_tables.
 *
 * Classes are found by longest prefix: one hash table over all prefixes, asked
 * once per prefix length that occurs, longest first.  That is only done for a
 * source that is new or not yet classified under this policy, so the number of
 * lengths matters little and the number of prefixes not at all.
 *
 * Attackers choose addresses, so every hash is SipHash-1-3 under a secret key
 * (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
 */
#ifndef SL_TABLES_H
#define SL_TABLES_H

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

/* cffi: begin */

/* Arrays of one compiled policy, one bank of each; copied, so they may go. */
struct sl_policy_source {
	const struct sluice_policy *policy;
	const struct sluice_port *ports;           /* SLUICE_PORTS */
	const struct sluice_patterns *patterns;    /* SLUICE_MAX_SERVICES */
	const struct sluice_rule *rules;           /* SERVICES * CLASSES * KINDS */
	const struct sluice_prefix *prefixes;      /* prefix_count */
	const struct sluice_prefix_class *classes; /* prefix_count */
	const struct sluice_address *known;        /* known_count */
	const uint32_t *known_ids;                 /* known_count */
	uint32_t prefix_count;
	uint32_t known_count;
};

struct sl_tables;

/*
 * Compiles a policy for look-ups.  NULL with *error = EINVAL (a number is out of
 * the range that abi.h gives it) or ENOMEM.  key: 16 secret bytes.
 */
struct sl_tables *sl_tables_new(const struct sl_policy_source *source, const uint8_t *key,
				int *error);
void sl_tables_free(struct sl_tables *tables);
/* Class of an address by its longest prefix, 0 when it has none. */
uint32_t sl_tables_class(const struct sl_tables *tables, const struct sluice_address *address);

/* cffi: end */

/* An address in host order. */
struct sl_words {
	uint64_t high, low;
};

struct sl_prefix {
	struct sl_words address;
	uint8_t length;
	uint8_t class_id;
	bool used;
};

struct sl_tables {
	struct sluice_policy policy;
	uint64_t key[2];
	uint32_t prefix_mask; /* slots - 1, slots a power of 2 */
	uint32_t known_count;
	uint8_t lengths;     /* how many prefix lengths occur */
	uint8_t length[129]; /* those, longest first */
	struct sl_prefix *prefix;
	struct sluice_address *known;
	uint32_t *known_ids;
	struct sluice_port port[SLUICE_PORTS];
	struct sluice_patterns patterns[SLUICE_MAX_SERVICES];
	struct sluice_rule rule[SLUICE_MAX_SERVICES * SLUICE_MAX_CLASSES * SLUICE_MAX_KINDS];
};

static inline struct sl_words sl_words_of(const struct sluice_address *address)
{
	struct sl_words w;

	memcpy(&w, address, sizeof(w));
	w.high = be64toh(w.high);
	w.low = be64toh(w.low);
	return w;
}

static inline bool sl_same(struct sl_words a, struct sl_words b)
{
	return a.high == b.high && a.low == b.low;
}

static inline struct sl_words sl_masked(struct sl_words a, unsigned int length)
{
	a.high &= length >= 64 ? ~0ULL : length ? ~0ULL << (64 - length) : 0;
	a.low &= length >= 128 ? ~0ULL : length > 64 ? ~0ULL << (128 - length) : 0;
	return a;
}

static inline bool sl_is_v4(struct sl_words a)
{
	return a.high == 0 && a.low >> 32 == 0xffff;
}

static inline uint64_t sl_rotate(uint64_t x, int by)
{
	return x << by | x >> (64 - by);
}

static inline void sl_sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[2] += v[3];
	v[1] = sl_rotate(v[1], 13) ^ v[0];
	v[3] = sl_rotate(v[3], 16) ^ v[2];
	v[0] = sl_rotate(v[0], 32);
	v[2] += v[1];
	v[0] += v[3];
	v[1] = sl_rotate(v[1], 17) ^ v[2];
	v[3] = sl_rotate(v[3], 21) ^ v[0];
	v[2] = sl_rotate(v[2], 32);
}

static inline void sl_sip_word(uint64_t v[4], uint64_t word)
{
	v[3] ^= word;
	sl_sip_round(v);
	v[0] ^= word;
}

/* SipHash-1-3 of the 17 bytes address, tag. */
static inline uint64_t sl_hash(const struct sl_tables *t, struct sl_words a, uint8_t tag)
{
	uint64_t v[4] = { t->key[0] ^ 0x736f6d6570736575ULL, t->key[1] ^ 0x646f72616e646f6dULL,
			  t->key[0] ^ 0x6c7967656e657261ULL, t->key[1] ^ 0x7465646279746573ULL };

	sl_sip_word(v, a.high);
	sl_sip_word(v, a.low);
	sl_sip_word(v, 17ULL << 56 | tag);
	v[2] ^= 0xff;
	sl_sip_round(v);
	sl_sip_round(v);
	sl_sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

uint32_t sl_class_of(const struct sl_tables *t, struct sl_words a);
/* A power of 2 that leaves at least half of the slots free. */
uint32_t sl_slots_for(uint32_t count);

#endif /* SL_TABLES_H */
