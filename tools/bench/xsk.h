/* SPDX-License-Identifier: Apache-2.0 */
/* The AF_XDP references' socket: libxdp, one queue, rings and frames as Sluice's defaults. */
#ifndef SLUICE_BENCH_XSK_H
#define SLUICE_BENCH_XSK_H

#include "reference.h"
#include <bpf/bpf.h>
#include <linux/if_link.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <xdp/xsk.h>

#define FRAME_SIZE 2048 /* bytes: an MTU of 1,500 and headroom */
#define RING_SIZE 4096
#define FILL_SIZE 8192
#define RECEIVE_FRAMES 8192
#define TRANSMIT_FRAMES 4096
#define FRAMES (RECEIVE_FRAMES + TRANSMIT_FRAMES)
#define FILL_WAIT_MS 100
#define BIND_ATTEMPTS 200 /* 2 s; some ms suffice as a rule */
#define BIND_PAUSE_US 10000

struct reference_socket {
	struct xsk_ring_prod fill;
	struct xsk_ring_cons completion;
	struct xsk_ring_cons receive;
	struct xsk_ring_prod transmit;
	struct xsk_umem *umem;
	struct xsk_socket *socket;
	char *area;
	int fd;
};

static inline void open_socket(struct reference_socket *s, const struct arguments *arguments)
{
	const struct xsk_umem_config umem = {
		.fill_size = FILL_SIZE,
		.comp_size = RING_SIZE,
		.frame_size = FRAME_SIZE,
	};
	const struct xsk_socket_config socket_config = {
		.rx_size = RING_SIZE,
		.tx_size = RING_SIZE,
		.libxdp_flags = XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD,
		.bind_flags = XDP_USE_NEED_WAKEUP,
	};
	uint32_t index, i;
	int error, map;

	s->area = mmap(NULL, (size_t)FRAMES * FRAME_SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (s->area == MAP_FAILED)
		fail("mmap", errno);
	error = xsk_umem__create(&s->umem, s->area, (size_t)FRAMES * FRAME_SIZE, &s->fill,
				 &s->completion, &umem);
	if (error)
		fail("xsk_umem__create", -error);
	/* The kernel frees a queue some time after its last socket was closed; until then: busy. */
	for (i = 0; i < BIND_ATTEMPTS; i++) {
		error = xsk_socket__create(&s->socket, arguments->interface, arguments->queue,
					   s->umem, &s->receive, &s->transmit, &socket_config);
		if (error != -EBUSY)
			break;
		usleep(BIND_PAUSE_US);
	}
	if (error)
		fail("xsk_socket__create", -error);
	s->fd = xsk_socket__fd(s->socket);
	if (xsk_ring_prod__reserve(&s->fill, RECEIVE_FRAMES, &index) != RECEIVE_FRAMES)
		fail("fill ring", ENOSPC);
	for (i = 0; i < RECEIVE_FRAMES; i++)
		*xsk_ring_prod__fill_addr(&s->fill, index++) = (uint64_t)i * FRAME_SIZE;
	xsk_ring_prod__submit(&s->fill, RECEIVE_FRAMES);
	if (!arguments->map_id)
		return;
	map = bpf_map_get_fd_by_id(arguments->map_id);
	if (map < 0)
		fail("opening the XSKMAP", errno);
	if (bpf_map_update_elem(map, &arguments->map_index, &s->fd, BPF_ANY))
		fail("entering the XSKMAP", errno);
	close(map);
}

/* Wait for packets, or let the kernel go on where it asked for a wake-up. */
static inline void wait_for_packets(struct reference_socket *s)
{
	struct pollfd events = { .fd = s->fd, .events = POLLIN };

	poll(&events, 1, FILL_WAIT_MS);
}

static inline void wake_fill(struct reference_socket *s)
{
	if (xsk_ring_prod__needs_wakeup(&s->fill))
		recvfrom(s->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

static inline void wake_transmit(struct reference_socket *s)
{
	if (xsk_ring_prod__needs_wakeup(&s->transmit))
		sendto(s->fd, NULL, 0, MSG_DONTWAIT, NULL, 0);
}

static inline uint64_t socket_losses(struct reference_socket *s)
{
	struct xdp_statistics statistics = { 0 };
	socklen_t length = sizeof(statistics);

	if (getsockopt(s->fd, SOL_XDP, XDP_STATISTICS, &statistics, &length))
		return 0;
	return statistics.rx_dropped + statistics.rx_ring_full;
}

static inline void close_socket(struct reference_socket *s)
{
	xsk_socket__delete(s->socket);
	xsk_umem__delete(s->umem);
}

#endif /* SLUICE_BENCH_XSK_H */
