// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>

#include "checksum.h"
#include "queue.h"
#include "queue_private.h"

/* Frames taken from the completion ring at a time; bounds the array on the stack. */
#define REAP_BATCH 64

/*
 * System calls in a row that may send nothing (socket buffer full, device busy)
 * before the rest is left for the next call; one takes about half a microsecond.
 */
#define KICKS_IN_VAIN 8

void sl_queue_complete(struct sl_queue *queue)
{
	uint32_t count, index, i, returned;
	uint64_t back[REAP_BATCH];

	while ((count = xsk_ring_cons__peek(&queue->completion, REAP_BATCH, &index))) {
		returned = 0;
		for (i = 0; i < count; i++) {
			uint64_t address = *xsk_ring_cons__comp_addr(&queue->completion, index + i);
			uint32_t frame = sl_frame_of(queue, address);
			struct sl_lane *lane;

			if (frame == UINT32_MAX ||
			    (queue->state[frame] & ~SL_LANE_BITS) != SL_TRANSMIT) {
				queue->broken = true;
				continue;
			}
			queue->frames.transmit--;
			queue->counters.completed++;
			if (frame >= queue->fill_frames) {
				queue->state[frame] = SL_FREE;
				queue->free_frames[queue->frames.free++] = frame;
				continue;
			}
			lane = &queue->lane[queue->state[frame] & SL_LANE_BITS];
			lane->held--;
			if (lane->muted)
				sl_queue_mute(queue, lane);
			queue->state[frame] = SL_KERNEL;
			back[returned++] = address;
		}
		xsk_ring_cons__release(&queue->completion, count);
		sl_queue_fill(queue, back, returned);
	}
}

/*
 * One call sends a bounded number (32 by default), so it is repeated until the ring is
 * empty or nothing moves.
 */
int sl_queue_kick(struct sl_queue *queue)
{
	uint32_t before, level, in_vain = 0;

	level = sl_ring_level(queue->transmit.producer, queue->transmit.consumer);
	while (level && xsk_ring_prod__needs_wakeup(&queue->transmit)) {
		queue->counters.kicks++;
		if (sendto(queue->transmit_fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0) {
			if (errno == ENXIO)
				return -ENXIO;
			if (errno == ENETDOWN)
				return 0;
		}
		/* A full completion ring is one of the reasons for not sending. */
		sl_queue_complete(queue);
		before = level;
		level = sl_ring_level(queue->transmit.producer, queue->transmit.consumer);
		if (level < before)
			in_vain = 0;
		else if (++in_vain == KICKS_IN_VAIN)
			break;
	}
	return 0;
}

void sl_queue_progress(struct sl_queue *queue)
{
	sl_queue_complete(queue);
	(void)sl_queue_kick(queue);
	sl_queue_wake(queue);
}

int sl_queue_reap(struct sl_queue *queue)
{
	int left;

	sl_lock(queue);
	if (!queue->closed)
		sl_queue_progress(queue);
	left = queue->closed ? -EBADF : (int)queue->frames.transmit;
	sl_unlock(queue);
	return left;
}

static int check_payloads(const struct sl_queue *queue, struct sl_template *const *built, bool many,
			  uint64_t size, const uint32_t *offsets, const uint32_t *lengths,
			  uint32_t count, uint32_t *bad)
{
	uint64_t at = 0;

	for (*bad = 0; *bad < count; ++*bad) {
		const struct sl_template *to = built[many ? *bad : 0];

		if (offsets)
			at = offsets[*bad];
		if (lengths[*bad] > sl_queue_longest(queue, to))
			return -EMSGSIZE;
		if (at + lengths[*bad] > size)
			return -EFAULT;
		at += lengths[*bad];
	}
	return 0;
}

static uint32_t room_now(struct sl_queue *queue, uint32_t wanted, bool frames)
{
	uint32_t room = xsk_prod_nb_free(&queue->transmit, wanted);

	if (frames && room > queue->frames.free)
		room = queue->frames.free;
	return room < wanted ? room : wanted;
}

uint32_t sl_queue_room(struct sl_queue *queue, uint32_t wanted, bool frames, int *error)
{
	uint32_t room = room_now(queue, wanted, frames);

	if (room == 0) {
		*error = sl_queue_kick(queue);
		room = room_now(queue, wanted, frames);
	}
	return room;
}

int sl_queue_send(struct sl_queue *queue, struct sl_template *const *built, uint32_t templates,
		  const uint8_t *data, uint64_t size, const uint32_t *offsets,
		  const uint32_t *lengths, uint32_t count, uint32_t *bad)
{
	uint32_t done = 0, room, index, i;
	uint64_t at = 0, summed = UINT64_MAX, sum = 0;
	bool many = templates > 1;
	int result;

	result = check_payloads(queue, built, many, size, offsets, lengths, count, bad);
	if (result)
		return result;
	sl_lock(queue);
	result = sl_queue_unusable(queue);
	if (result) {
		sl_unlock(queue);
		return result;
	}
	sl_queue_complete(queue);
	while (done < count && !result) {
		room = sl_queue_room(queue, count - done, true, &result);
		if (room == 0)
			break;
		if (!xsk_ring_prod__reserve(&queue->transmit, room, &index))
			break;
		for (i = 0; i < room; i++, done++) {
			struct xdp_desc *desc = xsk_ring_prod__tx_desc(&queue->transmit, index + i);
			uint32_t frame = queue->free_frames[--queue->frames.free];

			if (offsets)
				at = offsets[done];
			queue->state[frame] = SL_TRANSMIT;
			desc->addr = (uint64_t)frame << queue->frame_shift;
			desc->options = 0;
			if (at != summed || lengths[done] != lengths[done - 1]) {
				sum = sl_sum(data + at, lengths[done], 0);
				summed = at;
			}
			desc->len = sl_template_build(built[many ? done : 0],
						      queue->area + desc->addr, data + at,
						      lengths[done], sum);
			at += lengths[done];
		}
		xsk_ring_prod__submit(&queue->transmit, room);
		queue->frames.transmit += room;
		queue->counters.sent += room;
	}
	if (!result)
		result = sl_queue_kick(queue);
	sl_unlock(queue);
	/* What is in the ring will be sent when the interface is back; what is not, is an error. */
	return done || !result ? (int)done : result;
}

int sl_queue_echo(struct sl_batch *batch, int checksum)
{
	struct sl_queue *queue = batch->owner;
	uint32_t count = batch->count, sent = 0, refused = 0, index = 0, i;
	int result;

	sl_lock(queue);
	result = sl_queue_unusable(queue);
	if (result) {
		sl_unlock(queue);
		return result;
	}
	/* Afterwards all frames are "kernel" in the table, and no lane holds them. */
	result = sl_queue_give_back(queue, batch);
	if (result) {
		sl_unlock(queue);
		return result;
	}
	sl_queue_complete(queue);
	if (xsk_prod_nb_free(&queue->transmit, count) < count)
		(void)sl_queue_kick(queue);
	for (i = 0; i < count; i++) {
		uint64_t address = batch->addresses[i];
		struct xdp_desc *desc;
		uint32_t position;

		if (i + 8 < count) /* headers, written by the core that received them */
			__builtin_prefetch(queue->area + batch->addresses[i + 8], 1);
		if (xsk_prod_nb_free(&queue->transmit, 1) == 0 ||
		    sl_reverse(queue->area + address, batch->sizes[i], checksum)) {
			/* Refused ones gather in front, for the fill ring. */
			batch->addresses[refused++] = address;
			continue;
		}
		position = sl_queue_position(queue, batch->lanes[i]);
		/* Until it is sent, it counts as held by its lane. */
		queue->lane[position].held++;
		queue->state[sl_frame_of(queue, address)] = SL_TRANSMIT | position;
		xsk_ring_prod__reserve(&queue->transmit, 1, &index);
		desc = xsk_ring_prod__tx_desc(&queue->transmit, index);
		desc->addr = address;
		desc->len = batch->sizes[i];
		desc->options = 0;
		sent++;
	}
	if (sent)
		xsk_ring_prod__submit(&queue->transmit, sent);
	queue->frames.transmit += sent;
	queue->counters.sent += sent;
	queue->counters.echoed += sent;
	queue->counters.echo_refused += refused;
	sl_queue_fill(queue, batch->addresses, refused);
	for (i = 0; i < queue->lanes; i++)
		sl_queue_mute(queue, &queue->lane[i]);
	(void)sl_queue_kick(queue);
	sl_queue_wake(queue);
	batch->count = 0;
	sl_unlock(queue);
	return sent;
}
