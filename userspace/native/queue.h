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
 *               |                        | sl_queue_echo, sl_queue_forward
 *               |      completion        v
 *               +----------------- +----------+  sl_queue_send  +------+
 *                                  | transmit | <-------------- | free |
 *                                  +----------+ --------------> +------+
 *                                       ^        completion      |  ^
 *                     sl_queue_send_own |                        |  | sl_queue_unreserve
 *                                  +----------+ sl_queue_reserve |  |
 *                                  | reserved | <----------------+  |
 *                                  +----------+ --------------------+
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
 * A packet in several frames (jumbo frames) holds all of them, and takes as many
 * entries of its ring, so nothing of this changes; see queue_chain.c.
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
#define SL_LONGEST 66560 /* bytes; room for an IP packet of 65,535 with any headers below it */

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
	uint32_t cookie;  /* of struct sluice_meta; 0: there is no metadata */
	uint32_t longest; /* bytes of a packet in several frames; 0: the sockets allow none */
	uint32_t lanes;   /* in order of priority, highest first */
	struct sl_lane_config lane[SL_QUEUE_LANES];
};

/* Where the frames are.  total = free + reserved + kernel + transmit + sum(application). */
struct sl_frames {
	uint32_t total;
	uint32_t free;     /* to build packets in */
	uint32_t reserved; /* the application writes payloads into them */
	uint32_t kernel;
	uint32_t transmit; /* in the transmit ring, on the wire, or in the completion ring */
	uint32_t application[SL_QUEUE_LANES]; /* by position in sl_queue_config.lane */
};

struct sl_queue_counters {
	uint64_t received[SL_QUEUE_LANES];       /* packets */
	uint64_t received_bytes[SL_QUEUE_LANES]; /* of whole packets with their headers */
	uint64_t jumbo[SL_QUEUE_LANES];          /* of those received, in several frames */
	uint64_t too_long[SL_QUEUE_LANES];       /* discarded: in several frames, above longest */
	uint32_t waiting[SL_QUEUE_LANES];        /* in the receive ring, not read yet */
	uint64_t sent;      /* packets put into the transmit ring, echoes included */
	uint64_t completed; /* of those, done with */
	uint64_t echoed;
	uint64_t echo_refused; /* not a packet that may be answered, or the ring was full */
	uint64_t forwarded;
	uint64_t forward_refused; /* errors[] of sl_queue_forward said why */
	uint64_t kicks;           /* system calls to start sending */
	uint64_t wakeups;         /* system calls because the fill ring had run dry */
	uint64_t polls;           /* system calls to have the kernel look at the interface */
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

/* Fills all columns but sources; puts together what is in several frames. */
void sl_queue_columns(struct sl_batch *batch);
/* After the others. */
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
 * ran out, or -EMSGSIZE (*bad is the index of one that fits neither MTU nor frame), -EFAULT (one
 * is not within size), -EBADF, -ENXIO (the interface is gone), -EPROTO.
 */
int sl_queue_send(struct sl_queue *queue, struct sl_template *const *built, uint32_t templates,
		  const uint8_t *data, uint64_t size, const uint32_t *offsets,
		  const uint32_t *lengths, uint32_t count, uint32_t *bad);

/*
 * Sends the batch's own frames back to where they came from (sl_reverse); the
 * batch is used up.  What can't be answered, and packets in several frames, go back
 * to the kernel.  Returns how many were sent, or -EINVAL as sl_queue_release, -EBADF.
 */
int sl_queue_echo(struct sl_batch *batch, int checksum);

/*
 * Where the payload begins in a reserved frame: the longest headers fit in front of it, and
 * it is on a cache line of its own.
 */
#define SL_HEADROOM 128

/*
 * Up to count free frames become the application's, to write payloads into: offsets[i] is
 * where a payload begins in the area, lengths[i] is set to length, for which there must be
 * room behind it.  How many there were, or -EINVAL, -EBADF, -EPROTO.
 */
int sl_queue_reserve(struct sl_queue *queue, uint32_t count, uint32_t length, uint32_t *offsets,
		     uint32_t *lengths);

/* They are free again.  0, or -EINVAL: one of them is not reserved; none was given back then. */
int sl_queue_unreserve(struct sl_queue *queue, const uint32_t *offsets, uint32_t count);

/* The whole memory, also of a closed queue while somebody holds frames; NULL when it is gone. */
uint8_t *sl_queue_area(struct sl_queue *queue, uint64_t *size);

/*
 * Sends payloads that lie in reserved frames, without a copy: headers are written in front of
 * them.  As sl_queue_send otherwise; what was not accepted stays reserved, with its payload.
 * -EINVAL: *bad is not reserved, or given twice, or reaches out of its frame; nothing was sent.
 */
int sl_queue_send_own(struct sl_queue *queue, struct sl_template *const *built, uint32_t templates,
		      const uint32_t *offsets, const uint32_t *lengths, uint32_t count,
		      uint32_t *bad);

/*
 * Sends payloads that are put together from pieces, payload i from the next pieces[i] ones:
 * each is copied once, into the frame.  As sl_queue_send otherwise.
 */
int sl_queue_send_pieces(struct sl_queue *queue, struct sl_template *const *built,
			 uint32_t templates, const struct sl_piece *piece, const uint32_t *pieces,
			 const uint32_t *lengths, uint32_t count, uint32_t *bad);

/*
 * Sends every payload of the batch, as it is now, to each of the templates: to the last one in
 * its own frame, which returns to the receive pool when it is sent, to those before in copies
 * (of a packet in several frames to all of them).
 * The batch is used up.  errors, templates for each packet, says what became of it: 0, or
 * EMSGSIZE (does not fit the MTU, or no frame), EBADMSG (not a UDP packet), EAGAIN (no frame
 * or no room in the ring).  With checksum, UDP checksums are computed over the payloads; without,
 * they are what the sender's say (sl_payload_sum), for unchanged payloads that came over a wire.
 * Returns how many packets were accepted, or -EINVAL as sl_queue_release, -EBADF, -EPROTO,
 * -ENXIO.
 */
int sl_queue_forward(struct sl_batch *batch, struct sl_template *const *built, uint32_t templates,
		     int checksum, int32_t *errors);

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
