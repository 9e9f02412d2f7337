// SPDX-License-Identifier: Apache-2.0
/* The slow side of a channel: sleeping, waking, closing.  Letters, steps and rules are those of channel.h. */
#define _GNU_SOURCE
#include "channel_private.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Longer than anybody waits, ns: a year.  Keeps a deadline within 64 bits. */
#define LONGEST_WAIT (365LL * 86400 * 1000000000)

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void count(_Atomic uint64_t *counter, uint64_t n)
{
	/* Relaxed: a number for people. */
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* Step d. */
static void write_event(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) != sizeof(one))
		abort(); /* it is full only after 2^64 - 1 of them without a read */
}

/* Step 1. */
static void read_empty(int fd)
{
	uint64_t events;

	if (read(fd, &events, sizeof(events)) < 0 && errno != EAGAIN && errno != EINTR)
		abort(); /* the descriptor is ours and open */
}

/* Steps c and d; by R1 in this order. */
static void wake_up(_Atomic uint32_t *asleep, int fd, _Atomic uint64_t *wakes)
{
	if (atomic_exchange_explicit(asleep, 0, memory_order_seq_cst)) { /* W */
		count(wakes, 1);
		write_event(fd);
	}
}

void sl_channel_wake_up_consumer(struct sl_channel *channel)
{
	wake_up(&channel->consumer_asleep, channel->item_fd, &channel->consumer_wakes);
}

void sl_channel_wake_up_producers(struct sl_channel *channel)
{
	wake_up(&channel->producer_asleep, channel->room_fd, &channel->producer_wakes);
}

/* Step 3: a get would give something, or say that it is closed. */
static bool something_to_get(const struct sl_channel *channel)
{
	uint64_t head = atomic_load_explicit(&channel->head, memory_order_relaxed), tail;
	bool closed;

	if (channel->stamps &&
	    atomic_load_explicit(sl_channel_stamp_of(channel, head), memory_order_seq_cst) ==
		    sl_channel_stamp(head)) /* W */
		return true;
	tail = atomic_load_explicit(&channel->tail, memory_order_seq_cst); /* W */
	closed = tail & SL_CHANNEL_CLOSED;
	/* With stamps, what is only reserved is waited for; closed does not change that. */
	if (channel->stamps)
		return closed && sl_channel_distance(tail, head) == 0;
	return closed || sl_channel_distance(tail, head) != 0;
}

/* Step 3: a put of one element would be accepted, or told that it is closed. */
static bool room_to_put(const struct sl_channel *channel)
{
	uint64_t tail = atomic_load_explicit(&channel->tail, memory_order_acquire);
	uint64_t head = atomic_load_explicit(&channel->head, memory_order_seq_cst); /* W */

	/* Of many producers' tail and head, the later head may be further: then there is room too. */
	return tail & SL_CHANNEL_CLOSED || sl_channel_distance(tail, head) != channel->capacity;
}

bool sl_channel_consumer_may_sleep(struct sl_channel *channel)
{
	read_empty(channel->item_fd);
	atomic_store_explicit(&channel->consumer_asleep, 1, memory_order_seq_cst); /* W */
	if (!something_to_get(channel))
		return true;
	/* R2.  Not counted: nobody was asleep. */
	atomic_store_explicit(&channel->consumer_asleep, 0, memory_order_seq_cst);
	write_event(channel->item_fd);
	return false;
}

bool sl_channel_producer_may_sleep(struct sl_channel *channel)
{
	read_empty(channel->room_fd);
	atomic_store_explicit(&channel->producer_asleep, 1, memory_order_seq_cst); /* W */
	if (!room_to_put(channel))
		return true;
	atomic_store_explicit(&channel->producer_asleep, 0, memory_order_seq_cst);
	write_event(channel->room_fd);
	return false;
}

void sl_channel_met_full(struct sl_channel *channel, uint32_t refused)
{
	count(&channel->full, 1);
	count(&channel->refused, refused);
	/* Relaxed: who sets it goes through the steps itself. */
	if (atomic_load_explicit(&channel->room_watched, memory_order_relaxed))
		sl_channel_producer_may_sleep(channel);
}

void sl_channel_met_empty(struct sl_channel *channel, bool none)
{
	if (none)
		count(&channel->empty, 1);
	if (atomic_load_explicit(&channel->items_watched, memory_order_relaxed))
		sl_channel_consumer_may_sleep(channel);
}

int sl_channel_item_fd(struct sl_channel *channel)
{
	/* Relaxed: of the two sides only the consumer's own gets ask for it. */
	if (!atomic_exchange_explicit(&channel->items_watched, true, memory_order_relaxed))
		sl_channel_consumer_may_sleep(channel);
	return channel->item_fd;
}

int sl_channel_room_fd(struct sl_channel *channel)
{
	if (!atomic_exchange_explicit(&channel->room_watched, true, memory_order_relaxed))
		sl_channel_producer_may_sleep(channel);
	return channel->room_fd;
}

/* When a wait that begins now is over, ns of CLOCK_MONOTONIC; INT64_MAX: never. */
static int64_t end_of(double timeout)
{
	if (timeout < 0)
		return INT64_MAX;
	return now_ns() + (timeout < LONGEST_WAIT / 1e9 ? (int64_t)(timeout * 1e9) : LONGEST_WAIT);
}

/* Step 4.  1: readable, 0: the time is over, or -EINTR. */
static int sleep_until(int fd, int64_t end)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN };
	struct timespec left = { 0, 0 };
	int result;

	if (end != INT64_MAX) {
		int64_t ns = end - now_ns();

		if (ns <= 0)
			return 0;
		left.tv_sec = ns / 1000000000;
		left.tv_nsec = ns % 1000000000;
	}
	result = ppoll(&polled, 1, end == INT64_MAX ? NULL : &left, NULL);
	return result < 0 ? -errno : result;
}

int sl_channel_put_wait(struct sl_channel *channel, const void *elements, uint32_t n,
			double timeout)
{
	const uint8_t *from = elements;
	uint32_t done = 0;
	int64_t end = 0;
	int result = 1; /* of the sleep: the first look is not the last */
	bool full = false;

	if (n > INT32_MAX)
		return -EINVAL;
	while (done < n) {
		int accepted = sl_channel_try_put(
			channel, from + (size_t)done * channel->element_size, n - done, false);

		if (accepted > 0) {
			sl_channel_wake_consumer(channel);
			done += (uint32_t)accepted;
			continue;
		}
		if (accepted < 0) {
			result = accepted;
			break;
		}
		if (!full) {
			full = true;
			end = end_of(timeout);
		}
		if (result == 0) {
			sl_channel_met_full(channel, n - done);
			return (int)done;
		}
		if (!sl_channel_producer_may_sleep(channel))
			continue;
		result = sleep_until(channel->room_fd, end);
		if (result < 0)
			break;
	}
	if (full)
		count(&channel->full, 1);
	return done || result > 0 ? (int)done : result;
}

int sl_channel_get_wait(struct sl_channel *channel, void *elements, uint32_t n, double timeout)
{
	int64_t end = 0;
	int taken, result = 1;
	bool first = true;

	if (n > INT32_MAX)
		return -EINVAL;
	if (!n)
		return 0;
	for (;;) {
		taken = sl_channel_try_get(channel, elements, n, false);
		if (taken || result == 0)
			break;
		if (first) {
			first = false;
			end = end_of(timeout);
		}
		if (!sl_channel_consumer_may_sleep(channel))
			continue;
		result = sleep_until(channel->item_fd, end);
		if (result < 0)
			return result;
	}
	if (taken > 0)
		sl_channel_wake_producers(channel);
	if (taken < 0 || (uint32_t)taken < n)
		sl_channel_met_empty(channel, taken == 0);
	return taken;
}

void sl_channel_close(struct sl_channel *channel)
{
	/* Seq_cst, as A: after it no element comes.  Then both wake, whether they said that they sleep or not. */
	uint64_t tail =
		atomic_fetch_or_explicit(&channel->tail, SL_CHANNEL_CLOSED, memory_order_seq_cst);

	if (tail & SL_CHANNEL_CLOSED)
		return;
	write_event(channel->item_fd);
	write_event(channel->room_fd);
}

int sl_channel_closed(const struct sl_channel *channel)
{
	return (atomic_load_explicit(&channel->tail, memory_order_acquire) & SL_CHANNEL_CLOSED) !=
	       0;
}
