// SPDX-License-Identifier: Apache-2.0
/*
 * What an element of a channel costs: the last part of ring_stress.c, printed and not
 * judged.  Nanoseconds an element, 8 bytes each, in a ring of 1,024:
 *
 *      one thread   a put and a get of a batch, by turns: the instructions alone
 *      threads      producers and a consumer that never sleep, on cores of their own as far
 *                   as there are any: time from the first to the last element
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "channel.h"

#define CAPACITY 1024
#define LARGEST 64

static const uint32_t batches[] = { 1, 16, LARGEST };

struct flow {
	struct sl_channel *channel;
	uint64_t count;
	uint32_t batch;
};

void ring_bench(uint64_t elements);

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static struct sl_channel *make(bool many)
{
	struct sl_channel_options options = { .capacity = CAPACITY,
					      .element_size = 8,
					      .many = many };
	int error;
	struct sl_channel *channel = sl_channel_new(&options, &error);

	if (!channel)
		exit(1);
	return channel;
}

static void put_all(const struct flow *flow)
{
	uint64_t block[LARGEST] = { 0 }, left = flow->count;

	while (left) {
		uint32_t n = left < flow->batch ? (uint32_t)left : flow->batch;
		int result = sl_channel_put(flow->channel, block, n, 0);

		if (result < 0)
			exit(1);
		if (!result)
			sched_yield();
		left -= (uint32_t)result;
	}
}

static void *put_in_thread(void *argument)
{
	put_all(argument);
	return NULL;
}

static void get_all(const struct flow *flow, uint64_t left)
{
	uint64_t block[LARGEST];

	while (left) {
		int result = sl_channel_get(flow->channel, block, flow->batch, 0);

		if (result < 0)
			exit(1);
		if (!result)
			sched_yield();
		left -= (uint32_t)result;
	}
}

static double one_thread(bool many, uint32_t batch, uint64_t count)
{
	struct flow flow = { make(many), batch, batch };
	uint64_t done;
	double begun = now();

	for (done = 0; done < count; done += batch) {
		put_all(&flow);
		get_all(&flow, batch);
	}
	sl_channel_free(flow.channel);
	return (now() - begun) / (double)done;
}

static double threads(uint32_t producers, bool many, uint32_t batch, uint64_t count)
{
	struct flow flow = { make(many), count / producers, batch };
	pthread_t thread[2];
	double begun = now();
	uint32_t i;

	for (i = 0; i < producers; i++) {
		if (pthread_create(&thread[i], NULL, put_in_thread, &flow))
			exit(1);
	}
	get_all(&flow, flow.count * producers);
	for (i = 0; i < producers; i++)
		pthread_join(thread[i], NULL);
	sl_channel_free(flow.channel);
	return (now() - begun) / (double)(flow.count * producers);
}

void ring_bench(uint64_t elements)
{
	uint32_t i;

	printf("ns an element       one thread       threads: 1 to 1   1 to 1    2 to 1\n"
	       "batch             one     many              one     many      many\n");
	for (i = 0; i < sizeof(batches) / sizeof(*batches); i++)
		printf("%5u        %8.1f %8.1f         %8.1f %8.1f  %8.1f\n", batches[i],
		       one_thread(false, batches[i], elements),
		       one_thread(true, batches[i], elements),
		       threads(1, false, batches[i], elements),
		       threads(1, true, batches[i], elements),
		       threads(2, true, batches[i], elements));
}
