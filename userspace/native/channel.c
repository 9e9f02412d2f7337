// SPDX-License-Identifier: Apache-2.0
#include "channel_private.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

_Static_assert(SL_CHANNEL_ELEMENT_MAX >= sizeof(void *), "a pointer is an element");
_Static_assert(offsetof(struct sl_channel, room_fd) + sizeof(int) <= SL_CHANNEL_LINE,
	       "what does not change shares no line with what does");
_Static_assert(offsetof(struct sl_channel, head) - offsetof(struct sl_channel, tail) ==
		       SL_CHANNEL_LINE,
	       "one line for the producers");
_Static_assert(offsetof(struct sl_channel, references) - offsetof(struct sl_channel, head) ==
		       SL_CHANNEL_LINE,
	       "one line for the consumer");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "lock-free it shall be");

/* n * size, in whole lines (aligned_alloc wants that); written once, so that all pages are there. */
static void *allocate(size_t n, size_t size)
{
	size_t bytes;
	void *memory;

	if (__builtin_mul_overflow(n, size, &bytes) ||
	    __builtin_add_overflow(bytes, SL_CHANNEL_LINE - 1, &bytes))
		return NULL;
	bytes -= bytes % SL_CHANNEL_LINE;
	memory = aligned_alloc(SL_CHANNEL_LINE, bytes);
	if (memory)
		memset(memory, 0, bytes);
	return memory;
}

static void release(struct sl_channel *channel)
{
	if (channel->item_fd >= 0)
		close(channel->item_fd);
	if (channel->room_fd >= 0)
		close(channel->room_fd);
	free(channel->stamps);
	free(channel->elements);
	free(channel);
}

static bool valid(const struct sl_channel_options *options)
{
	uint32_t capacity = options->capacity;

	return capacity && !(capacity & (capacity - 1)) && capacity <= SL_CHANNEL_CAPACITY_MAX &&
	       options->element_size && options->element_size <= SL_CHANNEL_ELEMENT_MAX &&
	       options->many <= 1 && !options->reserved && !(options->start & SL_CHANNEL_CLOSED);
}

/* 0 or a positive errno; what was made is in the channel. */
static int fill(struct sl_channel *channel, const struct sl_channel_options *options)
{
	uint32_t i;

	channel->elements = allocate(channel->capacity, channel->element_size);
	if (!channel->elements)
		return ENOMEM;
	if (options->many) {
		channel->stamps = allocate(channel->capacity, sizeof(*channel->stamps));
		if (!channel->stamps)
			return ENOMEM;
		/* As if the round before had been stamped. */
		for (i = 0; i < channel->capacity; i++) {
			uint64_t index = sl_channel_step(options->start, i);

			atomic_init(sl_channel_stamp_of(channel, index),
				    (sl_channel_stamp(index) - channel->capacity) &
					    SL_CHANNEL_INDEX);
		}
	}
	channel->item_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (channel->item_fd < 0)
		return errno;
	channel->room_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return channel->room_fd < 0 ? errno : 0;
}

struct sl_channel *sl_channel_new(const struct sl_channel_options *options, int *error)
{
	struct sl_channel *channel;

	*error = EINVAL;
	if (!valid(options))
		return NULL;
	*error = ENOMEM;
	channel = allocate(1, sizeof(*channel));
	if (!channel)
		return NULL;
	channel->item_fd = channel->room_fd = -1;
	channel->start = options->start;
	channel->capacity = options->capacity;
	channel->element_size = options->element_size;
	channel->tail_seen = options->start;
	atomic_init(&channel->tail, options->start);
	atomic_init(&channel->head, options->start);
	atomic_init(&channel->head_seen, options->start);
	atomic_init(&channel->references, 1);
	*error = fill(channel, options);
	if (*error) {
		release(channel);
		return NULL;
	}
	return channel;
}

struct sl_channel *sl_channel_hold(struct sl_channel *channel)
{
	/* Relaxed: who holds one reference can give another, nothing is ordered by it. */
	atomic_fetch_add_explicit(&channel->references, 1, memory_order_relaxed);
	return channel;
}

void sl_channel_free(struct sl_channel *channel)
{
	/* All that each holder did comes before (release), and is seen by (acquire), the last one. */
	if (channel &&
	    atomic_fetch_sub_explicit(&channel->references, 1, memory_order_acq_rel) == 1)
		release(channel);
}

static void copy_in(struct sl_channel *channel, uint64_t index, const uint8_t *from, uint32_t n)
{
	size_t size = channel->element_size;
	uint32_t slot = index & (channel->capacity - 1), first = channel->capacity - slot;

	if (n <= first) {
		memcpy(channel->elements + slot * size, from, n * size);
		return;
	}
	memcpy(channel->elements + slot * size, from, first * size);
	memcpy(channel->elements, from + first * size, (n - first) * size);
}

static void copy_out(const struct sl_channel *channel, uint64_t index, uint8_t *to, uint32_t n)
{
	size_t size = channel->element_size;
	uint32_t slot = index & (channel->capacity - 1), first = channel->capacity - slot;

	if (n <= first) {
		memcpy(to, channel->elements + slot * size, n * size);
		return;
	}
	memcpy(to, channel->elements + slot * size, first * size);
	memcpy(to + first * size, channel->elements, (n - first) * size);
}

/* Relaxed: a number for people; the loop is for several producers. */
static void raise_to(_Atomic uint64_t *mark, uint64_t level)
{
	uint64_t seen = atomic_load_explicit(mark, memory_order_relaxed);

	while (seen < level &&
	       !atomic_compare_exchange_weak_explicit(mark, &seen, level, memory_order_relaxed,
						      memory_order_relaxed))
		;
}

static uint32_t that_fit(uint64_t room, uint32_t n, bool whole)
{
	if (n <= room)
		return n;
	return whole ? 0 : (uint32_t)room;
}

static int put_alone(struct sl_channel *channel, const uint8_t *from, uint32_t n, bool whole)
{
	/* Relaxed: only this thread moves it, and whether it was closed is seen by A. */
	uint64_t tail = atomic_load_explicit(&channel->tail, memory_order_relaxed);
	uint64_t head = atomic_load_explicit(&channel->head_seen, memory_order_relaxed);
	uint32_t accepted;

	if (tail & SL_CHANNEL_CLOSED)
		return -EBADF;
	/* Also looks when it would just fit: so that the high-water mark of a full ring is true. */
	if (channel->capacity - sl_channel_distance(tail, head) > n) {
		accepted = n;
	} else {
		uint64_t used;

		head = atomic_load_explicit(&channel->head, memory_order_acquire); /* D */
		atomic_store_explicit(&channel->head_seen, head, memory_order_relaxed);
		used = sl_channel_distance(tail, head);
		accepted = that_fit(channel->capacity - used, n, whole);
		raise_to(&channel->put_high, used + accepted);
		if (!accepted)
			return 0;
	}
	copy_in(channel, tail, from, accepted);
	/* A.  It fails when it was closed meanwhile; nobody has seen the elements then. */
	if (!atomic_compare_exchange_strong_explicit(&channel->tail, &tail,
						     sl_channel_step(tail, accepted),
						     memory_order_seq_cst, memory_order_relaxed))
		return tail & SL_CHANNEL_CLOSED ? -EBADF : -EBUSY;
	return (int)accepted;
}

/* Takes slots; *tail is the first one's index.  Their number, 0: full, or -EBADF. */
static int reserve(struct sl_channel *channel, uint64_t *tail, uint32_t n, bool whole)
{
	*tail = atomic_load_explicit(&channel->tail, memory_order_acquire); /* E */
	for (;;) {
		uint64_t head =
			atomic_load_explicit(&channel->head_seen, memory_order_acquire); /* H */
		uint64_t used = sl_channel_distance(*tail, head), level = 0;
		uint32_t accepted = n;

		if (*tail & SL_CHANNEL_CLOSED)
			return -EBADF;
		if (used + n >= channel->capacity) { /* as in put_alone */
			head = atomic_load_explicit(&channel->head, memory_order_acquire); /* D */
			/* May put back an older one: there is then less room than there could be. */
			atomic_store_explicit(&channel->head_seen, head,
					      memory_order_release); /* H */
			used = sl_channel_distance(*tail, head);
			if (used > channel->capacity) { /* the consumer is already past this tail */
				*tail = atomic_load_explicit(&channel->tail, memory_order_acquire);
				continue;
			}
			accepted = that_fit(channel->capacity - used, n, whole);
			level = used + accepted;
		}
		/* E.  Weak would do, but a failure for no reason costs another look at the line. */
		if (!accepted || atomic_compare_exchange_strong_explicit(
					 &channel->tail, tail, sl_channel_step(*tail, accepted),
					 memory_order_acq_rel, memory_order_acquire)) {
			raise_to(&channel->put_high, level);
			return (int)accepted;
		}
	}
}

static int put_among_many(struct sl_channel *channel, const uint8_t *from, uint32_t n, bool whole)
{
	uint64_t tail;
	int accepted = reserve(channel, &tail, n, whole), i;

	if (accepted <= 0)
		return accepted;
	copy_in(channel, tail, from, (uint32_t)accepted);
	/* Relaxed: looked at only by who has seen the first one. */
	for (i = accepted - 1; i > 0; i--) {
		uint64_t index = sl_channel_step(tail, (uint64_t)i);

		atomic_store_explicit(sl_channel_stamp_of(channel, index), sl_channel_stamp(index),
				      memory_order_relaxed);
	}
	atomic_store_explicit(sl_channel_stamp_of(channel, tail), sl_channel_stamp(tail),
			      memory_order_seq_cst); /* F, W */
	return accepted;
}

int sl_channel_try_put(struct sl_channel *channel, const void *elements, uint32_t n, bool whole)
{
	/* What does not fit at all is cut off, or was refused: no copy goes twice round the ring. */
	if (n > channel->capacity)
		n = channel->capacity;
	return channel->stamps ? put_among_many(channel, elements, n, whole) :
				 put_alone(channel, elements, n, whole);
}

/* How many of the n slots from head on have their stamps. */
static uint32_t stamped(const struct sl_channel *channel, uint64_t head, uint32_t n)
{
	uint32_t i;

	for (i = 0; i < n; i++) {
		uint64_t index = sl_channel_step(head, i);

		if (atomic_load_explicit(sl_channel_stamp_of(channel, index),
					 memory_order_acquire) != sl_channel_stamp(index)) /* G */
			break;
	}
	return i;
}

int sl_channel_try_get(struct sl_channel *channel, void *elements, uint32_t n, bool whole)
{
	/* Relaxed: only this thread moves it. */
	uint64_t head = atomic_load_explicit(&channel->head, memory_order_relaxed);
	uint64_t there = sl_channel_distance(channel->tail_seen, head);
	uint32_t taken;
	bool closed = false;

	if (n > channel->capacity)
		n = channel->capacity;
	if (there < n) {
		uint64_t tail = atomic_load_explicit(&channel->tail, memory_order_acquire); /* B */

		closed = tail & SL_CHANNEL_CLOSED;
		channel->tail_seen = tail & SL_CHANNEL_INDEX;
		there = sl_channel_distance(tail, head);
		raise_to(&channel->get_high, there);
	}
	taken = there < n ? (uint32_t)there : n;
	if (channel->stamps)
		taken = stamped(channel, head, taken);
	if (whole && taken < n && !(closed && taken == there))
		return 0;
	if (!taken)
		return closed && there == 0 ? -EBADF : 0;
	copy_out(channel, head, elements, taken);
	atomic_store_explicit(&channel->head, sl_channel_step(head, taken),
			      memory_order_seq_cst); /* C */
	return (int)taken;
}

int sl_channel_put(struct sl_channel *channel, const void *elements, uint32_t n, int whole)
{
	int accepted;

	if (n > INT32_MAX || (whole && n > channel->capacity))
		return -EINVAL;
	if (!n)
		return 0;
	accepted = sl_channel_try_put(channel, elements, n, whole);
	if (accepted > 0)
		sl_channel_wake_consumer(channel);
	if (accepted >= 0 && (uint32_t)accepted < n)
		sl_channel_met_full(channel, n - (uint32_t)accepted);
	return accepted;
}

int sl_channel_get(struct sl_channel *channel, void *elements, uint32_t n, int whole)
{
	int taken;

	if (n > INT32_MAX || (whole && n > channel->capacity))
		return -EINVAL;
	if (!n)
		return 0;
	taken = sl_channel_try_get(channel, elements, n, whole);
	if (taken > 0)
		sl_channel_wake_producers(channel);
	if (taken < 0 || (uint32_t)taken < n)
		sl_channel_met_empty(channel, taken == 0);
	return taken;
}

void sl_channel_read_counters(const struct sl_channel *channel,
			      struct sl_channel_counters *counters)
{
	/* Head first: never more taken than put. */
	uint64_t head = atomic_load_explicit(&channel->head, memory_order_acquire);
	uint64_t tail = atomic_load_explicit(&channel->tail, memory_order_acquire);
	uint64_t high = atomic_load_explicit(&channel->put_high, memory_order_relaxed);

	counters->enqueued = sl_channel_distance(tail, channel->start);
	counters->dequeued = sl_channel_distance(head, channel->start);
	counters->waiting = sl_channel_distance(tail, head);
	counters->refused = atomic_load_explicit(&channel->refused, memory_order_relaxed);
	counters->full = atomic_load_explicit(&channel->full, memory_order_relaxed);
	counters->empty = atomic_load_explicit(&channel->empty, memory_order_relaxed);
	counters->high_water = atomic_load_explicit(&channel->get_high, memory_order_relaxed);
	if (high > counters->high_water)
		counters->high_water = high;
	counters->consumer_wakes =
		atomic_load_explicit(&channel->consumer_wakes, memory_order_relaxed);
	counters->producer_wakes =
		atomic_load_explicit(&channel->producer_wakes, memory_order_relaxed);
}
