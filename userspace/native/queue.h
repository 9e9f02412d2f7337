/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One receive queue of an interface: its UMEM, its rings, one socket per lane.
 *
 * Every frame is in exactly one place at any time, and the counts of all places
 * add up to the total:
 *
 *                      receive                    sl_queue_release
 *          +--------+ ----------> +-------------+ ----------> +--------+
 *          | kernel |             | application |             | kernel |
 *          +--------+             |   by lane   |             +--------+
 *               ^                 +-------------+
 *               |                        | sl_queue_echo
 *               |      completion        v
 *               +----------------- +----------+  sl_queue_send  +------+
 *                                  | transmit | <-------------- | free |
 *                                  +----------+ --------------> +------+
 *                                                 completion
 *
 * "kernel" is the fill ring, the kernel's hands and the receive rings.  There are
 *
 *      receive rings of all lanes + quotas of all lanes + reserve
 *
 * frames to receive into, the fill ring has room for all of them, and a lane
 * never holds more than its quota (frames that it echoed and that are not yet
 * sent count).  So what a lane does, or its application does not do, takes no
 * frame from another lane: the kernel always has one for it.  A lane at its
 * quota is not read; its ring fills, and the kernel drops for that lane alone.
 *
 * The fill ring has twice as many entries as there are frames.  The kernel moves
 * its shared consumer index only now and then (net/xdp/xsk_queue.h: at the end of
 * a poll, or when it has used up all entries that it had seen), so an entry may
 * still look taken when its frame has already been received and is given back.
 * What it has not told is at most what it had seen, so at most all frames; what
 * is really in the ring is at most all frames too.
 *
 * Sending has a socket of its own, which nobody waits on.  A socket in an epoll
 * set wakes the set for each packet that leaves its send buffer (sock_wfree), and
 * each look at a socket that sends makes the kernel try to send.
 *
 * A queue has one lock, so that receiving, sending and giving back from several
 * threads is safe; they wait for each other.  Nothing that can block is done
 * under it but system calls that don't wait.
 */
#ifndef SL_QUEUE_H
#define SL_QUEUE_H

#include <stdint.h>

#include "batch.h"
#include "headers.h"

/* cffi: begin */

#define SL_QUEUE_LANES 8

struct sl_lane_config {
	int32_t fd;      /* AF_XDP socket, bound; the queue owns it from then on */
	uint32_t ring;   /* entries of its receive ring */
	uint32_t quota;  /* frames that the application may hold */
	uint32_t number; /* lane number of the policy */
	uint32_t share;  /* of a batch that higher lanes must leave it, in 1/65536 */
};

struct sl_queue_config {
	int32_t umem_fd;          /* owned as the sockets are */
	int32_t transmit_fd;      /* AF_XDP socket with the transmit ring, likewise */
	uint32_t frame_size;      /* bytes, 2048 or 4096 */
	uint32_t fill_frames;     /* frames to receive into, all in the fill ring now */
	uint32_t transmit_frames; /* frames after those, for sending */
	uint32_t fill_ring;       /* entries; >= 2 * fill_frames */
	uint32_t completion_ring;
	uint32_t transmit_ring;
	uint32_t cookie; /* of struct sluice_meta; 0: there is no metadata */
	uint32_t lanes;  /* in order of priority, highest first */
	struct sl_lane_config lane[SL_QUEUE_LANES];
};

/* Where the frames are.  total = free + kernel + transmit + sum(application). */
struct sl_frames {
	uint32_t total;
	uint32_t free; /* to build packets in */
	uint32_t kernel;
	uint32_t transmit; /* in the transmit ring, on the wire, or in the completion ring */
	uint32_t application[SL_QUEUE_LANES]; /* by position in sl_queue_config.lane */
};

struct sl_queue_counters {
	uint64_t received[SL_QUEUE_LANES];       /* packets */
	uint64_t received_bytes[SL_QUEUE_LANES]; /* of whole frames */
	uint32_t waiting[SL_QUEUE_LANES];        /* in the receive ring, not read yet */
	uint64_t sent;      /* packets put into the transmit ring, echoes included */
	uint64_t completed; /* of those, done with */
	uint64_t echoed;
	uint64_t echo_refused; /* not a packet that may be answered, or the ring was full */
	uint64_t kicks;        /* system calls to start sending */
	uint64_t wakeups;      /* system calls because the fill ring had run dry */
};

struct sl_error {
	int32_t code;  /* positive errno */
	char step[60]; /* what failed */
};

struct sl_queue;

/*
 * Takes over all descriptors of config, maps everything.  NULL with *error set:
 * the descriptors are still the caller's.  EBUSY: somebody has already used these
 * rings, so nobody knows where the frames are.
 */
struct sl_queue *sl_queue_open(const struct sl_queue_config *config, struct sl_error *error);

/*
 * Closes the sockets.  The memory of batches that are still held stays mapped
 * until they are released.
 */
void sl_queue_close(struct sl_queue *queue);

/* After sl_queue_close, when nobody can call any more. */
void sl_queue_free(struct sl_queue *queue);

/*
 * At most maximum packets (and the batch's capacity), highest lane first; the
 * number of packets, or -EBADF: closed, or -EPROTO: the kernel returned a frame
 * that it did not have; the queue is then closed to receiving.
 */
int sl_queue_receive(struct sl_queue *queue, struct sl_batch *batch, uint32_t maximum);

/* Fills all columns but sources. */
void sl_queue_columns(struct sl_batch *batch);
void sl_queue_sources(struct sl_batch *batch);

/*
 * The batch's frames go back to the kernel.  0, or -EINVAL: one of them is not
 * the application's (released before, say); none was given back then.
 */
int sl_queue_release(struct sl_batch *batch);

/*
 * Sends payloads data + offsets[i], lengths[i] bytes each; offsets NULL: they
 * lie one after the other.  With templates 1 all go to built[0]; else templates is
 * count, and each goes to its own.  Payloads at one place in a row are summed once.
 * Returns how many were accepted, the first ones; fewer than count when frames or ring
 * ran out, or -EMSGSIZE (*bad is the index of one that is too long), -EFAULT (one
 * is not within size), -EBADF, -ENXIO (the interface is gone), -EPROTO.
 */
int sl_queue_send(struct sl_queue *queue, struct sl_template *const *built, uint32_t templates,
		  const uint8_t *data, uint64_t size, const uint32_t *offsets,
		  const uint32_t *lengths, uint32_t count, uint32_t *bad);

/*
 * Sends the batch's own frames back to where they came from (sl_reverse); the
 * batch is used up.  What can't be answered goes back to the kernel.  Returns how
 * many were sent, or -EINVAL as sl_queue_release, -EBADF.
 */
int sl_queue_echo(struct sl_batch *batch, int checksum);

/* Takes back what was sent; starts sending again if something is left.  Frames still in transmit. */
int sl_queue_reap(struct sl_queue *queue);

void sl_queue_frames(struct sl_queue *queue, struct sl_frames *frames);
/* The same, counted frame by frame: slow, for tests and `sluice doctor`. */
void sl_queue_recount(struct sl_queue *queue, struct sl_frames *frames);
void sl_queue_counters(struct sl_queue *queue, struct sl_queue_counters *counters);

/* The socket of a lane (by position), or -1 when closed; not yours to close. */
int sl_queue_socket(struct sl_queue *queue, uint32_t lane);
int sl_queue_transmit_socket(struct sl_queue *queue);

/* cffi: end */

#endif /* SL_QUEUE_H */
