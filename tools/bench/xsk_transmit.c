// SPDX-License-Identifier: Apache-2.0
/*
 * Sends one frame (--frame FILE) over and over.  As a program with data of its
 * own would, it writes every frame anew before it is sent.  Packets count when
 * the kernel has completed them.
 */
#include "xsk.h"

static uint32_t read_frame(const char *path, char *frame)
{
	FILE *file = fopen(path, "rb");
	size_t length;

	if (!file)
		fail(path, errno);
	length = fread(frame, 1, FRAME_SIZE, file);
	fclose(file);
	if (!length)
		fail(path, EINVAL);
	return length;
}

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct reference_socket s = { 0 };
	struct report report = { .umem = (uint64_t)FRAMES * FRAME_SIZE };
	uint64_t free_frames[TRANSMIT_FRAMES];
	uint32_t unused = TRANSMIT_FRAMES;
	char frame[FRAME_SIZE];
	uint32_t length, done, from, to, i;

	if (!arguments.frame) {
		fprintf(stderr, "--frame FILE is needed\n");
		return 2;
	}
	length = read_frame(arguments.frame, frame);
	open_socket(&s, &arguments);
	for (i = 0; i < TRANSMIT_FRAMES; i++)
		free_frames[i] = (uint64_t)(RECEIVE_FRAMES + i) * FRAME_SIZE;
	say_ready();
	while (running(&report, &arguments)) {
		done = xsk_ring_cons__peek(&s.completion, RING_SIZE, &from);
		for (i = 0; i < done; i++)
			free_frames[unused++] = *xsk_ring_cons__comp_addr(&s.completion, from + i);
		if (done) {
			xsk_ring_cons__release(&s.completion, done);
			count(&report, done, (uint64_t)done * length);
		}
		if (unused < arguments.batch ||
		    xsk_ring_prod__reserve(&s.transmit, arguments.batch, &to) != arguments.batch) {
			wake_transmit(&s);
			continue;
		}
		for (i = 0; i < arguments.batch; i++) {
			struct xdp_desc *descriptor = xsk_ring_prod__tx_desc(&s.transmit, to + i);

			descriptor->addr = free_frames[--unused];
			descriptor->len = length;
			descriptor->options = 0;
			memcpy(s.area + descriptor->addr, frame, length);
		}
		xsk_ring_prod__submit(&s.transmit, arguments.batch);
		wake_transmit(&s);
	}
	finish(&report);
	print_report(&report);
	close_socket(&s);
	return 0;
}
