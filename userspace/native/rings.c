// SPDX-License-Identifier: Apache-2.0
#include "rings.h"

#include <errno.h>
#include <linux/if_xdp.h>
#include <sys/mman.h>
#include <sys/socket.h>

/* Where the ring begins, with its offsets from there; NULL, with errno, on failure. */
static char *map_ring(int fd, enum sl_ring which, uint32_t size, struct sl_map *map,
		      struct xdp_ring_offset *offset)
{
	struct xdp_mmap_offsets offsets;
	socklen_t length = sizeof(offsets);
	size_t entry = sizeof(struct xdp_desc);
	off_t page = 0;
	void *base;

	map->base = NULL;
	if (size == 0 || size & (size - 1)) {
		errno = EINVAL;
		return NULL;
	}
	if (getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length))
		return NULL;
	/* Kernels before 5.4 had no flags and a smaller struct; they lack need_wakeup too. */
	if (length != sizeof(offsets)) {
		errno = EOPNOTSUPP;
		return NULL;
	}
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
	base = mmap(NULL, map->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, page);
	if (base == MAP_FAILED)
		return NULL;
	map->base = base;
	return base;
}

int sl_map_producer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_prod *ring,
		    struct sl_map *map)
{
	struct xdp_ring_offset offset;
	char *base = map_ring(fd, which, size, map, &offset);

	if (!base)
		return -errno;
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = (uint32_t *)(base + offset.producer);
	ring->consumer = (uint32_t *)(base + offset.consumer);
	ring->flags = (uint32_t *)(base + offset.flags);
	ring->ring = base + offset.desc;
	ring->cached_prod = *ring->producer;
	/* libxdp keeps the consumer of rings that we produce one size ahead. */
	ring->cached_cons = *ring->consumer + size;
	return 0;
}

int sl_map_consumer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_cons *ring,
		    struct sl_map *map)
{
	struct xdp_ring_offset offset;
	char *base = map_ring(fd, which, size, map, &offset);

	if (!base)
		return -errno;
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = (uint32_t *)(base + offset.producer);
	ring->consumer = (uint32_t *)(base + offset.consumer);
	ring->flags = (uint32_t *)(base + offset.flags);
	ring->ring = base + offset.desc;
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
