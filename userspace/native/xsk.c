// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "xsk.h"

#include <errno.h>
#include <linux/ethtool.h>
#include <linux/if_xdp.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rings.h"

/* Newer than the oldest headers this is built with; the values are kernel ABI (linux/if_xdp.h). */
#ifndef XDP_MAX_TX_SKB_BUDGET
#define XDP_MAX_TX_SKB_BUDGET 9
#endif

#ifndef XDP_USE_SG
#define XDP_USE_SG (1 << 4)
#endif

static int set_option(int fd, int option, const void *value, socklen_t size)
{
	return setsockopt(fd, SOL_XDP, option, value, size) ? -errno : 0;
}

int sl_xsk_socket(void)
{
	int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);

	return fd < 0 ? -errno : fd;
}

int sl_xsk_register(int fd, uint8_t *area, uint64_t size, uint32_t frame_size)
{
	struct xdp_umem_reg reg;

	memset(&reg, 0, sizeof(reg));
	reg.addr = (uintptr_t)area;
	reg.len = size;
	reg.chunk_size = frame_size;
	/*
	 * No headroom of ours: the kernel leaves XDP_PACKET_HEADROOM (256 bytes)
	 * below the packet, where the metadata goes.
	 */
	return set_option(fd, XDP_UMEM_REG, &reg, sizeof(reg));
}

int sl_xsk_umem_rings(int fd, uint32_t fill, uint32_t completion)
{
	int error = set_option(fd, XDP_UMEM_FILL_RING, &fill, sizeof(fill));

	if (error)
		return error;
	return set_option(fd, XDP_UMEM_COMPLETION_RING, &completion, sizeof(completion));
}

int sl_xsk_receive_ring(int fd, uint32_t size)
{
	return set_option(fd, XDP_RX_RING, &size, sizeof(size));
}

int sl_xsk_transmit_ring(int fd, uint32_t size)
{
	return set_option(fd, XDP_TX_RING, &size, sizeof(size));
}

int sl_xsk_fill(int fd, uint32_t ring_size, uint32_t count, uint32_t frame_size)
{
	struct xsk_ring_prod fill;
	struct sl_map map;
	uint32_t i, at;
	int error;

	error = sl_map_producer(fd, SL_RING_FILL, ring_size, &fill, &map);
	if (error)
		return error;
	if (xsk_ring_prod__reserve(&fill, count, &at) == count) {
		for (i = 0; i < count; i++)
			*xsk_ring_prod__fill_addr(&fill, at + i) = (uint64_t)i * frame_size;
		xsk_ring_prod__submit(&fill, count);
	} else {
		error = -ENOSPC;
	}
	sl_unmap(&map);
	return error;
}

int sl_xsk_bind(int fd, uint32_t ifindex, uint32_t queue, uint32_t flags, int shared_fd)
{
	struct sockaddr_xdp address;

	memset(&address, 0, sizeof(address));
	address.sxdp_family = AF_XDP;
	address.sxdp_ifindex = ifindex;
	address.sxdp_queue_id = queue;
	if (flags & SL_XSK_SHARED) {
		/* The mode is the first socket's; naming one here is refused. */
		address.sxdp_flags = XDP_SHARED_UMEM;
		address.sxdp_shared_umem_fd = shared_fd;
	} else {
		address.sxdp_flags = XDP_USE_NEED_WAKEUP;
		if (flags & SL_XSK_ZEROCOPY)
			address.sxdp_flags |= XDP_ZEROCOPY;
		if (flags & SL_XSK_COPY)
			address.sxdp_flags |= XDP_COPY;
		if (flags & SL_XSK_SG)
			address.sxdp_flags |= XDP_USE_SG;
	}
	return bind(fd, (struct sockaddr *)&address, sizeof(address)) ? -errno : 0;
}

int sl_xsk_zerocopy(int fd)
{
	struct xdp_options options;
	socklen_t length = sizeof(options);

	if (getsockopt(fd, SOL_XDP, XDP_OPTIONS, &options, &length))
		return -errno;
	return options.flags & XDP_OPTIONS_ZEROCOPY ? 1 : 0;
}

int sl_xsk_statistics(int fd, struct sl_xsk_statistics *statistics)
{
	struct xdp_statistics raw;
	socklen_t length = sizeof(raw);

	memset(&raw, 0, sizeof(raw));
	if (getsockopt(fd, SOL_XDP, XDP_STATISTICS, &raw, &length))
		return -errno;
	statistics->rx_dropped = raw.rx_dropped;
	statistics->rx_invalid_descs = raw.rx_invalid_descs;
	statistics->tx_invalid_descs = raw.tx_invalid_descs;
	statistics->rx_ring_full = raw.rx_ring_full;
	statistics->rx_fill_ring_empty_descs = raw.rx_fill_ring_empty_descs;
	statistics->tx_ring_empty_descs = raw.tx_ring_empty_descs;
	return 0;
}

int sl_xsk_check(int fd)
{
	/* Receives nothing ever: on AF_XDP this is the wake-up call, and it checks the binding. */
	if (recvfrom(fd, NULL, 0, MSG_DONTWAIT, NULL, NULL) >= 0)
		return 0;
	return errno == ENXIO || errno == ENETDOWN || errno == EBADF ? -errno : 0;
}

int sl_xsk_transmit_budget(int fd, uint32_t packets)
{
	return set_option(fd, XDP_MAX_TX_SKB_BUDGET, &packets, sizeof(packets));
}

int sl_xsk_send_buffer(int fd, int bytes)
{
	return setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)) ? -errno : 0;
}

int sl_xsk_queues(const char *interface)
{
	struct ethtool_channels channels;
	size_t length = strlen(interface);
	struct ifreq request;
	int fd, error = 0;

	if (length >= sizeof(request.ifr_name))
		return -ENODEV;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	memset(&channels, 0, sizeof(channels));
	memset(&request, 0, sizeof(request)); /* ends the name, too */
	channels.cmd = ETHTOOL_GCHANNELS;
	memcpy(request.ifr_name, interface, length);
	request.ifr_data = (char *)&channels;
	if (ioctl(fd, SIOCETHTOOL, &request))
		error = errno;
	close(fd);
	/* A driver without channels has one queue. */
	if (error == EOPNOTSUPP)
		return 1;
	if (error)
		return -error;
	if (channels.rx_count + channels.combined_count == 0)
		return 1;
	return channels.rx_count + channels.combined_count;
}
