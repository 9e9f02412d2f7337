// SPDX-License-Identifier: Apache-2.0
/*
 * Channels (userspace/native/channel.h) under stress, to be built with and without
 * sanitizers:
 *
 *     ring_stress SEED ROUNDS
 *
 * One thread against a model; 1 to 3 producers and a consumer, checking order, loss
 * and duplication; sleeping and waking, by waiting calls and by poll; closing and
 * freeing at any moment; and at the end what an element costs.  A thread that is not
 * woken within WATCHDOG has been forgotten.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "channel.h"

#define EXPECT(condition)                                                               \
	do {                                                                            \
		if (!(condition)) {                                                     \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			fflush(NULL);                                                   \
			_Exit(1);                                                       \
		}                                                                       \
	} while (0)

/* Seconds; far beyond what a loaded machine keeps a thread waiting.  Less where one is meant to be forgotten. */
#ifndef WATCHDOG
#define WATCHDOG 60
#endif

#define PRODUCERS_MAX 3
#define BATCH_MAX 80

/* Each thread has its own: xorshift64. */
struct draws {
	uint64_t state;
};

static uint32_t draw(struct draws *draws, uint32_t below)
{
	draws->state ^= draws->state << 13;
	draws->state ^= draws->state >> 7;
	draws->state ^= draws->state << 17;
	return (draws->state >> 32) % below;
}

static struct draws branch(struct draws *draws)
{
	struct draws made = { (uint64_t)draw(draws, UINT32_MAX) << 20 | 1 };

	return made;
}

/* Where indices wrap, where a mask of 32 bits would, and the usual. */
static uint64_t any_start(struct draws *draws)
{
	switch (draw(draws, 3)) {
	case 0:
		return (1ULL << 63) - 1 - draw(draws, 100);
	case 1:
		return (1ULL << 32) - 1 - draw(draws, 100);
	default:
		return 0;
	}
}

static struct sl_channel *make(uint32_t capacity, uint32_t size, bool many, uint64_t start)
{
	struct sl_channel_options options = {
		.capacity = capacity, .element_size = size, .many = many, .start = start
	};
	struct sl_channel *channel;
	int error;

	channel = sl_channel_new(&options, &error);
	EXPECT(channel && !error);
	return channel;
}

/* An element of the given size that says its value; what is beyond 8 bytes depends on it. */
static void write_element(uint8_t *element, uint32_t size, uint64_t value)
{
	uint32_t i;

	for (i = 0; i < size; i++)
		element[i] = (uint8_t)(i < 8 ? value >> 8 * i : value * 31 + i);
}

static uint64_t read_element(const uint8_t *element, uint32_t size)
{
	uint64_t value = 0;
	uint32_t i;

	for (i = 0; i < size && i < 8; i++)
		value |= (uint64_t)element[i] << 8 * i;
	for (; i < size; i++)
		EXPECT(element[i] == (uint8_t)(value * 31 + i));
	return value;
}

static void check_options(void)
{
	static const struct sl_channel_options bad[] = {
		{ .capacity = 0, .element_size = 8 },
		{ .capacity = 3, .element_size = 8 },
		{ .capacity = 2U * SL_CHANNEL_CAPACITY_MAX, .element_size = 8 },
		{ .capacity = 1U << 31, .element_size = 64 },
		{ .capacity = 8, .element_size = 0 },
		{ .capacity = 8, .element_size = SL_CHANNEL_ELEMENT_MAX + 1 },
		{ .capacity = 8, .element_size = 8, .many = 2 },
		{ .capacity = 8, .element_size = 8, .reserved = 1 },
		{ .capacity = 8, .element_size = 8, .start = 1ULL << 63 },
	};
	struct sl_channel *channel = make(8, 8, false, 0);
	uint64_t element = 0;
	uint32_t i;
	int error;

	for (i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		error = 0;
		EXPECT(!sl_channel_new(&bad[i], &error) && error == EINVAL);
	}
	EXPECT(sl_channel_put(channel, &element, 9, 1) == -EINVAL);
	EXPECT(sl_channel_get(channel, &element, 9, 1) == -EINVAL);
	EXPECT(sl_channel_put(channel, &element, 1U << 31, 0) == -EINVAL);
	EXPECT(sl_channel_get(channel, &element, 1U << 31, 0) == -EINVAL);
	EXPECT(sl_channel_put_wait(channel, &element, 1U << 31, 0) == -EINVAL);
	EXPECT(sl_channel_get_wait(channel, &element, 1U << 31, 0) == -EINVAL);
	EXPECT(sl_channel_put(channel, NULL, 0, 0) == 0 &&
	       sl_channel_get(channel, NULL, 0, 1) == 0);
	sl_channel_free(channel);
	sl_channel_free(NULL);
}

/* One thread.  The model is two numbers: what was put is what follows what was got. */
static void check_model(struct draws *draws, uint32_t rounds)
{
	uint32_t capacity = 1U << draw(draws, 7), size = 1 + draw(draws, SL_CHANNEL_ELEMENT_MAX), i;
	struct sl_channel *channel = make(capacity, size, draw(draws, 2), any_start(draws));
	uint64_t mask = size < 8 ? (1ULL << 8 * size) - 1 : UINT64_MAX;
	uint64_t put = 0, got = 0, refused = 0, most = 0;
	struct sl_channel_counters counters;
	bool closed = false;

	while (rounds--) {
		uint32_t n = 1 + draw(draws, BATCH_MAX), expected;
		/* Just as large as said, so that one byte too far is seen. */
		uint8_t *block = malloc((size_t)n * size);
		bool whole = n <= capacity && draw(draws, 2);
		int result;

		if (draw(draws, 2)) {
			expected = capacity - (uint32_t)(put - got);
			expected = n <= expected ? n : whole ? 0 : expected;
			for (i = 0; i < n; i++)
				write_element(block + (size_t)i * size, size, (put + i) & mask);
			result = whole || draw(draws, 2) ?
					 sl_channel_put(channel, block, n, whole) :
					 sl_channel_put_wait(channel, block, n, 0);
			EXPECT(result == (closed ? -EBADF : (int)expected));
			if (!closed) {
				put += expected;
				refused += n - expected;
			}
			most = put - got > most ? put - got : most;
		} else {
			expected = (uint32_t)(put - got);
			expected = n <= expected ? n : whole && !closed ? 0 : expected;
			result = whole || draw(draws, 2) ?
					 sl_channel_get(channel, block, n, whole) :
					 sl_channel_get_wait(channel, block, n, 0);
			EXPECT(result == (closed && put == got ? -EBADF : (int)expected));
			for (i = 0; i < expected; i++)
				EXPECT(read_element(block + (size_t)i * size, size) ==
				       ((got + i) & mask));
			got += expected;
		}
		free(block);
		if (rounds == 10)
			sl_channel_close(channel);
		closed = closed || rounds == 10;
		EXPECT(sl_channel_closed(channel) == closed);
		sl_channel_read_counters(channel, &counters);
		EXPECT(counters.enqueued == put && counters.dequeued == got);
		EXPECT(counters.waiting == put - got && counters.refused == refused);
		EXPECT(counters.high_water <= most &&
		       (most < capacity || counters.high_water == most));
	}
	sl_channel_free(channel);
}

/* Threads. */

enum manner { TRYING, WAITING, POLLING, MANNERS };

struct job {
	struct sl_channel *channel;
	struct draws draws;
	uint32_t size, number;
	uint64_t count;    /* elements to put */
	uint64_t accepted; /* of them */
	uint64_t refused;  /* by puts that did not wait; those that wait give up on nothing */
	enum manner manner;
};

static uint64_t element_of(uint32_t producer, uint64_t number)
{
	return (uint64_t)producer << 48 | number;
}

static double seconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* With a timeout, for the elements may be there when it is over; they must not have come by that. */
static int get_in_time(struct sl_channel *channel, void *elements, uint32_t n)
{
	double begun = seconds();
	int result = sl_channel_get_wait(channel, elements, n, WATCHDOG);

	EXPECT(result && seconds() - begun < WATCHDOG);
	return result;
}

static int put_in_time(struct sl_channel *channel, const void *elements, uint32_t n)
{
	double begun = seconds();
	int result = sl_channel_put_wait(channel, elements, n, WATCHDOG);

	EXPECT(result && seconds() - begun < WATCHDOG);
	/* Some may have been accepted before it was closed. */
	EXPECT(result == (int)n || sl_channel_closed(channel));
	return result;
}

static void wait_readable(int fd)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN };

	EXPECT(poll(&polled, 1, WATCHDOG * 1000) == 1);
}

static void *produce(void *argument)
{
	struct job *job = argument;
	uint8_t block[BATCH_MAX * SL_CHANNEL_ELEMENT_MAX];

	while (job->accepted < job->count) {
		uint32_t n = 1 + draw(&job->draws, draw(&job->draws, 4) ? 4 : BATCH_MAX), i;
		int result;

		if (n > job->count - job->accepted)
			n = (uint32_t)(job->count - job->accepted);
		for (i = 0; i < n; i++)
			write_element(block + (size_t)i * job->size, job->size,
				      element_of(job->number, job->accepted + i));
		if (job->manner == WAITING) {
			result = put_in_time(job->channel, block, n);
		} else {
			result = sl_channel_put(job->channel, block, n, 0);
			if (result >= 0)
				job->refused += n - (uint32_t)result;
			if (result == 0 && job->manner == POLLING)
				wait_readable(sl_channel_room_fd(job->channel));
			else if (result == 0)
				sched_yield();
		}
		if (result < 0) {
			EXPECT(result == -EBADF);
			break;
		}
		job->accepted += (uint32_t)result;
	}
	sl_channel_free(job->channel);
	return NULL;
}

/* Until closed, or *left elements have come; seen[] is the next number of each producer. */
static void consume(struct job *job, uint64_t *seen, uint64_t left)
{
	uint8_t block[BATCH_MAX * SL_CHANNEL_ELEMENT_MAX];

	while (left) {
		uint32_t n = 1 + draw(&job->draws, draw(&job->draws, 4) ? 4 : BATCH_MAX), i;
		int result;

		if (n > left)
			n = (uint32_t)left;
		if (job->manner == WAITING) {
			result = get_in_time(job->channel, block, n);
		} else {
			result = sl_channel_get(job->channel, block, n, 0);
			if (result == 0 && job->manner == POLLING)
				wait_readable(sl_channel_item_fd(job->channel));
			else if (result == 0)
				sched_yield();
		}
		if (result < 0) {
			EXPECT(result == -EBADF);
			return;
		}
		left -= (uint32_t)result;
		for (i = 0; i < (uint32_t)result; i++) {
			uint64_t value = read_element(block + (size_t)i * job->size, job->size);

			EXPECT(value >> 48 < PRODUCERS_MAX);
			EXPECT((value & ((1ULL << 48) - 1)) == seen[value >> 48]++);
		}
	}
}

/*
 * Producers and a consumer.  With closing, the channel is closed when half of all has
 * come or at any moment; what was accepted must come all the same.
 */
static void check_threads(struct draws *draws, uint64_t count, bool closing)
{
	uint32_t producers = 1 + draw(draws, PRODUCERS_MAX), size = 8 + draw(draws, 57), i;
	uint32_t capacity = 1U << draw(draws, 8);
	struct sl_channel *channel =
		make(capacity, size, producers > 1 || draw(draws, 2), any_start(draws));
	struct job jobs[PRODUCERS_MAX], consumer = {
		channel, branch(draws), size, 0, 0, 0, 0, (enum manner)draw(draws, MANNERS)
	};
	uint64_t seen[PRODUCERS_MAX] = { 0 }, put = 0, refused = 0;
	struct sl_channel_counters counters;
	pthread_t threads[PRODUCERS_MAX];

	for (i = 0; i < producers; i++) {
		jobs[i] = (struct job){
			sl_channel_hold(channel),         branch(draws), size, i, count, 0, 0,
			(enum manner)draw(draws, MANNERS)
		};
		EXPECT(!pthread_create(&threads[i], NULL, produce, &jobs[i]));
	}
	if (closing) {
		consume(&consumer, seen, draw(draws, (uint32_t)(producers * count)));
		sl_channel_close(channel);
	}
	consume(&consumer, seen, closing ? UINT64_MAX : producers * count);
	for (i = 0; i < producers; i++) {
		EXPECT(!pthread_join(threads[i], NULL));
		EXPECT(seen[i] == jobs[i].accepted && (closing || seen[i] == count));
		put += jobs[i].accepted;
		refused += jobs[i].refused;
	}
	sl_channel_read_counters(channel, &counters);
	EXPECT(counters.enqueued == put && counters.dequeued == put && !counters.waiting);
	EXPECT(counters.high_water <= capacity && (put == 0 || counters.high_water > 0));
	EXPECT(counters.refused == refused && (refused == 0 || counters.full > 0));
	EXPECT(!counters.full || counters.high_water == capacity);
	sl_channel_free(channel);
}

/*
 * Two threads that wake each other at every step: a token there and back is two sleeps.
 */
struct courts {
	struct sl_channel *there, *back;
	uint64_t count;
};

static void *answer(void *argument)
{
	struct courts *courts = argument;
	uint64_t i, token;

	for (i = 0; i < courts->count; i++) {
		EXPECT(get_in_time(courts->there, &token, 1) == 1);
		EXPECT(put_in_time(courts->back, &token, 1) == 1);
	}
	return NULL;
}

static void check_wakes(struct draws *draws, uint64_t count, bool many)
{
	uint32_t spin;
	struct courts courts = { make(1, 8, many, any_start(draws)), make(1, 8, many, 0), count };
	struct sl_channel_counters counters;
	uint64_t i, token;
	pthread_t thread;

	EXPECT(!pthread_create(&thread, NULL, answer, &courts));
	for (i = 0; i < count; i++) {
		EXPECT(put_in_time(courts.there, &i, 1) == 1);
		/* Meets the other one at different points of its way to sleep. */
		for (spin = draw(draws, 2000); spin; spin--)
			__asm__ volatile("");
		EXPECT(get_in_time(courts.back, &token, 1) == 1);
		EXPECT(token == i);
	}
	EXPECT(!pthread_join(thread, NULL));
	sl_channel_read_counters(courts.there, &counters);
	EXPECT(counters.consumer_wakes <= count);
	printf("wakes, %s: %lu of %lu tokens\n", many ? "many producers" : "one producer",
	       (unsigned long)counters.consumer_wakes, (unsigned long)count);
	sl_channel_free(courts.there);
	sl_channel_free(courts.back);
}

/* Both sides sleep, the ring is closed and freed under them: the last one out frees. */
static void *sleep_for_item(void *argument)
{
	uint64_t token;

	EXPECT(get_in_time(argument, &token, 1) == -EBADF);
	sl_channel_free(argument);
	return NULL;
}

static void *sleep_for_room(void *argument)
{
	uint64_t tokens[2] = { 1, 2 };

	EXPECT(put_in_time(argument, tokens, 2) <= 1);
	sl_channel_free(argument);
	return NULL;
}

static void check_free(struct draws *draws)
{
	struct sl_channel *empty = make(1, 8, draw(draws, 2), 0), *full = make(1, 8, true, 0);
	pthread_t threads[3];
	uint32_t i;

	EXPECT(!pthread_create(&threads[0], NULL, sleep_for_item, sl_channel_hold(empty)));
	for (i = 1; i < 3; i++)
		EXPECT(!pthread_create(&threads[i], NULL, sleep_for_room, sl_channel_hold(full)));
	for (i = draw(draws, 3); i; i--)
		sched_yield();
	sl_channel_close(empty);
	sl_channel_close(full);
	sl_channel_close(full);
	sl_channel_free(empty);
	sl_channel_free(full);
	for (i = 0; i < 3; i++)
		EXPECT(!pthread_join(threads[i], NULL));
}

/* ring_bench.c */
void ring_bench(uint64_t elements);

int main(int argc, char **argv)
{
	struct draws draws;
	uint32_t rounds, i;

	if (argc != 3)
		return 2;
	draws.state = strtoull(argv[1], NULL, 0) | 1;
	rounds = strtoul(argv[2], NULL, 0);
	check_options();
	for (i = 0; i < rounds; i++)
		check_model(&draws, 200);
	for (i = 0; i < rounds; i++)
		check_threads(&draws, 500, i & 1);
	check_wakes(&draws, rounds * 50ULL, false);
	check_wakes(&draws, rounds * 50ULL, true);
	for (i = 0; i < rounds; i++)
		check_free(&draws);
	printf("%u rounds: nothing lost, nothing twice, all in order, all woken\n", rounds);
	ring_bench(rounds * 2000ULL);
	return 0;
}
