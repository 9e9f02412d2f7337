/* SPDX-License-Identifier: Apache-2.0 */
/* What channel.c and channel_wait.c know of a channel; channel.h explains it. */
#ifndef SL_CHANNEL_PRIVATE_H
#define SL_CHANNEL_PRIVATE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "channel.h"

/* Bytes.  Two lines of 64: x86 fetches them in pairs, some ARM cores have lines of 128. */
#define SL_CHANNEL_LINE 128

#define SL_CHANNEL_CLOSED (1ULL << 63)
#define SL_CHANNEL_INDEX (SL_CHANNEL_CLOSED - 1)

struct sl_channel {
	uint8_t *elements;
	_Atomic uint64_t *stamps; /* NULL: one producer */
	uint64_t start;
	uint32_t capacity;
	uint32_t element_size;
	int item_fd, room_fd;

	/* The producers' line.  The consumer writes to it only when it is about to sleep. */
	_Alignas(SL_CHANNEL_LINE) _Atomic uint64_t tail;
	_Atomic uint64_t head_seen;
	_Atomic uint64_t refused, full, put_high, consumer_wakes;
	_Atomic uint32_t consumer_asleep;
	atomic_bool room_watched;

	/* The consumer's line.  A producer writes to it only when it is about to sleep. */
	_Alignas(SL_CHANNEL_LINE) _Atomic uint64_t head;
	uint64_t tail_seen;
	_Atomic uint64_t empty, get_high, producer_wakes;
	_Atomic uint32_t producer_asleep;
	atomic_bool items_watched;

	_Alignas(SL_CHANNEL_LINE) _Atomic uint32_t references;
};

static inline uint64_t sl_channel_distance(uint64_t to, uint64_t from)
{
	return (to - from) & SL_CHANNEL_INDEX;
}

static inline uint64_t sl_channel_step(uint64_t index, uint64_t n)
{
	return (index + n) & SL_CHANNEL_INDEX;
}

/* What the slot of an index holds once its element is there. */
static inline uint64_t sl_channel_stamp(uint64_t index)
{
	return sl_channel_step(index, 1);
}

static inline _Atomic uint64_t *sl_channel_stamp_of(const struct sl_channel *channel,
						    uint64_t index)
{
	return &channel->stamps[index & (channel->capacity - 1)];
}

/* Puts and gets that do not wait and wake nobody.  Counts, or -EBADF. */
int sl_channel_try_put(struct sl_channel *channel, const void *elements, uint32_t n, bool whole);
int sl_channel_try_get(struct sl_channel *channel, void *elements, uint32_t n, bool whole);

/* The other side said that it sleeps: steps c and d. */
void sl_channel_wake_up_consumer(struct sl_channel *channel);
void sl_channel_wake_up_producers(struct sl_channel *channel);

/* After a put that moved something: step b. */
static inline void sl_channel_wake_consumer(struct sl_channel *channel)
{
	if (atomic_load_explicit(&channel->consumer_asleep, memory_order_seq_cst)) /* W */
		sl_channel_wake_up_consumer(channel);
}

/* The same after a get. */
static inline void sl_channel_wake_producers(struct sl_channel *channel)
{
	if (atomic_load_explicit(&channel->producer_asleep, memory_order_seq_cst)) /* W */
		sl_channel_wake_up_producers(channel);
}

/* A put gave up on some elements, or a get took all there was (none: nothing at all): counts, and watches. */
void sl_channel_met_full(struct sl_channel *channel, uint32_t refused);
void sl_channel_met_empty(struct sl_channel *channel, bool none);

#endif /* SL_CHANNEL_PRIVATE_H */
