// SPDX-License-Identifier: Apache-2.0
/*
 * Received frames sent on to somebody else, in place; to several, in copies but for the last.
 * What came in several frames was put together elsewhere, in a slot: of that all are copies,
 * where it fits a frame.  Nobody else gets the slot while the queue is locked.
 */
#include <errno.h>

#include "checksum.h"
#include "queue.h"
#include "queue_private.h"

/* Ethernet, IPv4 and UDP: what is in front of the payload of any UDP packet, at least. */
#define HEADERS_MIN 42

/* Descriptors that are written and not yet the kernel's to see. */
struct pending {
	uint32_t count;
	bool full; /* the kernel was asked for room, in vain */
	int error; /* of asking */
};

static void submit(struct sl_queue *queue, struct pending *pending)
{
	if (pending->count)
		xsk_ring_prod__submit(&queue->transmit, pending->count);
	queue->frames.transmit += pending->count;
	queue->counters.sent += pending->count;
	queue->counters.forwarded += pending->count;
	pending->count = 0;
}

/* The next entry of the transmit ring, and with frame a free frame; NULL: there is none. */
static struct xdp_desc *entry(struct sl_queue *queue, struct pending *pending, uint32_t *frame)
{
	struct xdp_desc *desc;
	uint32_t index;

	if (xsk_prod_nb_free(&queue->transmit, 1) == 0 || (frame && !queue->frames.free)) {
		if (pending->full)
			return NULL;
		/* It is asked for all that is written, and once in vain is enough. */
		submit(queue, pending);
		if (!sl_queue_room(queue, 1, frame, &pending->error)) {
			pending->full = true;
			return NULL;
		}
	}
	if (!xsk_ring_prod__reserve(&queue->transmit, 1, &index))
		return NULL;
	pending->count++;
	desc = xsk_ring_prod__tx_desc(&queue->transmit, index);
	desc->options = 0;
	if (frame) {
		*frame = queue->free_frames[--queue->frames.free];
		queue->state[*frame] = SL_TRANSMIT;
		desc->addr = (uint64_t)*frame << queue->frame_shift;
	}
	return desc;
}

/* 0, or why a payload can't be forwarded at all.  slot: where its packet was put together, or 0. */
static int check_packet(const struct sl_queue *queue, const struct sl_batch *batch, uint32_t i,
			uint64_t slot)
{
	uint64_t payload = batch->offsets[i], address = batch->addresses[i];

	if (slot)
		return payload < slot + HEADERS_MIN ||
				       payload + batch->lengths[i] > slot + queue->longest ?
			       EBADMSG :
			       0;
	/* Without metadata and not understood, a packet counts as payload from its first byte. */
	if (payload < address + HEADERS_MIN ||
	    payload + batch->lengths[i] > address + batch->sizes[i] ||
	    sl_frame_of(queue, payload) != sl_frame_of(queue, address))
		return EBADMSG;
	return 0;
}

static int copy_to(struct sl_queue *queue, struct pending *pending, const struct sl_template *to,
		   const uint8_t *payload, uint32_t length, uint64_t sum)
{
	struct xdp_desc *desc;
	uint32_t frame;

	if (length > sl_queue_longest(queue, to))
		return EMSGSIZE;
	desc = entry(queue, pending, &frame);
	if (!desc)
		return EAGAIN;
	desc->len = sl_template_build(to, queue->area + desc->addr, payload, length, sum);
	return 0;
}

static int in_place(struct sl_queue *queue, struct pending *pending, const struct sl_template *to,
		    const struct sl_batch *batch, uint32_t i, uint64_t sum)
{
	uint64_t payload = batch->offsets[i];
	uint64_t within = payload & ((1U << queue->frame_shift) - 1);
	struct xdp_desc *desc;
	uint32_t position;

	/*
	 * Longer headers reach into the metadata and the headroom below the packet, which the
	 * kernel leaves free (XDP_PACKET_HEADROOM, 256 bytes); not out of the frame.
	 */
	if (batch->lengths[i] > to->payload_maximum || within < to->length)
		return EMSGSIZE;
	desc = entry(queue, pending, NULL);
	if (!desc)
		return EAGAIN;
	position = sl_queue_position(queue, batch->lanes[i]);
	/* Until it is sent, it counts as held by its lane. */
	queue->lane[position].held++;
	queue->state[sl_frame_of(queue, payload)] = SL_TRANSMIT | position;
	desc->addr = payload - to->length;
	desc->len = sl_template_head(to, queue->area + payload, batch->lengths[i], sum);
	return 0;
}

static uint64_t sum_of(const struct sl_queue *queue, const struct sl_batch *batch, uint32_t i,
		       uint64_t slot, int checksum)
{
	uint64_t place = slot ? slot : batch->addresses[i], sum;
	/* Giving back forgets the size of what was in several frames; it ends with its payload. */
	uint32_t size = slot ? batch->offsets[i] + batch->lengths[i] - slot : batch->sizes[i];

	if (!checksum && !sl_payload_sum(queue->area + place, size, &sum))
		return sum;
	return sl_sum(queue->area + batch->offsets[i], batch->lengths[i], 0);
}

/* Each packet to all templates; those that stay in their frames gather in front of addresses. */
static uint32_t forward_all(struct sl_queue *queue, struct sl_batch *batch,
			    struct sl_template *const *built, uint32_t templates, int checksum,
			    struct pending *pending, int32_t *errors)
{
	uint32_t stayed = 0, i, t;

	for (i = 0; i < batch->count; i++, errors += templates) {
		uint8_t *payload = queue->area + batch->offsets[i];
		uint64_t slot = sl_chain_slot(queue, batch->offsets[i]), sum = 0;
		int bad = check_packet(queue, batch, i, slot);

		if (i + 8 < batch->count) /* headers, written by the core that received them */
			__builtin_prefetch(queue->area + batch->addresses[i + 8], 1);
		if (!bad)
			sum = sum_of(queue, batch, i, slot, checksum);
		for (t = 0; t + !slot < templates; t++)
			errors[t] = bad ? bad :
					  copy_to(queue, pending, built[t], payload,
						  batch->lengths[i], sum);
		if (!slot)
			errors[t] = bad ? bad : in_place(queue, pending, built[t], batch, i, sum);
		if (slot || errors[t])
			batch->addresses[stayed++] = batch->addresses[i];
	}
	return stayed;
}

int sl_queue_forward(struct sl_batch *batch, struct sl_template *const *built, uint32_t templates,
		     int checksum, int32_t *errors)
{
	struct sl_queue *queue = batch->owner;
	uint64_t before, packets = (uint64_t)batch->count * templates, k;
	struct pending pending = { 0 };
	uint32_t sent, stayed, i;
	int result;

	if (templates == 0)
		return -EINVAL;
	if (!batch->columns_ready)
		sl_queue_columns(batch);
	sl_lock(queue);
	result = sl_queue_unusable(queue);
	/* Afterwards all frames are "kernel" in the table, and no lane holds them. */
	if (!result)
		result = sl_queue_give_back(queue, batch);
	if (result) {
		sl_unlock(queue);
		return result;
	}
	before = queue->counters.forwarded;
	sl_queue_complete(queue);
	stayed = forward_all(queue, batch, built, templates, checksum, &pending, errors);
	submit(queue, &pending);
	sent = queue->counters.forwarded - before;
	for (k = 0; k < packets; k++)
		queue->counters.forward_refused += errors[k] != 0;
	sl_queue_fill(queue, batch->addresses, stayed);
	for (i = 0; i < queue->lanes; i++)
		sl_queue_mute(queue, &queue->lane[i]);
	if (!pending.error)
		pending.error = sl_queue_kick(queue);
	sl_queue_wake(queue);
	batch->count = 0;
	sl_unlock(queue);
	return sent || !pending.error ? (int)sent : pending.error;
}
