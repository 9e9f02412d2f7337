// SPDX-License-Identifier: Apache-2.0
/* Receives on one AF_XDP socket and gives every frame back; --touch reads 8 bytes of each. */
#include "xsk.h"

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct reference_socket s = { 0 };
	struct report report = { .umem = (uint64_t)FRAMES * FRAME_SIZE };
	uint32_t received, from, to, i;
	uint64_t bytes;

	open_socket(&s, &arguments);
	say_ready();
	while (running(&report, &arguments)) {
		received = xsk_ring_cons__peek(&s.receive, arguments.batch, &from);
		if (!received) {
			wait_for_packets(&s);
			continue;
		}
		/* As many frames as were taken out always fit: the fill ring holds them all. */
		while (xsk_ring_prod__reserve(&s.fill, received, &to) != received)
			wake_fill(&s);
		bytes = 0;
		for (i = 0; i < received; i++) {
			const struct xdp_desc *descriptor =
				xsk_ring_cons__rx_desc(&s.receive, from + i);

			bytes += descriptor->len;
			if (arguments.touch)
				report.sink += *(uint64_t *)(s.area + descriptor->addr);
			*xsk_ring_prod__fill_addr(&s.fill, to + i) = descriptor->addr &
								     ~(uint64_t)(FRAME_SIZE - 1);
		}
		xsk_ring_cons__release(&s.receive, received);
		xsk_ring_prod__submit(&s.fill, received);
		count(&report, received, bytes);
	}
	finish(&report);
	report.lost = socket_losses(&s);
	print_report(&report);
	close_socket(&s);
	return 0;
}
