/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A batch: packets received together, as columns over one data area.
 *
 * The columns are arrays of their own (structure of arrays), so that a caller
 * who wants only lengths touches only lengths.  A batch does not own data; the
 * backend (AF_XDP queue, recvmmsg, plain sockets) that filled it does, and gets
 * it back when the batch is released.  The struct is used again and again:
 * nothing is allocated in steady state.
 *
 * A backend fills count, data and data_size when it receives.  It may fill the
 * columns then, or later when they are asked for: columns_ready and
 * sources_ready say what is already true.
 */
#ifndef SL_BATCH_H
#define SL_BATCH_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* Where a packet came from. */
struct sl_source {
	uint8_t address[16]; /* network order; IPv4 is mapped (::ffff:a.b.c.d) */
	uint32_t scope;      /* interface index for link-local IPv6, else 0 */
	uint16_t port;       /* host order */
	uint8_t family;      /* 4, 6, or 0: unknown */
	uint8_t reserved;
};

struct sl_batch {
	uint32_t capacity;
	uint32_t count;
	uint8_t *data;        /* what offsets count from */
	uint64_t data_size;   /* bytes; every offset + length is within */
	uint64_t received_ns; /* CLOCK_MONOTONIC of the receive call */
	uint8_t columns_ready;
	uint8_t sources_ready;
	uint32_t chained; /* AF_XDP: packets in several frames */
	void *owner;      /* the backend's: who filled it */

	/*
	 * Where all columns are, if they are in one piece, as sl_batch_new makes them;
	 * else NULL (a backend may have allocated them one by one).
	 */
	uint8_t *columns;
	uint64_t columns_size;

	/* columns, capacity entries each, 64-byte aligned */
	uint64_t *times;     /* CLOCK_MONOTONIC, ns */
	uint64_t *addresses; /* AF_XDP: descriptor address; else free for the backend */
	uint64_t *gathered;  /* sl_batch_gather's */
	uint32_t *offsets;   /* of the payload in data */
	uint32_t *lengths;   /* of the payload, bytes */
	uint32_t *peers;     /* configured peer's number, 0: stranger */
	uint32_t *sizes;     /* AF_XDP: whole packet, bytes; else free for the backend */
	struct sl_source *sources;
	uint8_t *lanes;
	uint8_t *kinds;
	uint8_t *classes;
	uint8_t *services;
};

/* NULL: no memory, or capacity is 0 or above SL_BATCH_MAX. */
struct sl_batch *sl_batch_new(uint32_t capacity);
void sl_batch_free(struct sl_batch *batch);

/*
 * batch->gathered[i] = width bytes (1 to 8) at offset of every payload, as a
 * number in network order; 0 where the payload is too short.  0, or -EINVAL.
 */
int sl_batch_gather(struct sl_batch *batch, uint32_t offset, uint32_t width);

/*
 * Copies payload i to to + offsets[i], or, with offsets NULL, to to + i * room: at most room
 * bytes of it, for payloads 0 to count - 1.
 */
void sl_batch_copy(const struct sl_batch *batch, uint32_t count, uint8_t *to,
		   const uint32_t *offsets, uint32_t room);

/*
 * The other way round than gather: values[i] is written as width bytes (1 to 8) in network
 * order at data + offsets[i] + offset.  0, or -EINVAL.
 */
int sl_scatter(uint8_t *data, const uint32_t *offsets, uint32_t count, uint32_t offset,
	       uint32_t width, const uint64_t *values);

/* A part of a payload that is put together from several. */
struct sl_piece {
	const uint8_t *base;
	uint64_t length;
};

#define SL_BATCH_MAX 65536
#define SL_PIECES_MAX 64 /* of one payload */

/* cffi: end */

#endif /* SL_BATCH_H */
