// SPDX-License-Identifier: Apache-2.0
#include "rings.h"

#include <errno.h>
#include <linux/if_xdp.h>
#include <sys/mman.h>
#include <sys/socket.h>

static int map_ring(int fd, enum sl_ring which, uint32_t size, struct sl_map *map,
		    struct xdp_ring_offset *offset)
{
	struct xdp_mmap_offsets offsets;
	socklen_t length = sizeof(offsets);
	size_t entry = sizeof(struct xdp_desc);
	off_t page = 0;

	if (size == 0 || size & (size - 1))
		return -EINVAL;
	if (getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length))
		return -errno;
	/* Kernels before 5.4 had no flags and a smaller struct; they lack need_wakeup too. */
	if (length != sizeof(offsets))
		return -EOPNOTSUPP;
	switch (which) {
	case SL_RING_FILL:
		*offset = offsets.fr;
		entry = sizeof(__u64);
		page = XDP_UMEM_PGOFF_FILL_RING;
		break;
	case SL_RING_COMPLETION:
		*offset = offsets.cr;
		entry = sizeof(__u64);
		page = XDP_UMEM_PGOFF_COMPLETION_RING;
		break;
	case SL_RING_TRANSMIT:
		*offset = offsets.tx;
		page = XDP_PGOFF_TX_RING;
		break;
	case SL_RING_RECEIVE:
		*offset = offsets.rx;
		page = XDP_PGOFF_RX_RING;
		break;
	}
	map->size = offset->desc + size * entry;
	map->base =
		mmap(NULL, map->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, page);
	if (map->base == MAP_FAILED) {
		map->base = NULL;
		return -errno;
	}
	return 0;
}

int sl_map_producer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_prod *ring,
		    struct sl_map *map)
{
	struct xdp_ring_offset offset;
	int error = map_ring(fd, which, size, map, &offset);

	if (error)
		return error;
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = (uint32_t *)((char *)map->base + offset.producer);
	ring->consumer = (uint32_t *)((char *)map->base + offset.consumer);
	ring->flags = (uint32_t *)((char *)map->base + offset.flags);
	ring->ring = (char *)map->base + offset.desc;
	ring->cached_prod = *ring->producer;
	/* libxdp keeps the consumer of rings that we produce one size ahead. */
	ring->cached_cons = *ring->consumer + size;
	return 0;
}

int sl_map_consumer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_cons *ring,
		    struct sl_map *map)
{
	struct xdp_ring_offset offset;
	int error = map_ring(fd, which, size, map, &offset);

	if (error)
		return error;
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = (uint32_t *)((char *)map->base + offset.producer);
	ring->consumer = (uint32_t *)((char *)map->base + offset.consumer);
	ring->flags = (uint32_t *)((char *)map->base + offset.flags);
	ring->ring = (char *)map->base + offset.desc;
	ring->cached_prod = *ring->consumer;
	ring->cached_cons = *ring->consumer;
	return 0;
}

void sl_unmap(struct sl_map *map)
{
	if (map->base)
		munmap(map->base, map->size);
	map->base = NULL;
}
