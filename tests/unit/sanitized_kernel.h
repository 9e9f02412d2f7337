/* SPDX-License-Identifier: Apache-2.0 */
/* What datapath_sanitized.c has in place of a kernel: rings in ordinary memory, and packets. */
#ifndef SANITIZED_KERNEL_H
#define SANITIZED_KERNEL_H

#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "batch.h"
#include "checksum.h"
#include "headers.h"
#include "queue_private.h"
#include "sanitized.h"

static struct sl_destination any_destination(void)
{
	struct sl_destination d;

	fill_random(&d, sizeof(d));
	d.family = draw(2) ? 4 : 6;
	d.vlan = (int32_t)draw(4096) - 1;
	d.flow_label &= 0xfffff;
	d.mtu = 1280 + draw(300);
	d.source_mac[0] &= 0xfe;
	d.destination_mac[0] &= 0xfe;
	/* addresses that may be answered */
	d.source[0] = 10 + draw(20);
	d.destination[0] = 10 + draw(20);
	return d;
}

/* A frame of the given room, built or random; returns its length. */
static uint32_t any_frame(uint8_t *frame, uint32_t room)
{
	struct sl_destination d = any_destination();
	struct sl_template built;
	uint8_t payload[1600];
	uint32_t length, i, changes;

	EXPECT(!sl_template_init(&built, &d));
	length = draw(room - SL_TEMPLATE_SIZE < built.payload_maximum ? room - SL_TEMPLATE_SIZE :
									built.payload_maximum);
	fill_random(payload, length);
	length = sl_template_build(&built, frame, payload, length, sl_sum(payload, length, 0));
	check_udp(frame, length);
	/* change a few bytes, mostly of the headers */
	changes = draw(4);
	for (i = 0; i < changes; i++)
		frame[draw(draw(4) ? (length < 70 ? length : 70) : length)] = draw(256);
	/* the interesting protocols more often than by chance */
	if (draw(8) == 0)
		frame[built.ip + (d.family == 4 ? 9 : 6)] =
			(const uint8_t[]){ 0, 43, 44, 51, 60, 17 }[draw(6)];
	return draw(4) ? length : draw(length + 1);
}

/*
 * What the kernel does.  Frames that it took from the fill ring and could not
 * deliver stay in its hands, as those of a full receive ring do.
 */
#define LANES 3
#define RING 16
#define QUOTA 24
#define RESERVE 8
#define FILL_FRAMES (LANES * (RING + QUOTA) + RESERVE)
#define FILL_RING 256
#define TRANSMIT_FRAMES 24
#define TRANSMIT_RING 16
#define COMPLETION_RING 64
#define FRAME_SIZE 2048
#define ROOM (FRAME_SIZE - 256)
#define PIECES 7 /* frames of a packet at most, and one more than a slot has room for */
#define LONGEST (6 * ROOM)
#define CONTINUED 1 /* XDP_PKT_CONTD, linux/if_xdp.h */

struct ring_memory {
	uint32_t producer, consumer, flags;
	struct xdp_desc entries[FILL_RING];
};

struct kernel {
	struct ring_memory fill, completion, transmit, receive[LANES];
	uint64_t hands[FILL_FRAMES];
	uint32_t in_hands;
	uint64_t wire[FILL_FRAMES + TRANSMIT_FRAMES];
	uint32_t on_wire;
	uint32_t fill_known, fill_taken; /* of the fill ring; the shared indices lag behind */
	uint64_t dropped[LANES];
};

static void join_producer(struct xsk_ring_prod *ring, struct ring_memory *memory, uint32_t size)
{
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = &memory->producer;
	ring->consumer = &memory->consumer;
	ring->flags = &memory->flags;
	ring->ring = memory->entries;
	ring->cached_prod = memory->producer;
	ring->cached_cons = memory->consumer + size;
}

static void join_consumer(struct xsk_ring_cons *ring, struct ring_memory *memory, uint32_t size)
{
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = &memory->producer;
	ring->consumer = &memory->consumer;
	ring->flags = &memory->flags;
	ring->ring = memory->entries;
	ring->cached_prod = memory->consumer;
	ring->cached_cons = memory->consumer;
}

/* longest: of packets in several frames, or 0 */
static struct sl_queue *make_queue(struct kernel *kernel, uint32_t longest)
{
	struct sl_queue *queue = calloc(1, sizeof(*queue));
	uint64_t *fill = (uint64_t *)kernel->fill.entries;
	uint32_t i;

	/* The kernel's wish to be woken stays unsaid, so there are no system calls. */
	for (i = 0; i < FILL_FRAMES; i++)
		fill[i] = (uint64_t)i * FRAME_SIZE;
	kernel->fill.producer = FILL_FRAMES;
	queue->area_size = (FILL_FRAMES + TRANSMIT_FRAMES) * (uint64_t)FRAME_SIZE;
	queue->longest = longest;
	queue->frame_shift = 11;
	queue->fill_frames = FILL_FRAMES;
	queue->cookie = 0x5eed;
	queue->lanes = LANES;
	join_producer(&queue->fill, &kernel->fill, FILL_RING);
	join_producer(&queue->transmit, &kernel->transmit, TRANSMIT_RING);
	join_consumer(&queue->completion, &kernel->completion, COMPLETION_RING);
	for (i = 0; i < LANES; i++) {
		join_consumer(&queue->lane[i].rx, &kernel->receive[i], RING);
		queue->lane[i].fd = -1;
		queue->lane[i].number = i * 2;
		queue->lane[i].quota = QUOTA;
		queue->lane[i].share = 65536 / 10;
	}
	queue->slots_at = queue->area_size;
	queue->data_size = queue->area_size + sl_chain_room(queue);
	queue->area = calloc(1, queue->data_size);
	EXPECT(!sl_queue_begin(queue, TRANSMIT_FRAMES));
	return queue;
}

/* As late as it pleases, the kernel says which entries of the fill ring it has taken. */
static void tell_fill(struct kernel *kernel)
{
	kernel->fill.consumer = kernel->fill_taken;
}

static uint64_t take_fill(struct kernel *kernel)
{
	uint64_t *fill = (uint64_t *)kernel->fill.entries;

	if (kernel->in_hands)
		return kernel->hands[--kernel->in_hands];
	if (kernel->fill_taken == kernel->fill_known) {
		tell_fill(kernel);
		kernel->fill_known = kernel->fill.producer;
	}
	EXPECT(kernel->fill_taken != kernel->fill_known); /* the promise: never dry */
	return fill[kernel->fill_taken++ & (FILL_RING - 1)];
}

static void deliver(struct sl_queue *queue, struct kernel *kernel, uint32_t lane)
{
	struct ring_memory *ring = &kernel->receive[lane];
	/* XDP_PACKET_HEADROOM; without, longer headers do not fit. */
	uint64_t frame = take_fill(kernel), address = frame + (draw(8) ? 256 : 0);
	struct xdp_desc *desc;
	uint32_t length;

	EXPECT(frame % FRAME_SIZE == 0);
	if (ring->producer - ring->consumer == RING) {
		kernel->dropped[lane]++;
		kernel->hands[kernel->in_hands++] = frame;
		return;
	}
	length = any_frame(queue->area + address, FRAME_SIZE - 256);
	if (address != frame && draw(2)) {
		struct sluice_meta meta;

		fill_random(&meta, sizeof(meta));
		if (draw(8))
			meta.cookie = queue->cookie;
		memcpy(queue->area + address - sizeof(meta), &meta, sizeof(meta));
	}
	desc = &ring->entries[ring->producer & (RING - 1)];
	desc->addr = address;
	desc->len = length;
	desc->options = 0;
	ring->producer++;
}

/* The bytes of a packet in several frames: each follows from the one before. */
static uint8_t following(uint8_t byte)
{
	return byte * 5 + 7;
}

/*
 * A packet in pieces, of any lengths as a driver may make them, or full ones as in
 * copy mode.  Whole or not at all: the kernel looks for room in the ring first.
 */
static void deliver_pieces(struct sl_queue *queue, struct kernel *kernel, uint32_t lane,
			   uint32_t pieces)
{
	struct ring_memory *ring = &kernel->receive[lane];
	bool full = draw(2);
	uint8_t byte = draw(256);
	uint32_t i, k;

	if (RING - (ring->producer - ring->consumer) < pieces) {
		kernel->dropped[lane]++;
		return;
	}
	for (i = 0; i < pieces; i++) {
		struct xdp_desc *desc = &ring->entries[ring->producer++ & (RING - 1)];
		uint64_t frame = take_fill(kernel);

		EXPECT(frame % FRAME_SIZE == 0);
		desc->addr = frame + 256;
		desc->len = full ? ROOM : 1 + draw(ROOM);
		desc->options = i + 1 < pieces ? CONTINUED : 0;
		memset(queue->area + frame, 0, 256);
		for (k = 0; k < desc->len; k++) {
			queue->area[desc->addr + k] = byte;
			byte = following(byte);
		}
	}
}

/* A packet in several frames is in one piece, and nobody has written over it. */
static void check_gathered(const struct sl_queue *queue, const struct sl_batch *batch)
{
	uint32_t i, k, chained = 0;

	for (i = 0; i < batch->count && queue->longest; i++) {
		uint64_t place = sl_chain_place(queue, batch->addresses[i]);
		const uint8_t *packet = batch->data + place;

		if (place == batch->addresses[i])
			continue;
		chained++;
		EXPECT(place >= queue->area_size && place + batch->sizes[i] <= queue->data_size);
		EXPECT(batch->sizes[i] <= LONGEST);
		for (k = 1; k < batch->sizes[i]; k++)
			EXPECT(packet[k] == following(packet[k - 1]));
		EXPECT(batch->offsets[i] >= place &&
		       batch->offsets[i] + batch->lengths[i] <= place + batch->sizes[i]);
	}
	EXPECT(chained == batch->chained);
}

static void transmit(struct sl_queue *queue, struct kernel *kernel)
{
	struct ring_memory *ring = &kernel->transmit;
	struct xdp_desc *desc;

	if (ring->producer == ring->consumer)
		return;
	desc = &ring->entries[ring->consumer++ & (TRANSMIT_RING - 1)];
	if (desc->addr >= FILL_FRAMES * (uint64_t)FRAME_SIZE) /* built, not echoed */
		check_udp(queue->area + desc->addr, desc->len);
	kernel->wire[kernel->on_wire++] = desc->addr;
}

static void complete(struct kernel *kernel)
{
	struct ring_memory *ring = &kernel->completion;
	uint64_t *entries = (uint64_t *)ring->entries;
	uint32_t which;

	if (!kernel->on_wire || ring->producer - ring->consumer == COMPLETION_RING)
		return;
	which = draw(kernel->on_wire); /* in any order */
	entries[ring->producer++ & (COMPLETION_RING - 1)] = kernel->wire[which];
	kernel->wire[which] = kernel->wire[--kernel->on_wire];
}

/* Each frame is in one place, and every place that can be looked into agrees. */
static void check_frames(struct sl_queue *queue, struct kernel *kernel)
{
	struct sl_frames kept, counted;
	uint32_t i, sum, seen = 0, echoes[LANES] = { 0 };

	for (i = 0; i < FILL_FRAMES; i++) {
		if ((queue->state[i] & ~SL_LANE_BITS) == SL_TRANSMIT)
			echoes[queue->state[i] & SL_LANE_BITS]++;
	}
	sl_queue_frames(queue, &kept);
	sl_queue_recount(queue, &counted);
	EXPECT(!memcmp(&kept, &counted, sizeof(kept)));
	sum = kept.free + kept.reserved + kept.kernel + kept.transmit;
	for (i = 0; i < LANES; i++) {
		sum += kept.application[i];
		EXPECT(queue->lane[i].held == kept.application[i] + echoes[i]);
		EXPECT(queue->lane[i].held <= QUOTA);
		EXPECT(queue->lane[i].muted ==
		       (queue->lane[i].held + queue->lane[i].needs > QUOTA));
		seen += kernel->receive[i].producer - kernel->receive[i].consumer;
	}
	EXPECT(sum == kept.total);
	seen += kernel->fill.producer - kernel->fill_taken + kernel->in_hands;
	EXPECT(seen == kept.kernel);
	EXPECT(kept.transmit == kernel->on_wire + kernel->transmit.producer -
					kernel->transmit.consumer + kernel->completion.producer -
					kernel->completion.consumer);
	EXPECT(!queue->broken);
}

#endif /* SANITIZED_KERNEL_H */
