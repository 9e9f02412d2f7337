/* SPDX-License-Identifier: Apache-2.0 */
/* Checks of datapath_sanitized.c: payloads where they are sent from, and received frames sent on. */
#ifndef SANITIZED_FRAMES_H
#define SANITIZED_FRAMES_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sanitized_kernel.h"

/* Headers in front of a payload: as the template that copies writes them, and no byte too many. */
static void check_heads(uint32_t rounds)
{
	uint8_t copied[SL_TEMPLATE_SIZE + 1600];
	uint32_t without = 0;

	while (rounds--) {
		struct sl_destination d = any_destination(), e = any_destination();
		struct sl_template built, other;
		uint8_t *frame, *payload, *again;
		uint32_t length, whole;
		uint64_t sum, kept;

		EXPECT(!sl_template_init(&built, &d) && !sl_template_init(&other, &e));
		length = draw(1200);
		frame = malloc(built.length + length);
		payload = frame + built.length;
		fill_random(payload, length);
		sum = sl_sum(payload, length, 0);
		whole = sl_template_head(&built, payload, length, sum);
		EXPECT(whole == built.length + length);
		EXPECT(whole == sl_template_build(&built, copied, payload, length, sum));
		EXPECT(!memcmp(frame, copied, whole));
		check_udp(frame, whole);
		/* Sent on under other headers with the sum that the checksum tells, not the payload. */
		again = malloc(other.length + length);
		memcpy(again + other.length, payload, length);
		EXPECT(!sl_payload_sum(frame, whole, &kept));
		whole = sl_template_head(&other, again + other.length, length, kept);
		check_udp(again, whole);
		if (length) { /* so what was damaged on the way stays damaged */
			payload[draw(length)] ^= 1 << draw(8);
			memcpy(again + other.length, payload, length);
			EXPECT(!sl_payload_sum(frame, built.length + length, &kept));
			sl_template_head(&other, again + other.length, length, kept);
			EXPECT(slow_checksum(again + other.udp, length + 8,
					     pseudo_sum(again + other.ip, length + 8)));
		}
		memset(frame + built.udp + 6, 0, 2);
		EXPECT(sl_payload_sum(frame, built.length + length, &kept) == -ENODATA);
		frame[built.ip] = 0;
		EXPECT(sl_payload_sum(frame, built.length + length, &kept) == -EBADMSG);
		without++;
		free(frame);
		free(again);
	}
	printf("heads: %u\n", without);
}

/* Reserved frames: written, sent or given back, in parts and twice. */
struct own {
	uint32_t offsets[32], lengths[32], count;
};

static void write_own(struct sl_queue *queue, struct own *own)
{
	uint32_t size = draw(1200), k; /* fits the smallest MTU */
	int result = sl_queue_reserve(queue, 1 + draw(32), size, own->offsets, own->lengths);
	uint64_t values[32];

	EXPECT(result >= 0 && result <= 32);
	own->count = result;
	for (k = 0; k < own->count; k++) {
		EXPECT(own->offsets[k] % FRAME_SIZE == SL_HEADROOM && own->lengths[k] == size);
		memset(queue->area + own->offsets[k], draw(256), size);
		values[k] = k;
	}
	if (size >= 8) {
		EXPECT(!sl_scatter(queue->area, own->offsets, own->count, size - 8, 8, values));
		for (k = 0; k < own->count; k++)
			EXPECT(queue->area[own->offsets[k] + size - 1] == k);
	}
	EXPECT(sl_queue_reserve(queue, 1, FRAME_SIZE - SL_HEADROOM + 1, own->offsets,
				own->lengths) == -EINVAL);
}

/* What was just put into the transmit ring, checked before the kernel has it. */
static void check_entries(struct sl_queue *queue, struct kernel *kernel, uint32_t from, int sent)
{
	struct ring_memory *ring = &kernel->transmit;

	EXPECT(ring->producer - from == (uint32_t)sent);
	for (; from != ring->producer; from++) {
		struct xdp_desc *desc = &ring->entries[from & (TRANSMIT_RING - 1)];

		EXPECT(desc->addr / FRAME_SIZE == (desc->addr + desc->len - 1) / FRAME_SIZE);
		check_udp(queue->area + desc->addr, desc->len);
	}
}

static uint32_t send_own(struct sl_queue *queue, struct kernel *kernel, struct own *own,
			 struct sl_template *const *to)
{
	uint32_t from = kernel->transmit.producer, bad, kept, k;
	uint32_t one = own->count && draw(2) ? own->count : 1;
	uint16_t sums[32];
	int sent;

	if (one > 8)
		one = 1;
	for (k = 0; k < own->count; k++) {
		own->lengths[k] -= draw(own->lengths[k] + 1);
		sums[k] = slow_checksum(queue->area + own->offsets[k], own->lengths[k], 0);
	}
	if (own->count > 1) { /* refused whole, so that all can be sent afterwards */
		kept = own->offsets[1];
		own->offsets[1] = own->offsets[0];
		EXPECT(sl_queue_send_own(queue, to, 1, own->offsets, own->lengths, own->count,
					 &bad) == -EINVAL);
		EXPECT(bad == 1 && sl_queue_unreserve(queue, own->offsets, 2) == -EINVAL);
		own->offsets[1] = draw(2) ? UINT32_MAX - 4096 : SL_HEADROOM;
		EXPECT(sl_queue_send_own(queue, to, 1, own->offsets, own->lengths, own->count,
					 &bad) < 0);
		own->offsets[1] = kept - draw(SL_HEADROOM - 1);
		kept = own->lengths[1];
		own->lengths[1] = FRAME_SIZE;
		EXPECT(sl_queue_send_own(queue, to, 1, own->offsets, own->lengths, own->count,
					 &bad) == -EMSGSIZE);
		own->lengths[1] = kept;
		own->offsets[1] = own->offsets[1] / FRAME_SIZE * FRAME_SIZE + SL_HEADROOM;
	}
	sent = sl_queue_send_own(queue, to, one, own->offsets, own->lengths, own->count, &bad);
	EXPECT(sent >= 0 && (uint32_t)sent <= own->count);
	check_entries(queue, kernel, from, sent);
	for (k = 0; k < own->count; k++)
		EXPECT(sums[k] == slow_checksum(queue->area + own->offsets[k], own->lengths[k], 0));
	if (sent)
		EXPECT(sl_queue_send_own(queue, to, 1, own->offsets, own->lengths, 1, &bad) ==
			       -EINVAL &&
		       sl_queue_unreserve(queue, own->offsets, own->count) == -EINVAL);
	own->count -= sent;
	memmove(own->offsets, own->offsets + sent, own->count * sizeof(uint32_t));
	memmove(own->lengths, own->lengths + sent, own->count * sizeof(uint32_t));
	return sent;
}

static uint32_t send_pieces(struct sl_queue *queue, struct kernel *kernel,
			    struct sl_template *const *to)
{
	uint32_t from = kernel->transmit.producer, count = 1 + draw(8), pieces[8], lengths[8];
	uint32_t n = 0, i, k, bad;
	struct sl_piece piece[8 * 4];
	uint8_t *memory[8 * 4];
	int sent;

	for (i = 0; i < count; i++) {
		pieces[i] = draw(5);
		lengths[i] = 0;
		for (k = 0; k < pieces[i]; k++, n++) {
			piece[n].length = draw(300);
			memory[n] = malloc(piece[n].length + 1);
			fill_random(memory[n], piece[n].length);
			piece[n].base = piece[n].length ? memory[n] : NULL;
			lengths[i] += piece[n].length;
		}
	}
	lengths[count - 1]++;
	EXPECT(sl_queue_send_pieces(queue, to, count, piece, pieces, lengths, count, &bad) ==
		       -EFAULT &&
	       bad == count - 1);
	lengths[count - 1]--;
	sent = sl_queue_send_pieces(queue, to, draw(2) ? 1 : count, piece, pieces, lengths, count,
				    &bad);
	EXPECT(sent >= 0 && (uint32_t)sent <= count);
	check_entries(queue, kernel, from, sent);
	for (k = n = 0; k < (uint32_t)sent; k++) {
		struct xdp_desc *desc = &kernel->transmit.entries[(from + k) & (TRANSMIT_RING - 1)];
		const uint8_t *at = queue->area + desc->addr + desc->len - lengths[k];

		for (i = 0; i < pieces[k]; at += piece[n].length, i++, n++)
			EXPECT(!memcmp(at, memory[n], piece[n].length));
	}
	for (n = i = 0; i < count; i++)
		for (k = 0; k < pieces[i]; k++)
			free(memory[n++]);
	return sent;
}

static uint32_t forward(struct sl_queue *queue, struct kernel *kernel, struct sl_batch *batch,
			struct sl_template *const *to)
{
	uint32_t from = kernel->transmit.producer, templates = 1 + draw(3), count = batch->count;
	int32_t errors[32 * 3];
	uint32_t accepted = 0, i;
	/* Of frames that were damaged copies would be, too; all that is built is checked later. */
	int checksum = templates > 1 || draw(4), sent;

	sent = sl_queue_forward(batch, to, templates, checksum, errors);
	EXPECT(sent >= 0);
	for (i = 0; i < count * templates; i++) {
		EXPECT(!errors[i] || errors[i] == EAGAIN || errors[i] == EBADMSG ||
		       errors[i] == EMSGSIZE);
		accepted += !errors[i];
	}
	EXPECT(accepted == (uint32_t)sent && batch->count == 0);
	if (checksum)
		check_entries(queue, kernel, from, sent);
	return sent;
}

/* A UDP packet in two frames or more, with a payload of that many bytes; harm: its last bit flipped. */
static void deliver_jumbo(struct sl_queue *queue, struct kernel *kernel, uint32_t length, bool harm)
{
	struct sl_destination d = any_destination();
	struct ring_memory *ring = &kernel->receive[1];
	uint8_t payload[LONGEST], packet[LONGEST];
	uint32_t size, done, pieces, part;
	struct sl_template built;

	d.mtu = 9000;
	EXPECT(!sl_template_init(&built, &d));
	fill_random(payload, length);
	size = sl_template_build(&built, packet, payload, length, sl_sum(payload, length, 0));
	packet[size - 1] ^= harm;
	pieces = size / ROOM + 1 > 2 ? size / ROOM + 1 : 2;
	deliver_pieces(queue, kernel, 1, pieces);
	for (done = 0; pieces; pieces--, done += part) {
		struct xdp_desc *desc = &ring->entries[(ring->producer - pieces) & (RING - 1)];

		part = size - done > ROOM ? ROOM : pieces > 1 ? (size - done) / 2 : size - done;
		desc->len = part;
		memcpy(queue->area + desc->addr, packet + done, part);
	}
	EXPECT(done == size);
}

/* Packets in several frames are sent on as copies if they fit one, and all their frames come back. */
static void check_jumbo_forward(struct sl_queue *queue, struct kernel *kernel,
				struct sl_batch *batch)
{
	const uint32_t lengths[] = { 100, FRAME_SIZE - SL_TEMPLATE_SIZE, 2100, 8000 };
	uint32_t from, i, t, harm, checksum;
	struct sl_template built[2], *to[2];
	uint8_t sent[FRAME_SIZE];
	int32_t errors[2 * 64];

	for (t = 0; t < 2; t++) {
		struct sl_destination d = any_destination();

		d.mtu = 9000;
		to[t] = &built[t];
		EXPECT(!sl_template_init(to[t], &d));
	}
	for (i = 0; i < 4 * sizeof(lengths) / sizeof(*lengths); i++) {
		uint32_t length = lengths[i / 4];
		bool fits = length <= FRAME_SIZE - SL_TEMPLATE_SIZE;

		harm = i % 2;
		checksum = i / 2 % 2;
		deliver_jumbo(queue, kernel, length, harm);
		deliver(queue, kernel, 1);
		EXPECT(sl_queue_receive(queue, batch, 64) == 2 && batch->chained == 1);
		sl_queue_columns(batch);
		EXPECT(batch->lengths[0] == length);
		memcpy(sent, queue->area + batch->offsets[0], fits ? length : 0);
		from = kernel->transmit.producer;
		EXPECT(sl_queue_forward(batch, to, 2, checksum, errors) >= 0);
		for (t = 0; t < 2; t++) {
			struct xdp_desc *desc =
				&kernel->transmit.entries[from & (TRANSMIT_RING - 1)];
			struct sl_packet packet;
			uint8_t *frame;

			EXPECT(errors[t] == (fits ? 0 : EMSGSIZE));
			if (!fits)
				continue;
			from++;
			frame = queue->area + desc->addr;
			EXPECT(desc->addr >= FILL_FRAMES * (uint64_t)FRAME_SIZE);
			EXPECT(!sl_parse(frame, desc->len, &packet));
			EXPECT(packet.payload_length == length &&
			       !memcmp(frame + packet.payload, sent, length));
			/* Damaged on the way, it stays damaged where the sum is carried over. */
			if (!harm || checksum)
				check_udp(frame, desc->len);
			else
				EXPECT(slow_checksum(frame + packet.udp, length + 8,
						     pseudo_sum(frame + packet.ip, length + 8)));
		}
		check_frames(queue, kernel);
		/* As sent; what damaged copies are was looked at above. */
		while (kernel->transmit.producer != kernel->transmit.consumer)
			kernel->wire[kernel->on_wire++] =
				kernel->transmit
					.entries[kernel->transmit.consumer++ & (TRANSMIT_RING - 1)]
					.addr;
		while (kernel->on_wire)
			complete(kernel);
		sl_queue_reap(queue);
		check_frames(queue, kernel);
		EXPECT(queue->lane[1].held == 0 && queue->lane[1].slots_free == QUOTA / 2);
	}
}

#endif /* SANITIZED_FRAMES_H */
