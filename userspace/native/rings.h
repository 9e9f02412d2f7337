/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The four rings of AF_XDP (Documentation/networking/af_xdp.rst), mapped from
 * nothing but a socket's descriptor, so that it does not matter who opened it.
 *
 *      we produce:  fill        frames for the kernel to receive into
 *                   transmit    packets to send
 *      it produces: receive     packets received, one ring per socket
 *                   completion  frames that were sent
 *
 * Fill and completion belong to the queue's first socket and serve all of them.
 * The ring operations are libxdp's inline functions (xdp/xsk.h); here are only
 * mapping and looking.
 */
#ifndef SL_RINGS_H
#define SL_RINGS_H

#include <stddef.h>
#include <stdint.h>

#include <xdp/xsk.h>

enum sl_ring {
	SL_RING_FILL,
	SL_RING_COMPLETION,
	SL_RING_TRANSMIT,
	SL_RING_RECEIVE,
};

struct sl_map {
	void *base;
	size_t size;
};

/*
 * Map a ring that was made with size entries (a power of 2).  The cached indices
 * start where the shared ones are.  0 or -errno.
 */
int sl_map_producer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_prod *ring,
		    struct sl_map *map);
int sl_map_consumer(int fd, enum sl_ring which, uint32_t size, struct xsk_ring_cons *ring,
		    struct sl_map *map);
void sl_unmap(struct sl_map *map);

/*
 * Entries between the shared indices.  Acquire: who sees an index also sees the
 * entries written before it.
 */
static inline uint32_t sl_ring_level(const uint32_t *producer, const uint32_t *consumer)
{
	return __atomic_load_n(producer, __ATOMIC_ACQUIRE) -
	       __atomic_load_n(consumer, __ATOMIC_ACQUIRE);
}

/*
 * All entries waiting, also those that came since the last look; libxdp's peek
 * looks again only when it knows of none, which makes small batches out of what
 * could be a large one.
 */
static inline uint32_t sl_ring_waiting(struct xsk_ring_cons *ring)
{
	/* Acquire: pairs with the kernel's release, entries are written before the index. */
	ring->cached_prod = __atomic_load_n(ring->producer, __ATOMIC_ACQUIRE);
	return ring->cached_prod - ring->cached_cons;
}

#endif /* SL_RINGS_H */
