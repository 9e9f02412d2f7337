// SPDX-License-Identifier: Apache-2.0
/*
 * Packets in several frames (jumbo frames; AF_XDP's multi-buffer, XDP_USE_SG).
 *
 * The kernel writes such a packet as a row of descriptors, all but the last with
 * XDP_PKT_CONTD.  Each frame of it counts as held by the lane until the packet is
 * given back.  Columns are one offset and one length, so the pieces are copied
 * together, once, into a slot behind the frames, when columns are asked for.
 *
 * A lane has half as many slots as frames that it may hold.  A packet that needs a
 * slot has two frames or more, so a lane never lacks one, and never needs another
 * lane's.
 */
#include <errno.h>
#include <linux/if_xdp.h>
#include <stdlib.h>
#include <string.h>

#include "queue.h"
#include "queue_private.h"

/* Newer than the oldest headers this is built with; the value is kernel ABI (linux/if_xdp.h). */
#ifndef XDP_PKT_CONTD
#define XDP_PKT_CONTD (1 << 0)
#endif

/* Frames given to the fill ring at a time; bounds the array on the stack. */
#define FILL_BATCH 64

#define SLOT_ALIGN 64         /* slots begin on cache lines of their own */
#define ROOM_ALIGN (2U << 20) /* what sl_umem_map_with wants */

static uint32_t slot_size(uint32_t longest)
{
	return (longest + SLOT_ALIGN - 1) & ~(uint32_t)(SLOT_ALIGN - 1);
}

uint64_t sl_chain_room(const struct sl_queue *queue)
{
	uint64_t slots = 0;
	uint32_t i;

	if (!queue->longest)
		return 0;
	for (i = 0; i < queue->lanes; i++)
		slots += queue->lane[i].quota / 2;
	slots *= slot_size(queue->longest);
	return (slots + ROOM_ALIGN - 1) & ~(uint64_t)(ROOM_ALIGN - 1);
}

int sl_chain_begin(struct sl_queue *queue)
{
	uint32_t slots = 0, i;

	for (i = 0; i < queue->lanes; i++)
		queue->lane[i].needs = 1;
	if (!queue->longest)
		return 0;
	for (i = 0; i < queue->lanes; i++)
		slots += queue->lane[i].quota / 2;
	queue->pieces = malloc(queue->fill_frames * sizeof(*queue->pieces));
	queue->slots = malloc((slots + 1) * sizeof(*queue->slots));
	if (!queue->pieces || !queue->slots)
		return -ENOMEM;
	for (i = 0; i < queue->fill_frames; i++)
		queue->pieces[i].next = SL_LAST_PIECE;
	for (i = 0; i < slots; i++)
		queue->slots[i] = queue->slots_at + i * slot_size(queue->longest);
	for (i = 0, slots = 0; i < queue->lanes; i++) {
		queue->lane[i].slots = queue->slots + slots;
		queue->lane[i].slots_free = queue->lane[i].quota / 2;
		slots += queue->lane[i].quota / 2;
	}
	return 0;
}

static struct sl_link *piece_at(const struct sl_queue *queue, uint64_t address)
{
	return &queue->pieces[address >> queue->frame_shift];
}

/* Descriptors of the packet that begins at index, of at most count; 0: its end is not there. */
static uint32_t packet_frames(struct sl_queue *queue, const struct sl_lane *lane, uint32_t index,
			      uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count && i < SL_CHAIN_FRAMES; i++) {
		if (!(xsk_ring_cons__rx_desc(&lane->rx, index + i)->options & XDP_PKT_CONTD))
			return i + 1;
	}
	/* The kernel shows a packet whole or not at all; none has that many frames. */
	if (i == SL_CHAIN_FRAMES || count == lane->rx.size)
		queue->broken = true;
	return 0;
}

/*
 * Takes frames descriptors from index on as one packet: its length, 0 when they
 * are not as they should be.
 */
static uint32_t take_packet(struct sl_queue *queue, uint32_t position, uint32_t index,
			    uint32_t frames)
{
	struct sl_lane *lane = &queue->lane[position];
	struct sl_link *before = NULL;
	uint32_t i, total = 0;

	for (i = 0; i < frames; i++) {
		const struct xdp_desc *desc = xsk_ring_cons__rx_desc(&lane->rx, index + i);
		uint64_t address = desc->addr;
		uint32_t frame = sl_frame_of(queue, address), length = desc->len;
		uint32_t within = address & ((1U << queue->frame_shift) - 1);

		if (frame >= queue->fill_frames || queue->state[frame] != SL_KERNEL ||
		    length > (1U << queue->frame_shift) - within) {
			queue->broken = true;
			return 0;
		}
		queue->state[frame] = SL_APPLICATION | position;
		total += length;
		if (frames == 1)
			break;
		if (before)
			before->next = address;
		before = &queue->pieces[frame];
		before->length = length;
	}
	return total;
}

/* The frames after address of the packet that begins there become the kernel's; how many. */
static uint32_t give_pieces(struct sl_queue *queue, uint64_t address)
{
	uint32_t count = 0, held = 0, next = piece_at(queue, address)->next;
	uint64_t back[FILL_BATCH];

	piece_at(queue, address)->next = SL_LAST_PIECE;
	while (next != SL_LAST_PIECE) {
		struct sl_link *piece = piece_at(queue, next);

		queue->state[next >> queue->frame_shift] = SL_KERNEL;
		back[held++] = next;
		count++;
		next = piece->next;
		piece->next = SL_LAST_PIECE;
		if (held == FILL_BATCH || next == SL_LAST_PIECE) {
			if (queue->closed)
				queue->frames.kernel += held;
			else
				sl_queue_fill(queue, back, held);
			held = 0;
		}
	}
	return count;
}

/* A packet that no slot is large enough for. */
static void discard(struct sl_queue *queue, uint32_t position, uint64_t address, uint32_t frames)
{
	queue->frames.kernel -= frames; /* filling adds them again */
	queue->state[sl_frame_of(queue, address)] = SL_KERNEL;
	give_pieces(queue, address);
	sl_queue_fill(queue, &address, 1);
	queue->lane[position].too_long++;
}

uint32_t sl_chain_move(struct sl_queue *queue, uint32_t position, struct sl_batch *batch,
		       uint32_t at, uint32_t count)
{
	struct sl_lane *lane = &queue->lane[position];
	uint32_t index, used = 0, taken = 0, done = 0;
	uint32_t waiting = sl_ring_waiting(&lane->rx);
	uint64_t bytes = 0, discarded = lane->too_long;

	lane->needs = 1;
	waiting = xsk_ring_cons__peek(&lane->rx, waiting, &index);
	while (done < count && used < waiting) {
		uint64_t address = xsk_ring_cons__rx_desc(&lane->rx, index + used)->addr;
		uint32_t frames = packet_frames(queue, lane, index + used, waiting - used), length;

		if (!frames)
			break;
		if (frames <= lane->quota && frames > lane->quota - lane->held - taken) {
			lane->needs = frames;
			break;
		}
		length = take_packet(queue, position, index + used, frames);
		if (queue->broken)
			break;
		used += frames;
		if (frames > 1) {
			if (frames > lane->quota || length > queue->longest) {
				discard(queue, position, address, frames);
				continue;
			}
			piece_at(queue, address)->slot = lane->slots[--lane->slots_free];
			batch->chained++;
			lane->jumbo++;
		}
		batch->addresses[at + done] = address;
		batch->sizes[at + done] = length;
		bytes += length;
		taken += frames;
		done++;
	}
	xsk_ring_cons__cancel(&lane->rx, waiting - used);
	xsk_ring_cons__release(&lane->rx, used);
	if (lane->too_long != discarded)
		sl_queue_wake(queue);
	memset(batch->lanes + at, lane->number, done);
	lane->held += taken;
	lane->received += done;
	lane->received_bytes += bytes;
	queue->frames.kernel -= taken;
	queue->frames.application[position] += taken;
	return done;
}

uint64_t sl_chain_place(const struct sl_queue *queue, uint64_t address)
{
	const struct sl_link *piece = piece_at(queue, address);

	return piece->next == SL_LAST_PIECE ? address : piece->slot;
}

uint64_t sl_chain_gather(const struct sl_queue *queue, uint64_t address)
{
	const struct sl_link *piece = piece_at(queue, address);
	uint64_t at = piece->slot, to = at;

	if (piece->next == SL_LAST_PIECE)
		return address;
	for (;;) {
		memcpy(queue->area + to, queue->area + address, piece->length);
		to += piece->length;
		if (piece->next == SL_LAST_PIECE)
			return at;
		address = piece->next;
		piece = piece_at(queue, address);
	}
}

uint64_t sl_chain_slot(const struct sl_queue *queue, uint64_t offset)
{
	if (!queue->longest || offset < queue->slots_at)
		return 0;
	return offset - (offset - queue->slots_at) % slot_size(queue->longest);
}

void sl_chain_give_back(struct sl_queue *queue, struct sl_batch *batch, uint32_t *counts)
{
	uint32_t i;

	for (i = 0; i < batch->count; i++) {
		uint64_t address = batch->addresses[i];
		const struct sl_link *piece = piece_at(queue, address);
		struct sl_lane *lane;
		uint32_t position;

		if (piece->next == SL_LAST_PIECE)
			continue;
		/* The first frame's state is the kernel's already. */
		position = queue->state[piece->next >> queue->frame_shift] & SL_LANE_BITS;
		lane = &queue->lane[position];
		lane->slots[lane->slots_free++] = piece->slot;
		counts[position] += give_pieces(queue, address);
		/* Nothing can be answered in place: no headers are found in no bytes. */
		batch->sizes[i] = 0;
	}
	batch->chained = 0;
}
