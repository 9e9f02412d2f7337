// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "busy_poll.h"
#include "queue_private.h"
#include "umem.h"

static int failed(struct sl_error *error, int code, const char *step)
{
	error->code = -code;
	snprintf(error->step, sizeof(error->step), "%s", step);
	return code;
}

static int check_config(const struct sl_queue_config *config)
{
	uint64_t frames = (uint64_t)config->fill_frames + config->transmit_frames;
	uint64_t needed = 0;
	uint32_t i;

	if (config->lanes == 0 || config->lanes > SL_QUEUE_LANES)
		return -EINVAL;
	if (config->frame_size != 2048 && config->frame_size != 4096)
		return -EINVAL;
	/* Offsets in a batch have 32 bits. */
	if (frames * config->frame_size > UINT32_MAX || config->longest > SL_LONGEST)
		return -EINVAL;
	for (i = 0; i < config->lanes; i++) {
		if (config->lane[i].quota == 0 || config->lane[i].share > 65536)
			return -EINVAL;
		needed += (uint64_t)config->lane[i].ring + config->lane[i].quota;
	}
	if (needed > config->fill_frames || 2ULL * config->fill_frames > config->fill_ring)
		return -EINVAL;
	return 0;
}

/* Nobody has used the rings since they were made and the fill ring was filled. */
static bool fresh(const struct sl_queue *queue)
{
	uint32_t i;

	if (*queue->fill.producer != queue->fill_frames || *queue->transmit.producer != 0 ||
	    *queue->completion.consumer != 0)
		return false;
	for (i = 0; i < queue->lanes; i++) {
		if (*queue->lane[i].rx.consumer != 0)
			return false;
	}
	return true;
}

static int map_all(struct sl_queue *queue, const struct sl_queue_config *config,
		   struct sl_error *error)
{
	int first = config->lane[0].fd, code;
	uint64_t at;
	uint32_t i;

	code = sl_umem_map_with(config->umem_fd, queue->area_size, sl_chain_room(queue),
				&queue->area, &at);
	if (code)
		return failed(error, code, "mapping the UMEM");
	queue->data_size = at + sl_chain_room(queue);
	/* Offsets in a batch have 32 bits. */
	if (queue->data_size > UINT32_MAX)
		return failed(error, -EINVAL, "mapping room for packets in several frames");
	queue->slots_at = at;
	code = sl_map_producer(first, SL_RING_FILL, config->fill_ring, &queue->fill,
			       &queue->fill_map);
	if (code)
		return failed(error, code, "mapping the fill ring");
	code = sl_map_consumer(first, SL_RING_COMPLETION, config->completion_ring,
			       &queue->completion, &queue->completion_map);
	if (code)
		return failed(error, code, "mapping the completion ring");
	code = sl_map_producer(config->transmit_fd, SL_RING_TRANSMIT, config->transmit_ring,
			       &queue->transmit, &queue->transmit_map);
	if (code)
		return failed(error, code, "mapping the transmit ring");
	for (i = 0; i < config->lanes; i++) {
		code = sl_map_consumer(config->lane[i].fd, SL_RING_RECEIVE, config->lane[i].ring,
				       &queue->lane[i].rx, &queue->lane[i].map);
		if (code)
			return failed(error, code, "mapping a receive ring");
	}
	if (!fresh(queue))
		return failed(error, -EBUSY, "taking over the rings");
	return 0;
}

int sl_queue_begin(struct sl_queue *queue, uint32_t transmit_frames)
{
	uint32_t i;

	queue->frames.total = queue->fill_frames + transmit_frames;
	queue->frames.kernel = queue->fill_frames;
	queue->frames.free = transmit_frames;
	queue->state = malloc(queue->frames.total);
	queue->free_frames = malloc((transmit_frames + 1) * sizeof(*queue->free_frames));
	if (!queue->state || !queue->free_frames)
		return -ENOMEM;
	memset(queue->state, SL_KERNEL, queue->fill_frames);
	memset(queue->state + queue->fill_frames, SL_FREE, transmit_frames);
	for (i = 0; i < transmit_frames; i++)
		queue->free_frames[i] = queue->frames.total - 1 - i;
	pthread_mutex_init(&queue->lock, NULL);
	for (i = 0; i < SL_WATCHERS; i++)
		queue->watcher[i] = -1;
	queue->poll_us = sl_busy_poll_get(queue->lane[0].fd);
	queue->polled = -1;
	return sl_chain_begin(queue);
}

struct sl_queue *sl_queue_open(const struct sl_queue_config *config, struct sl_error *error)
{
	struct sl_queue *queue;
	uint32_t i;
	int code;

	memset(error, 0, sizeof(*error));
	code = check_config(config);
	if (code) {
		failed(error, code, "checking sizes of frames and rings");
		return NULL;
	}
	queue = calloc(1, sizeof(*queue));
	if (!queue) {
		failed(error, -ENOMEM, "making a queue");
		return NULL;
	}
	queue->area_size =
		((uint64_t)config->fill_frames + config->transmit_frames) * config->frame_size;
	queue->frame_shift = __builtin_ctz(config->frame_size);
	queue->fill_frames = config->fill_frames;
	queue->cookie = config->cookie;
	queue->longest = config->longest;
	queue->umem_fd = config->umem_fd;
	queue->transmit_fd = config->transmit_fd;
	queue->lanes = config->lanes;
	for (i = 0; i < config->lanes; i++) {
		queue->lane[i].fd = config->lane[i].fd;
		queue->lane[i].number = config->lane[i].number;
		queue->lane[i].quota = config->lane[i].quota;
		queue->lane[i].share = config->lane[i].share;
	}
	if (!map_all(queue, config, error)) {
		code = sl_queue_begin(queue, config->transmit_frames);
		if (!code)
			return queue;
		failed(error, code, "making the table of frames");
	}
	sl_queue_unmap(queue);
	sl_queue_free(queue);
	return NULL;
}

bool sl_queue_held(const struct sl_queue *queue)
{
	uint32_t i;

	for (i = 0; i < queue->lanes; i++) {
		if (queue->frames.application[i])
			return true;
	}
	return queue->frames.reserved > 0;
}

void sl_queue_unmap(struct sl_queue *queue)
{
	if (queue->area)
		sl_umem_unmap(queue->area, queue->data_size);
	queue->area = NULL;
}

static void unmap_rings(struct sl_queue *queue)
{
	uint32_t i;

	sl_unmap(&queue->fill_map);
	sl_unmap(&queue->completion_map);
	sl_unmap(&queue->transmit_map);
	for (i = 0; i < queue->lanes; i++)
		sl_unmap(&queue->lane[i].map);
}

void sl_queue_close(struct sl_queue *queue)
{
	uint32_t i;

	sl_lock(queue);
	if (!queue->closed) {
		queue->closed = true;
		unmap_rings(queue);
		for (i = 0; i < queue->lanes; i++)
			close(queue->lane[i].fd);
		close(queue->transmit_fd);
		close(queue->umem_fd);
		if (!sl_queue_held(queue))
			sl_queue_unmap(queue);
	}
	sl_unlock(queue);
}

void sl_queue_free(struct sl_queue *queue)
{
	/* Rings are still mapped only when opening failed. */
	unmap_rings(queue);
	free(queue->state);
	free(queue->free_frames);
	free(queue->pieces);
	free(queue->slots);
	free(queue);
}

void sl_queue_fill(struct sl_queue *queue, const uint64_t *addresses, uint32_t count)
{
	uint64_t base = ~(uint64_t)((1U << queue->frame_shift) - 1);
	uint32_t i, at;

	if (count == 0)
		return;
	/* There is always room: see the top of queue.h. */
	if (!xsk_ring_prod__reserve(&queue->fill, count, &at)) {
		queue->broken = true;
		return;
	}
	for (i = 0; i < count; i++)
		*xsk_ring_prod__fill_addr(&queue->fill, at + i) = addresses[i] & base;
	xsk_ring_prod__submit(&queue->fill, count);
	queue->frames.kernel += count;
}

void sl_queue_wake(struct sl_queue *queue)
{
	if (xsk_ring_prod__needs_wakeup(&queue->fill)) {
		queue->counters.wakeups++;
		/* Its result says nothing that matters here: sl_xsk_check asks separately. */
		(void)recvfrom(queue->lane[0].fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
	}
}

void sl_queue_mute(struct sl_queue *queue, struct sl_lane *lane)
{
	bool mute = lane->held + lane->needs > lane->quota;
	struct epoll_event event = { .events = mute ? 0 : EPOLLIN };
	uint32_t i;

	if (mute == lane->muted)
		return;
	lane->muted = mute;
	for (i = 0; i < SL_WATCHERS; i++) {
		if (queue->watcher[i] >= 0)
			epoll_ctl(queue->watcher[i], EPOLL_CTL_MOD, lane->fd, &event);
	}
}

void sl_queue_frames(struct sl_queue *queue, struct sl_frames *frames)
{
	sl_lock(queue);
	*frames = queue->frames;
	sl_unlock(queue);
}

void sl_queue_recount(struct sl_queue *queue, struct sl_frames *frames)
{
	uint32_t i;

	memset(frames, 0, sizeof(*frames));
	sl_lock(queue);
	frames->total = queue->frames.total;
	for (i = 0; i < queue->frames.total; i++) {
		switch (queue->state[i] & ~SL_LANE_BITS) {
		case SL_FREE:
			frames->free++;
			break;
		case SL_KERNEL:
			frames->kernel++;
			break;
		case SL_TRANSMIT:
			frames->transmit++;
			break;
		case SL_RESERVED:
			frames->reserved++;
			break;
		case SL_APPLICATION:
			frames->application[queue->state[i] & SL_LANE_BITS]++;
			break;
		}
	}
	sl_unlock(queue);
}

void sl_queue_counters(struct sl_queue *queue, struct sl_queue_counters *counters)
{
	uint32_t i;

	sl_lock(queue);
	*counters = queue->counters;
	for (i = 0; i < queue->lanes; i++) {
		struct sl_lane *lane = &queue->lane[i];

		counters->received[i] = lane->received;
		counters->received_bytes[i] = lane->received_bytes;
		counters->jumbo[i] = lane->jumbo;
		counters->too_long[i] = lane->too_long;
		if (!queue->closed)
			counters->waiting[i] = sl_ring_level(lane->rx.producer, lane->rx.consumer);
	}
	sl_unlock(queue);
}

int sl_queue_socket(struct sl_queue *queue, uint32_t lane)
{
	int fd = -1;

	sl_lock(queue);
	if (!queue->closed && lane < queue->lanes)
		fd = queue->lane[lane].fd;
	sl_unlock(queue);
	return fd;
}

int sl_queue_transmit_socket(struct sl_queue *queue)
{
	int fd;

	sl_lock(queue);
	fd = queue->closed ? -1 : queue->transmit_fd;
	sl_unlock(queue);
	return fd;
}
