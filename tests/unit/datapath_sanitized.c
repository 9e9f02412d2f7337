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

#include "checksum.h"
#include "sanitized_frames.h"

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

static void any_packet(struct sl_queue *queue, struct kernel *kernel)
{
	if (queue->longest && draw(3) == 0)
		deliver_pieces(queue, kernel, draw(LANES), 2 + draw(PIECES - 1));
	else
		deliver(queue, kernel, draw(LANES));
}

static uint64_t place_of(const struct sl_batch *batch, uint32_t i)
{
	return batch->chained ? sl_chain_place(batch->owner, batch->addresses[i]) :
				batch->addresses[i];
}

static void receive_all(struct sl_queue *queue, struct sl_batch *batch)
{
	while (sl_queue_receive(queue, batch, 64) > 0)
		EXPECT(!sl_queue_release(batch));
}

/* Everything but echoes was released. */
static void check_ends(struct sl_queue *queue, struct kernel *kernel, struct sl_batch *batch)
{
	struct ring_memory *ring = &kernel->receive[1];
	struct sl_batch *others = sl_batch_new(64);
	uint64_t too_long;
	uint32_t i;

	while (kernel->on_wire || kernel->transmit.producer != kernel->transmit.consumer) {
		transmit(queue, kernel);
		complete(kernel);
		sl_queue_reap(queue);
	}
	receive_all(queue, batch);
	for (i = 0; i < LANES; i++)
		EXPECT(queue->lane[i].slots_free == QUOTA / 2);
	for (i = 0; i < FILL_FRAMES; i++)
		EXPECT(queue->pieces[i].next == SL_LAST_PIECE);

	/* Without its end a packet is not there; with it, it is, and never in two batches. */
	deliver(queue, kernel, 1);
	deliver_pieces(queue, kernel, 1, 4);
	ring->producer -= 2;
	EXPECT(sl_queue_receive(queue, batch, 64) == 1);
	EXPECT(!sl_queue_release(batch));
	EXPECT(sl_queue_receive(queue, batch, 64) == 0);
	ring->producer += 2;
	EXPECT(sl_queue_receive(queue, batch, 1) == 1 && batch->chained == 1);
	sl_queue_columns(batch);
	check_gathered(queue, batch);
	EXPECT(!sl_queue_release(batch));

	/* One that no slot is large enough for is given back at once; the next one is received. */
	too_long = queue->lane[1].too_long;
	deliver_pieces(queue, kernel, 1, 2);
	for (i = 0; i < 2; i++)
		ring->entries[(ring->producer - 2 + i) & (RING - 1)].len = ROOM;
	queue->longest = 2 * ROOM - 1;
	deliver(queue, kernel, 1);
	EXPECT(sl_queue_receive(queue, batch, 64) == 1 && batch->chained == 0);
	EXPECT(queue->lane[1].too_long == too_long + 1);
	queue->longest = LONGEST;
	EXPECT(!sl_queue_release(batch));

	/* One that needs more than is left of the quota waits, and wakes nobody until there is room. */
	for (i = 0; i < QUOTA - 3; i++) {
		deliver(queue, kernel, 1);
		if (i == 10)
			EXPECT(sl_queue_receive(queue, others, 64) == 11);
	}
	EXPECT(sl_queue_receive(queue, batch, 64) == QUOTA - 3 - 11);
	deliver_pieces(queue, kernel, 1, 4);
	EXPECT(!queue->lane[1].muted);
	EXPECT(sl_queue_receive(queue, batch, 64) == 0 && queue->lane[1].muted);
	check_frames(queue, kernel);
	EXPECT(!sl_queue_release(others) && !queue->lane[1].muted);
	EXPECT(sl_queue_receive(queue, others, 64) == 1 && others->chained == 1);
	EXPECT(!sl_queue_release(others) && !sl_queue_release(batch));
	sl_batch_free(others);
	check_frames(queue, kernel);
}

/* A packet that fills a ring and does not end: the queue stops, as for any nonsense. */
static void check_endless(void)
{
	struct kernel *kernel = calloc(1, sizeof(*kernel));
	struct sl_queue *queue = make_queue(kernel, LONGEST);
	struct sl_batch *batch = sl_batch_new(64);

	deliver_pieces(queue, kernel, 0, RING);
	kernel->receive[0].entries[RING - 1].options = CONTINUED;
	EXPECT(sl_queue_receive(queue, batch, 64) == 0 && queue->broken);
	EXPECT(sl_queue_receive(queue, batch, 64) == -EPROTO);
	sl_batch_free(batch);
	free(queue->area);
	sl_queue_free(queue);
	free(kernel);
}

#define HELD 16 /* batches at a time */

static void check_queue(uint32_t rounds, uint32_t longest)
{
	struct kernel *kernel = calloc(1, sizeof(*kernel));
	struct sl_queue *queue = make_queue(kernel, longest);
	struct sl_batch *held[HELD] = { NULL }, *copy = sl_batch_new(64);
	uint8_t payload[1200 * 8];
	uint32_t lengths[8], same[8] = { 0 }, bad, i;
	struct sl_template built[8], *to[8];
	uint64_t received = 0, echoed = 0, sent = 0, jumbo = 0, owned = 0, pieced = 0;
	uint64_t forwarded = 0;
	struct own own[4] = { 0 }, *mine;

	for (i = 0; i < 8; i++) {
		struct sl_destination d = any_destination();

		to[i] = &built[i];
		EXPECT(!sl_template_init(to[i], &d));
	}
	fill_random(payload, sizeof(payload));
	while (rounds--) {
		uint32_t slot = draw(HELD), count;
		int result;

		mine = &own[slot % 4];
		switch (draw(12)) {
		case 0:
		case 1:
			for (count = draw(12); count; count--)
				any_packet(queue, kernel);
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
				EXPECT(place_of(held[slot], i) + held[slot]->sizes[i] >=
				       (uint64_t)held[slot]->offsets[i] + held[slot]->lengths[i]);
			check_gathered(queue, held[slot]);
			break;
		case 3:
		case 4:
			if (!held[slot])
				break;
			check_gathered(queue, held[slot]);
			jumbo += held[slot]->chained;
			/* released twice: the second time nothing happens */
			count = held[slot]->count;
			memcpy(copy->addresses, held[slot]->addresses, count * sizeof(uint64_t));
			memcpy(copy->lanes, held[slot]->lanes, count);
			copy->owner = queue;
			copy->count = count;
			i = draw(3);
			if (i == 0) {
				EXPECT(!sl_queue_release(held[slot]));
			} else if (i == 1) {
				forwarded += forward(queue, kernel, held[slot], to);
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
		case 8:
			if (!mine->count)
				write_own(queue, mine);
			break;
		case 9:
			owned += send_own(queue, kernel, mine, to);
			break;
		case 10:
			pieced += send_pieces(queue, kernel, to);
			break;
		case 11:
			i = draw(mine->count + 1);
			mine->count -= i;
			EXPECT(!sl_queue_unreserve(queue, mine->offsets + mine->count, i));
			if (i)
				EXPECT(sl_queue_unreserve(queue, mine->offsets + mine->count, 1) ==
				       -EINVAL);
			break;
		}
		check_frames(queue, kernel);
	}
	EXPECT(received && echoed && sent && owned && pieced && forwarded && !jumbo == !longest);
	for (i = 0; i < HELD; i++) {
		if (held[i])
			EXPECT(!sl_queue_release(held[i]));
	}
	for (i = 0; i < 4; i++)
		EXPECT(!sl_queue_unreserve(queue, own[i].offsets, own[i].count));
	if (longest) {
		check_ends(queue, kernel, copy);
		check_jumbo_forward(queue, kernel, copy);
	}
	/* A frame that the kernel never had. */
	kernel->receive[0].entries[kernel->receive[0].producer & (RING - 1)].options = 0;
	kernel->receive[0].entries[kernel->receive[0].producer & (RING - 1)].addr =
		queue->area_size + 256;
	if (kernel->receive[0].producer - kernel->receive[0].consumer < RING) {
		kernel->receive[0].producer++;
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
	printf("queue: %lu received, %lu in several frames, %lu echoed, %lu sent, %lu in own "
	       "frames, %lu from pieces, %lu forwarded\n",
	       (unsigned long)received, (unsigned long)jumbo, (unsigned long)echoed,
	       (unsigned long)sent, (unsigned long)owned, (unsigned long)pieced,
	       (unsigned long)forwarded);
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
	check_heads(rounds / 10);
	check_queue(rounds, 0);
	check_queue(rounds, LONGEST);
	check_endless();
	return 0;
}
