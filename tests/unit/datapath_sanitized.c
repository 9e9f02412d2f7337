// SPDX-License-Identifier: Apache-2.0
/*
 * The data path's C under sanitizers, without a kernel: hostile frames through
 * parsing, building and turning round, and a queue whose rings lie in ordinary
 * memory, where this program does what the kernel does.
 *
 *     datapath_sanitized SEED ROUNDS
 *
 * Every frame is in a block of its own size, so that one byte too far is seen.
 */
#include <errno.h>
#include <stdio.h>
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

static void check_headers(uint32_t rounds)
{
	uint8_t scratch[2048];
	uint32_t understood = 0, turned = 0;

	while (rounds--) {
		uint32_t length = any_frame(scratch, sizeof(scratch));
		uint8_t *frame = malloc(length ? length : 1), *before = malloc(length ? length : 1);
		struct sl_packet packet;
		struct sl_source source;

		memcpy(frame, scratch, length);
		memcpy(before, scratch, length);
		if (!sl_parse(frame, length, &packet)) {
			understood++;
			EXPECT(packet.payload == packet.udp + 8);
			EXPECT((uint32_t)packet.payload + packet.payload_length <= length);
			sl_parse_source(frame, &packet, &source);
			EXPECT(source.family == packet.family);
		}
		if (!sl_reverse(frame, length, 1)) {
			turned++;
			check_udp(frame, length);
			EXPECT(!memcmp(frame, before + 6, 6) && !memcmp(frame + 6, before, 6));
			EXPECT(!memcmp(frame + packet.payload, before + packet.payload,
				       packet.payload_length));
		} else {
			EXPECT(!memcmp(frame, before, length));
		}
		free(frame);
		free(before);
	}
	EXPECT(understood && turned);
	printf("headers: %u understood, %u turned round\n", understood, turned);
}

static void check_sums(uint32_t rounds)
{
	while (rounds--) {
		uint32_t length = draw(300);
		uint8_t *data = malloc(length + 1);
		uint16_t sum;

		fill_random(data, length);
		sum = sl_fold(sl_sum(data, length, 0));
		/* memory order against network order */
		EXPECT((uint16_t)(sum >> 8 | sum << 8) == slow_checksum(data, length, 0));
		free(data);
	}
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

static struct sl_queue *make_queue(struct kernel *kernel)
{
	struct sl_queue *queue = calloc(1, sizeof(*queue));
	uint64_t *fill = (uint64_t *)kernel->fill.entries;
	uint32_t i;

	/* The kernel's wish to be woken stays unsaid, so there are no system calls. */
	for (i = 0; i < FILL_FRAMES; i++)
		fill[i] = (uint64_t)i * FRAME_SIZE;
	kernel->fill.producer = FILL_FRAMES;
	queue->area_size = (FILL_FRAMES + TRANSMIT_FRAMES) * (uint64_t)FRAME_SIZE;
	queue->area = calloc(1, queue->area_size);
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
	uint64_t frame = take_fill(kernel), address = frame + 256;
	struct xdp_desc *desc;
	uint32_t length;

	EXPECT(frame % FRAME_SIZE == 0);
	if (ring->producer - ring->consumer == RING) {
		kernel->dropped[lane]++;
		kernel->hands[kernel->in_hands++] = frame;
		return;
	}
	length = any_frame(queue->area + address, FRAME_SIZE - 256);
	if (draw(2)) {
		struct sluice_meta meta;

		fill_random(&meta, sizeof(meta));
		if (draw(8))
			meta.cookie = queue->cookie;
		memcpy(queue->area + address - sizeof(meta), &meta, sizeof(meta));
	}
	desc = &ring->entries[ring->producer & (RING - 1)];
	desc->addr = address;
	desc->len = length;
	ring->producer++;
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
	sum = kept.free + kept.kernel + kept.transmit;
	for (i = 0; i < LANES; i++) {
		sum += kept.application[i];
		EXPECT(queue->lane[i].held == kept.application[i] + echoes[i]);
		EXPECT(queue->lane[i].held <= QUOTA);
		EXPECT(queue->lane[i].muted == (queue->lane[i].held == QUOTA));
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

#define HELD 16 /* batches at a time */

static void check_queue(uint32_t rounds)
{
	struct kernel *kernel = calloc(1, sizeof(*kernel));
	struct sl_queue *queue = make_queue(kernel);
	struct sl_batch *held[HELD] = { NULL }, *copy = sl_batch_new(64);
	uint8_t payload[1200 * 8];
	uint32_t lengths[8], same[8] = { 0 }, bad, i;
	struct sl_template built[8], *to[8];
	uint64_t received = 0, echoed = 0, sent = 0;

	for (i = 0; i < 8; i++) {
		struct sl_destination d = any_destination();

		to[i] = &built[i];
		EXPECT(!sl_template_init(to[i], &d));
	}
	fill_random(payload, sizeof(payload));
	while (rounds--) {
		uint32_t slot = draw(HELD), count;
		int result;

		switch (draw(8)) {
		case 0:
		case 1:
			for (count = draw(12); count; count--)
				deliver(queue, kernel, draw(LANES));
			if (draw(64) == 0)
				tell_fill(kernel);
			break;
		case 2:
			if (held[slot])
				break;
			held[slot] = sl_batch_new(1 + draw(32));
			result = sl_queue_receive(queue, held[slot], 1 + draw(40));
			EXPECT(result >= 0 && (uint32_t)result <= held[slot]->capacity);
			received += result;
			if (!result) {
				sl_batch_free(held[slot]);
				held[slot] = NULL;
				break;
			}
			for (i = 1; i < (uint32_t)result; i++)
				EXPECT(held[slot]->lanes[i] >= held[slot]->lanes[i - 1]);
			sl_queue_columns(held[slot]);
			sl_queue_sources(held[slot]);
			EXPECT(!sl_batch_gather(held[slot], draw(1500), 1 + draw(8)));
			for (i = 0; i < (uint32_t)result; i++)
				EXPECT((uint64_t)held[slot]->offsets[i] + held[slot]->lengths[i] <=
				       held[slot]->addresses[i] + held[slot]->sizes[i]);
			break;
		case 3:
		case 4:
			if (!held[slot])
				break;
			/* released twice: the second time nothing happens */
			count = held[slot]->count;
			memcpy(copy->addresses, held[slot]->addresses, count * sizeof(uint64_t));
			memcpy(copy->lanes, held[slot]->lanes, count);
			copy->owner = queue;
			copy->count = count;
			if (draw(2)) {
				EXPECT(!sl_queue_release(held[slot]));
			} else {
				result = sl_queue_echo(held[slot], draw(2));
				EXPECT(result >= 0 && (uint32_t)result <= count);
				echoed += result;
			}
			EXPECT(sl_queue_release(copy) == -EINVAL);
			sl_batch_free(held[slot]);
			held[slot] = NULL;
			break;
		case 5:
			count = 1 + draw(8);
			for (i = 0; i < count; i++)
				lengths[i] = draw(4) && i ? lengths[i - 1] : draw(1200);
			/* one behind the other to one, one payload to many, or each its own */
			result = sl_queue_send(queue, to, draw(2) ? 1 : count, payload,
					       sizeof(payload), draw(2) ? same : NULL, lengths,
					       count, &bad);
			EXPECT(result >= 0 && (uint32_t)result <= count);
			sent += result;
			lengths[count - 1] = 65535;
			EXPECT(sl_queue_send(queue, to, count, payload, sizeof(payload), NULL,
					     lengths, count, &bad) == -EMSGSIZE &&
			       bad == count - 1);
			break;
		case 6:
			for (count = draw(20); count; count--)
				transmit(queue, kernel);
			break;
		case 7:
			for (count = draw(20); count; count--)
				complete(kernel);
			if (draw(2))
				sl_queue_reap(queue);
			break;
		}
		check_frames(queue, kernel);
	}
	EXPECT(received && echoed && sent);
	/* A frame that the kernel never had. */
	kernel->receive[0].entries[kernel->receive[0].producer & (RING - 1)].addr =
		queue->area_size + 256;
	if (kernel->receive[0].producer - kernel->receive[0].consumer < RING) {
		kernel->receive[0].producer++;
		for (i = 0; i < HELD; i++) {
			if (held[i])
				EXPECT(!sl_queue_release(held[i]));
		}
		while (kernel->on_wire || kernel->transmit.producer != kernel->transmit.consumer) {
			transmit(queue, kernel);
			complete(kernel);
			sl_queue_reap(queue);
		}
		for (i = 0; i < 100 && !queue->broken; i++) {
			if (sl_queue_receive(queue, copy, 64) > 0)
				EXPECT(!sl_queue_release(copy));
		}
		EXPECT(sl_queue_receive(queue, copy, 64) == -EPROTO);
	}
	printf("queue: %lu received, %lu echoed, %lu sent\n", (unsigned long)received,
	       (unsigned long)echoed, (unsigned long)sent);
	for (i = 0; i < HELD; i++)
		sl_batch_free(held[i]);
	sl_batch_free(copy);
	free(queue->area);
	sl_queue_free(queue);
	free(kernel);
}

int main(int argc, char **argv)
{
	uint32_t rounds;

	if (argc != 3)
		return 2;
	random_state = strtoull(argv[1], NULL, 0) | 1;
	rounds = strtoul(argv[2], NULL, 0);
	check_sums(rounds / 10);
	check_headers(rounds);
	check_queue(rounds);
	return 0;
}
