// SPDX-License-Identifier: Apache-2.0
/* Frames that the application writes payloads into, and payloads put together in frames. */
#include <errno.h>
#include <string.h>

#include "checksum.h"
#include "queue.h"
#include "queue_private.h"

static uint32_t frame_size(const struct sl_queue *queue)
{
	return 1U << queue->frame_shift;
}

int sl_queue_reserve(struct sl_queue *queue, uint32_t count, uint32_t length, uint32_t *offsets,
		     uint32_t *lengths)
{
	uint32_t i, frame;
	int result;

	if (length > frame_size(queue) - SL_HEADROOM)
		return -EINVAL;
	sl_lock(queue);
	result = sl_queue_unusable(queue);
	if (result) {
		sl_unlock(queue);
		return result;
	}
	if (count > queue->frames.free)
		sl_queue_progress(queue);
	if (count > queue->frames.free)
		count = queue->frames.free;
	for (i = 0; i < count; i++) {
		frame = queue->free_frames[--queue->frames.free];
		queue->state[frame] = SL_RESERVED;
		offsets[i] = (frame << queue->frame_shift) + SL_HEADROOM;
		lengths[i] = length;
	}
	queue->frames.reserved += count;
	sl_unlock(queue);
	return count;
}

/*
 * All or nothing: reserved frames get another state, so that one which is given twice is not
 * reserved the second time.  The number of the first bad one, or count.
 */
static uint32_t claim(struct sl_queue *queue, const uint32_t *offsets, uint32_t count,
		      uint8_t state)
{
	uint32_t bad, i;

	for (bad = 0; bad < count; bad++) {
		uint32_t frame = sl_frame_of(queue, offsets[bad]);

		if (frame == UINT32_MAX || queue->state[frame] != SL_RESERVED)
			break;
		queue->state[frame] = state;
	}
	if (bad < count) {
		for (i = 0; i < bad; i++)
			queue->state[sl_frame_of(queue, offsets[i])] = SL_RESERVED;
	}
	return bad;
}

int sl_queue_unreserve(struct sl_queue *queue, const uint32_t *offsets, uint32_t count)
{
	uint32_t i;
	int result = 0;

	sl_lock(queue);
	if (claim(queue, offsets, count, SL_FREE) < count) {
		result = -EINVAL;
	} else {
		/* In this order the next ones that are reserved come in the order of these. */
		for (i = count; i-- > 0;)
			queue->free_frames[queue->frames.free++] = sl_frame_of(queue, offsets[i]);
		queue->frames.reserved -= count;
		if (queue->closed && !sl_queue_held(queue))
			sl_queue_unmap(queue);
	}
	sl_unlock(queue);
	return result;
}

uint8_t *sl_queue_area(struct sl_queue *queue, uint64_t *size)
{
	*size = queue->area_size;
	return queue->area;
}

/* Whether payloads fit, where they begin, between the headers and the end of the frame. */
static int check_places(const struct sl_queue *queue, struct sl_template *const *built, bool many,
			const uint32_t *offsets, const uint32_t *lengths, uint32_t count,
			uint32_t *bad)
{
	for (*bad = 0; *bad < count; ++*bad) {
		const struct sl_template *to = built[many ? *bad : 0];
		uint32_t within = offsets[*bad] & (frame_size(queue) - 1);

		if (lengths[*bad] > to->payload_maximum)
			return -EMSGSIZE;
		if (within < to->length || lengths[*bad] > frame_size(queue) - within)
			return -EINVAL;
	}
	return 0;
}

int sl_queue_send_own(struct sl_queue *queue, struct sl_template *const *built, uint32_t templates,
		      const uint32_t *offsets, const uint32_t *lengths, uint32_t count,
		      uint32_t *bad)
{
	uint32_t done = 0, room, index, i;
	bool many = templates > 1;
	int result;

	result = check_places(queue, built, many, offsets, lengths, count, bad);
	if (result)
		return result;
	sl_lock(queue);
	result = sl_queue_unusable(queue);
	if (!result) {
		*bad = claim(queue, offsets, count, SL_TRANSMIT);
		if (*bad < count)
			result = -EINVAL;
	}
	if (result) {
		sl_unlock(queue);
		return result;
	}
	sl_queue_complete(queue);
	while (done < count && !result) {
		room = sl_queue_room(queue, count - done, false, &result);
		if (room == 0 || !xsk_ring_prod__reserve(&queue->transmit, room, &index))
			break;
		for (i = 0; i < room; i++, done++) {
			struct xdp_desc *desc = xsk_ring_prod__tx_desc(&queue->transmit, index + i);
			const struct sl_template *to = built[many ? done : 0];
			uint8_t *payload = queue->area + offsets[done];
			uint32_t length = lengths[done];

			desc->addr = offsets[done] - to->length;
			desc->options = 0;
			desc->len =
				sl_template_head(to, payload, length, sl_sum(payload, length, 0));
		}
		xsk_ring_prod__submit(&queue->transmit, room);
		queue->frames.reserved -= room;
		queue->frames.transmit += room;
		queue->counters.sent += room;
	}
	for (i = done; i < count; i++)
		queue->state[sl_frame_of(queue, offsets[i])] = SL_RESERVED;
	if (!result)
		result = sl_queue_kick(queue);
	sl_unlock(queue);
	return done || !result ? (int)done : result;
}

/* Whether all payloads fit MTU and frame, and are as long as their pieces together. */
static int check_pieces(const struct sl_queue *queue, struct sl_template *const *built, bool many,
			const struct sl_piece *piece, const uint32_t *pieces,
			const uint32_t *lengths, uint32_t count, uint32_t *bad)
{
	for (*bad = 0; *bad < count; ++*bad) {
		uint64_t length = 0;
		uint32_t k;

		for (k = 0; k < pieces[*bad]; k++, piece++)
			length += piece->length;
		if (length > built[many ? *bad : 0]->payload_maximum ||
		    length > frame_size(queue) - SL_HEADROOM)
			return -EMSGSIZE;
		if (length != lengths[*bad])
			return -EFAULT;
	}
	return 0;
}

int sl_queue_send_pieces(struct sl_queue *queue, struct sl_template *const *built,
			 uint32_t templates, const struct sl_piece *piece, const uint32_t *pieces,
			 const uint32_t *lengths, uint32_t count, uint32_t *bad)
{
	uint32_t done = 0, room, index, i, k;
	bool many = templates > 1;
	int result;

	result = check_pieces(queue, built, many, piece, pieces, lengths, count, bad);
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
		if (room == 0 || !xsk_ring_prod__reserve(&queue->transmit, room, &index))
			break;
		for (i = 0; i < room; i++, done++) {
			struct xdp_desc *desc = xsk_ring_prod__tx_desc(&queue->transmit, index + i);
			const struct sl_template *to = built[many ? done : 0];
			uint32_t frame = queue->free_frames[--queue->frames.free];
			uint64_t base = ((uint64_t)frame << queue->frame_shift) + SL_HEADROOM;
			uint8_t *payload = queue->area + base, *end = payload;

			/* Where one piece ends in the middle of a word is no matter to a sum of the whole. */
			for (k = 0; k < pieces[done]; k++, piece++) {
				if (piece->length)
					memcpy(end, piece->base, piece->length);
				end += piece->length;
			}
			queue->state[frame] = SL_TRANSMIT;
			desc->addr = base - to->length;
			desc->options = 0;
			desc->len = sl_template_head(to, payload, lengths[done],
						     sl_sum(payload, lengths[done], 0));
		}
		xsk_ring_prod__submit(&queue->transmit, room);
		queue->frames.transmit += room;
		queue->counters.sent += room;
	}
	if (!result)
		result = sl_queue_kick(queue);
	sl_unlock(queue);
	return done || !result ? (int)done : result;
}
