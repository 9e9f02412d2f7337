// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "abi.h"
#include "busy_poll.h"
#include "queue.h"
#include "queue_private.h"

/*
 * How far ahead metadata is fetched, in packets.  The line was written by the
 * core that ran the XDP program: some 100 ns away, while decoding one takes 3 ns.
 */
#define PREFETCH_AHEAD 16

#define ONE 65536 /* a share of everything, and a packet's worth of credit */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/*
 * How much of the next batch each lane gets.  Higher lanes go first, but leave
 * to each lower one what its share has earned it; what a lane can't use is there
 * for the others.  Credit is kept in fractions of a packet, so that a share of
 * 5 % is one in twenty also for batches of one.
 */
static void plan(struct sl_queue *queue, uint32_t maximum, uint32_t *take)
{
	uint32_t waiting[SL_QUEUE_LANES], owed[SL_QUEUE_LANES];
	uint64_t owed_total = 0;
	uint32_t i, left = maximum;

	for (i = 0; i < queue->lanes; i++) {
		struct sl_lane *lane = &queue->lane[i];
		uint32_t room = lane->quota - lane->held;

		waiting[i] = sl_ring_waiting(&lane->rx);
		if (waiting[i] > room)
			waiting[i] = room;
		owed[i] = 0;
		if (waiting[i] == 0) {
			lane->credit = 0;
			continue;
		}
		if (i == 0)
			continue;
		lane->credit += (uint64_t)lane->share * maximum;
		/* What was not used is not saved up beyond one batch. */
		if (lane->credit > (uint64_t)lane->share * maximum + ONE)
			lane->credit = (uint64_t)lane->share * maximum + ONE;
		owed[i] = lane->credit / ONE;
		if (owed[i] > waiting[i])
			owed[i] = waiting[i];
		owed_total += owed[i];
	}
	for (i = 0; i < queue->lanes; i++) {
		struct sl_lane *lane = &queue->lane[i];
		uint32_t most;

		owed_total -= owed[i];
		most = owed_total < left ? left - owed_total : 0;
		take[i] = waiting[i] < most ? waiting[i] : most;
		left -= take[i];
		lane->credit -= (uint64_t)take[i] * ONE < lane->credit ? (uint64_t)take[i] * ONE :
									 lane->credit;
	}
}

/* Moves count packets of a lane into the batch at position at; how many were as they should be. */
static uint32_t move(struct sl_queue *queue, uint32_t position, struct sl_batch *batch, uint32_t at,
		     uint32_t count)
{
	struct sl_lane *lane = &queue->lane[position];
	uint8_t mine = SL_APPLICATION | position;
	uint64_t bytes = 0;
	uint32_t i, index;

	count = xsk_ring_cons__peek(&lane->rx, count, &index);
	for (i = 0; i < count; i++) {
		const struct xdp_desc *desc = xsk_ring_cons__rx_desc(&lane->rx, index + i);
		uint64_t address = desc->addr;
		uint32_t frame = sl_frame_of(queue, address), length = desc->len;
		uint32_t within = address & ((1U << queue->frame_shift) - 1);

		if (frame >= queue->fill_frames || queue->state[frame] != SL_KERNEL ||
		    length > (1U << queue->frame_shift) - within) {
			queue->broken = true;
			break;
		}
		queue->state[frame] = mine;
		batch->addresses[at + i] = address;
		batch->sizes[at + i] = length;
		bytes += length;
	}
	xsk_ring_cons__release(&lane->rx, count);
	memset(batch->lanes + at, lane->number, i);
	lane->held += i;
	lane->received += i;
	lane->received_bytes += bytes;
	queue->frames.kernel -= i;
	queue->frames.application[position] += i;
	return i;
}

int sl_queue_receive(struct sl_queue *queue, struct sl_batch *batch, uint32_t maximum)
{
	uint32_t take[SL_QUEUE_LANES] = { 0 }, count = 0, i;
	int result;

	if (maximum > batch->capacity)
		maximum = batch->capacity;
	sl_lock(queue);
	if (queue->closed || queue->broken) {
		result = queue->closed ? -EBADF : -EPROTO;
		sl_unlock(queue);
		return result;
	}
	if (queue->frames.transmit)
		sl_queue_progress(queue);
	batch->chained = 0;
	plan(queue, maximum, take);
	for (i = 0; i < queue->lanes && !queue->broken; i++) {
		if (take[i] == 0)
			continue;
		if (queue->longest)
			count += sl_chain_move(queue, i, batch, count, take[i]);
		else
			count += move(queue, i, batch, count, take[i]);
		if (queue->lane[i].held + queue->lane[i].needs > queue->lane[i].quota)
			sl_queue_mute(queue, &queue->lane[i]);
	}
	if (count) {
		batch->count = count;
		batch->data = queue->area;
		batch->data_size = queue->data_size;
		batch->received_ns = now_ns();
		batch->columns_ready = 0;
		batch->sources_ready = 0;
		batch->owner = queue;
	}
	sl_unlock(queue);
	return count;
}

void sl_queue_poll(struct sl_queue *queue)
{
	uint32_t i;

	sl_lock(queue);
	if (!queue->poll_us || queue->closed) {
		sl_unlock(queue);
		return;
	}
	/* Before Linux 6.13 a socket belongs to no queue before its first packet. */
	for (i = 0; i < queue->lanes && queue->polled < 0; i++) {
		if (sl_busy_poll_napi(queue->lane[i].fd))
			queue->polled = (int)i;
	}
	if (queue->polled >= 0) {
		/* Of AF_XDP this receives nothing, but polls the queue of all the lanes. */
		recvfrom(queue->lane[queue->polled].fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
		queue->counters.polls++;
	}
	sl_unlock(queue);
}

/* A packet at place whose program left no metadata: what its headers say, or all of it. */
static void from_headers(struct sl_batch *batch, uint32_t i, uint64_t place)
{
	struct sl_packet packet;

	batch->offsets[i] = place;
	batch->lengths[i] = batch->sizes[i];
	if (!sl_parse(batch->data + place, batch->sizes[i], &packet)) {
		batch->offsets[i] += packet.payload;
		batch->lengths[i] = packet.payload_length;
	}
	batch->times[i] = batch->received_ns;
	batch->peers[i] = 0;
	batch->kinds[i] = 0;
	batch->classes[i] = 0;
	batch->services[i] = 0;
}

void sl_queue_columns(struct sl_batch *batch)
{
	const struct sl_queue *queue = batch->owner;
	uint64_t within = (1U << queue->frame_shift) - 1;
	uint32_t i, count = batch->count;
	struct sluice_meta meta;

	for (i = 0; i < count; i++) {
		uint64_t address = batch->addresses[i], place = address;

		if (i + PREFETCH_AHEAD < count)
			__builtin_prefetch(batch->data + batch->addresses[i + PREFETCH_AHEAD] -
					   sizeof(meta));
		if (batch->chained)
			place = sl_chain_gather(queue, address);
		/* Metadata lies below the packet, but in the same frame. */
		if (queue->cookie == 0 || (address & within) < sizeof(meta)) {
			from_headers(batch, i, place);
			continue;
		}
		memcpy(&meta, batch->data + address - sizeof(meta), sizeof(meta));
		if (meta.cookie != queue->cookie ||
		    (uint32_t)meta.payload_offset + meta.payload_length > batch->sizes[i]) {
			from_headers(batch, i, place);
			continue;
		}
		batch->offsets[i] = place + meta.payload_offset;
		batch->lengths[i] = meta.payload_length;
		batch->times[i] = meta.time_ns ? meta.time_ns : batch->received_ns;
		batch->peers[i] = meta.peer;
		batch->kinds[i] = meta.kind;
		batch->classes[i] = meta.class_id;
		batch->services[i] = meta.service;
	}
	batch->columns_ready = 1;
}

void sl_queue_sources(struct sl_batch *batch)
{
	const struct sl_queue *queue = batch->owner;
	struct sl_packet packet;
	uint32_t i;

	for (i = 0; i < batch->count; i++) {
		const uint8_t *frame =
			batch->data + (batch->chained ? sl_chain_place(queue, batch->addresses[i]) :
							batch->addresses[i]);

		if (i + PREFETCH_AHEAD < batch->count)
			__builtin_prefetch(batch->data + batch->addresses[i + PREFETCH_AHEAD]);
		if (sl_parse(frame, batch->sizes[i], &packet))
			memset(&batch->sources[i], 0, sizeof(batch->sources[i]));
		else
			sl_parse_source(frame, &packet, &batch->sources[i]);
	}
	batch->sources_ready = 1;
}

int sl_queue_give_back(struct sl_queue *queue, struct sl_batch *batch)
{
	uint32_t counts[SL_QUEUE_LANES] = { 0 };
	uint32_t i;

	for (i = 0; i < batch->count; i++) {
		uint32_t frame = sl_frame_of(queue, batch->addresses[i]);
		uint8_t state = frame < queue->fill_frames ? queue->state[frame] : SL_FREE;

		if ((state & ~SL_LANE_BITS) != SL_APPLICATION)
			goto undo;
		queue->state[frame] = SL_KERNEL;
		counts[state & SL_LANE_BITS]++;
	}
	/* Not batch->chained: a part of a batch, made by hand, may not know. */
	if (queue->longest)
		sl_chain_give_back(queue, batch, counts);
	for (i = 0; i < queue->lanes; i++) {
		struct sl_lane *lane = &queue->lane[i];

		if (counts[i] == 0)
			continue;
		queue->frames.application[i] -= counts[i];
		lane->held -= counts[i];
		if (lane->muted && !queue->closed)
			sl_queue_mute(queue, lane);
	}
	return 0;
undo:
	while (i-- > 0) {
		/* The lane's number was written when the packet was received. */
		uint32_t position = sl_queue_position(queue, batch->lanes[i]);

		queue->state[sl_frame_of(queue, batch->addresses[i])] = SL_APPLICATION | position;
	}
	return -EINVAL;
}

int sl_queue_release(struct sl_batch *batch)
{
	struct sl_queue *queue = batch->owner;
	int error;

	sl_lock(queue);
	error = sl_queue_give_back(queue, batch);
	if (!error) {
		if (queue->closed) {
			queue->frames.kernel += batch->count;
			if (!sl_queue_held(queue))
				sl_queue_unmap(queue);
		} else {
			sl_queue_fill(queue, batch->addresses, batch->count);
			sl_queue_wake(queue);
		}
		batch->count = 0;
	}
	sl_unlock(queue);
	return error;
}
