// SPDX-License-Identifier: Apache-2.0
/*
 * Sends every received frame back in place: MACs, addresses and ports swapped
 * (which leaves all checksums right), the same frame on the transmit ring, and
 * from the completion ring back to the fill ring.  IPv4 without options only.
 */
#include "xsk.h"
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>

static void swap_ends(char *frame)
{
	struct ethhdr *ethernet = (struct ethhdr *)frame;
	struct iphdr *ip = (struct iphdr *)(ethernet + 1);
	struct udphdr *udp = (struct udphdr *)(ip + 1);
	unsigned char mac[ETH_ALEN];
	uint32_t address = ip->saddr;
	uint16_t port = udp->source;

	memcpy(mac, ethernet->h_source, ETH_ALEN);
	memcpy(ethernet->h_source, ethernet->h_dest, ETH_ALEN);
	memcpy(ethernet->h_dest, mac, ETH_ALEN);
	ip->saddr = ip->daddr;
	ip->daddr = address;
	udp->source = udp->dest;
	udp->dest = port;
}

static void recycle(struct reference_socket *s)
{
	uint32_t done, from, to, i;

	done = xsk_ring_cons__peek(&s->completion, RING_SIZE, &from);
	if (!done)
		return;
	while (xsk_ring_prod__reserve(&s->fill, done, &to) != done)
		wake_fill(s);
	for (i = 0; i < done; i++)
		*xsk_ring_prod__fill_addr(&s->fill, to + i) =
			*xsk_ring_cons__comp_addr(&s->completion, from + i) &
			~(uint64_t)(FRAME_SIZE - 1);
	xsk_ring_cons__release(&s->completion, done);
	xsk_ring_prod__submit(&s->fill, done);
}

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
		recycle(&s);
		received = xsk_ring_cons__peek(&s.receive, arguments.batch, &from);
		if (!received) {
			wake_transmit(&s);
			wait_for_packets(&s);
			continue;
		}
		while (xsk_ring_prod__reserve(&s.transmit, received, &to) != received) {
			wake_transmit(&s);
			recycle(&s);
		}
		bytes = 0;
		for (i = 0; i < received; i++) {
			const struct xdp_desc *descriptor =
				xsk_ring_cons__rx_desc(&s.receive, from + i);

			swap_ends(s.area + descriptor->addr);
			bytes += descriptor->len;
			*xsk_ring_prod__tx_desc(&s.transmit, to + i) = *descriptor;
		}
		xsk_ring_cons__release(&s.receive, received);
		xsk_ring_prod__submit(&s.transmit, received);
		wake_transmit(&s);
		count(&report, received, bytes);
	}
	finish(&report);
	report.lost = socket_losses(&s);
	print_report(&report);
	close_socket(&s);
	return 0;
}
