/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernel UDP sockets read and written many datagrams per system call
 * (recvmmsg(2), sendmmsg(2)), with the lanes of the policy behind them.
 *
 * Receiving.  One area holds all frames.  A frame is in exactly one place:
 *
 *   free -> slot (offered to recvmmsg) -> queued in a lane -> held by the
 *   application -> free
 *
 * and goes back to free at once when its datagram is dropped.  Each lane owns a
 * quota, queued and held together, so a lane that nobody reads fills up, drops
 * (counted as lane_full) and costs the others nothing; sockets are always read
 * on.  Frames are small; the rest of a datagram that is longer goes to a spill
 * area and both parts are then joined in one of a few large frames, of which
 * each lane has a number of its own too.  Whatever happens:
 *
 *   received = delivered + queued + replied + reply_failed + discarded by the
 *              classifier + truncated + no_large_frame + lane_full
 *
 * Datagrams of one flow that arrive together may share a message (UDP_GRO, where
 * options.gro asks for it, and kernel and interface have it): one pass through the kernel's stack and one
 * entry of recvmmsg for up to 64 of them.  They are copied into a frame each, and
 * from there on are as if they had come by themselves.  What is more than a call
 * wants stays in the message for the next one.
 *
 * MSG_WAITFORONE and the timeout of recvmmsg are not used: the timeout is only
 * looked at after a datagram arrived (recvmmsg(2), BUGS), so a call could last
 * for ever.  sl_mmsg_receive waits in poll or epoll instead and reads without blocking.
 *
 * Time of arrival is CLOCK_MONOTONIC when recvmmsg returned: the same for the
 * datagrams of one call, later than the real arrival by the wait in the socket
 * buffer.  With options.timestamps it is when the kernel took the datagram from the
 * interface; it stamps with CLOCK_REALTIME, which is brought to the other clock by their
 * difference at each call, so a step of the wall clock shows in what waited meanwhile.
 *
 * One thread owns a struct sl_mmsg and the classifier given to it.
 */
#ifndef SL_MMSG_H
#define SL_MMSG_H

#include <stdint.h>

#include "abi.h"
#include "batch.h"
#include "classify.h"

/* cffi: begin */

#define SL_MMSG_BURST 64 /* datagrams of one recvmmsg or sendmmsg call */
#define SL_MMSG_SOCKETS 1024
#define SL_MMSG_CHECK_MS 500      /* between two looks at whether all sockets are still there */
#define SL_MMSG_LARGE_FRAME 65536 /* any UDP payload (RFC 768: 65,527 bytes and less) */
#define SL_MMSG_DRAIN 255         /* in place of a lane: a socket that refuses every datagram */
#define SL_MMSG_SHARE_ONE 65536   /* share[] in 1/65536 of what one call hands out */
#define SL_MMSG_ERRORS 1024       /* errors of sent datagrams that are kept */

struct sl_mmsg_options {
	uint32_t frame_size;   /* bytes, 64 to SL_MMSG_LARGE_FRAME */
	uint32_t large_frames; /* of each lane; 0: longer than a frame is dropped as truncated */
	uint32_t gro;          /* 1: datagrams of one flow may share a message (UDP_GRO) */
	uint32_t timestamps;   /* 1: the time of arrival is the kernel's (SO_TIMESTAMPNS) */
	uint32_t drain;        /* times maximum read per call while a socket overflows, >= 1 */
	uint32_t quota[SLUICE_MAX_LANES]; /* frames, queued and held together */
	uint32_t share[SLUICE_MAX_LANES]; /* guaranteed to the lane when it has that much */
};

struct sl_mmsg_statistics {
	uint64_t received;       /* datagrams that recvmmsg returned */
	uint64_t delivered;      /* handed to the application */
	uint64_t replied;        /* heartbeats answered */
	uint64_t reply_failed;   /* heartbeats whose answer the kernel refused */
	uint64_t discarded;      /* the classifier gave no lane: see its counters */
	uint64_t truncated;      /* longer than a frame, and large frames are off */
	uint64_t no_large_frame; /* longer than a frame, and all large ones of its lane are in use */
	uint64_t overflowed;     /* lost in full socket buffers, never received (SO_MEMINFO) */
	uint64_t errors;         /* pending socket errors taken by recvmmsg (ICMP) */
	uint64_t reported;       /* errors of sent datagrams taken from the sockets' error queues */
	uint64_t unread;         /* those of them that newer ones have pushed out, unread */
	uint64_t floods; /* times that a socket got so many that they were not taken for a while */
	uint64_t calls;  /* of recvmmsg that returned datagrams */
	uint64_t shared; /* datagrams that came in one message with others (UDP_GRO) */
	uint64_t lane_full[SLUICE_MAX_LANES];
	uint64_t lane_delivered[SLUICE_MAX_LANES];
	uint32_t queued[SLUICE_MAX_LANES];
	uint32_t held[SLUICE_MAX_LANES];
};

struct sl_mmsg;

/*
 * The classifier stays the caller's and must outlive it.  NULL with *error =
 * EINVAL (an option out of range), ENOMEM or epoll's errno.
 */
struct sl_mmsg *sl_mmsg_new(const struct sl_mmsg_options *options, struct sl_classifier *classifier,
			    int *error);
void sl_mmsg_free(struct sl_mmsg *m);
uint8_t *sl_mmsg_area(const struct sl_mmsg *m);
uint64_t sl_mmsg_area_size(const struct sl_mmsg *m);
/*
 * Adds a bound UDP socket (it stays the caller's), whose datagrams are
 * classified as sent to port.  0 or -errno.
 */
int sl_mmsg_add(struct sl_mmsg *m, int fd, uint16_t port);
/*
 * Says that the kernel puts into an added socket what it has chosen for that lane alone
 * (bpf/select.bpf.c): datagrams are neither classified nor limited again, and each call of
 * sl_mmsg_receive reads as many of a lane as it may hand out, highest first; the rest waits
 * in the sockets.  Of a drain (SL_MMSG_DRAIN) what it refuses is no overflow.  0, -ENOENT, or
 * -EINVAL: no lane, or options.gro is set (what shares a message may have several lanes).
 */
int sl_mmsg_set_lane(struct sl_mmsg *m, int fd, uint8_t lane);
/*
 * Forgets a socket.  Its place is not used again, so that what came through it
 * is never answered through another: SL_MMSG_SOCKETS counts removed ones too.
 */
int sl_mmsg_remove(struct sl_mmsg *m, int fd);
/*
 * Readable (epoll, poll, select) while a receive would return at once; or -errno.  From the
 * first call on every datagram costs a little more, so ask only for what an event loop needs.
 */
int sl_mmsg_fileno(struct sl_mmsg *m);
/*
 * Fills the batch, with at most maximum datagrams, highest lane first, after reading as many
 * from the sockets, or drain times as many while datagrams of several lanes
 * arrive: a high lane must not wait, or get lost, behind a flood in a socket
 * buffer that is not read fast enough.
 * budget bounds the reading further, 0: it does not.  Waits timeout_ms for the
 * first one; 0: does not wait, -1: for ever.  Returns how many; 0 on timeout; -EINTR when a
 * signal came first, -EAGAIN when datagrams came but all were dropped: call again
 * for the rest of the time; another -errno when a socket is no longer usable.  All
 * columns are ready then; batch->addresses and batch->sizes (socket) are taken.
 *
 * That a descriptor was closed elsewhere, or now is another socket (-EBADF), is
 * found within SL_MMSG_CHECK_MS at the latest: epoll says nothing of it.
 */
int sl_mmsg_receive(struct sl_mmsg *m, struct sl_batch *batch, uint32_t maximum, uint32_t budget,
		    int timeout_ms);
/*
 * Gives the frames of a batch back and empties it.  Returns how many; fewer
 * than batch->count when one of them was not held by the application.
 */
uint32_t sl_mmsg_release(struct sl_mmsg *m, struct sl_batch *batch);
void sl_mmsg_read_statistics(struct sl_mmsg *m, struct sl_mmsg_statistics *statistics);
/* Frames in each place: free, slot, queued, held; their sum never changes. */
void sl_mmsg_census(const struct sl_mmsg *m, uint32_t *counts);

/*
 * What to send: payload i is base + offset[i] with length[i] bytes; offset NULL:
 * one behind the other.  Or, with piece not NULL, it is put together from
 * piece[end[i - 1]] to piece[end[i] - 1], whose lengths add up to length[i]; none has more
 * than most (1 to SL_PIECES_MAX) of them, and offset is NULL.  With destinations 1 all go to destination[0];
 * otherwise each to its own.  order, if not NULL, has the count payloads to send
 * (offset is not NULL then); failures are told by payload.
 */
struct sl_outgoing {
	const uint8_t *base;
	const uint32_t *offset;
	const uint32_t *length;
	const struct sl_source *destination;
	uint32_t count;
	uint32_t destinations;
	const uint32_t *order;
	const struct sl_piece *piece;
	const uint32_t *end;
	uint32_t most;
};

/*
 * What the network, or this host, said of a datagram that was sent: struct sock_extended_err
 * (linux/errqueue.h) with the addresses.
 */
struct sl_socket_error {
	struct sl_source destination; /* where the datagram was to go */
	struct sl_source offender;    /* who said it; family 0: this host */
	uint64_t time_ns;             /* CLOCK_MONOTONIC, when it was taken from the socket */
	uint32_t error;               /* errno */
	uint32_t mtu;                 /* of the way, with EMSGSIZE; else 0 */
	uint16_t port;                /* the service port, of the socket */
	uint8_t origin;               /* SO_EE_ORIGIN_LOCAL (1), _ICMP (2), _ICMP6 (3) */
	uint8_t type, code;           /* of the ICMP message */
	uint8_t reserved[3];
};

/*
 * How many errors wait to be taken: the last SL_MMSG_ERRORS of them.  They are moved here from
 * the sockets' queues by whatever call meets them, receiving, waiting and sending, and with look
 * all sockets are asked first.
 *
 * Anybody who guesses a service port can send ICMP messages that name it, and the queue of errors
 * takes room from the receive buffer.  So a socket of which more than 10,000 a second come, or
 * 8,192 at once, is not told of errors for a second (counted as a flood).
 */
uint32_t sl_mmsg_errors(struct sl_mmsg *m, int look);
/* Takes the oldest ones, at most maximum; how many. */
uint32_t sl_mmsg_take_errors(struct sl_mmsg *m, struct sl_socket_error *errors, uint32_t maximum);

struct sl_send_result {
	uint32_t sent;
	uint32_t failed;       /* skipped */
	uint32_t next;         /* datagrams before it are sent or failed; == count: done */
	uint32_t asynchronous; /* ICMP errors of earlier datagrams, taken on the way */
	int32_t stopped;       /* 0, or why next is not count: EINTR, EAGAIN, ENOBUFS, EBADF, ... */
};

/*
 * Sends from datagram result->next on.  One that the kernel refuses (EMSGSIZE,
 * EPERM, ENETUNREACH, ...) is skipped, its index and errno go to
 * failed_index[], failed_errno[] (room for count each), the rest goes out.  An
 * error that belongs to an earlier datagram (ECONNREFUSED and the like, pending
 * on the socket) does not stop or skip anything.  A full socket buffer or
 * device queue is waited for, timeout_ms in all.  The socket's family decides
 * how addresses are written; an IPv6 destination on an IPv4 socket fails with
 * EAFNOSUPPORT.
 */
void sl_mmsg_send(int fd, const struct sl_outgoing *out, int timeout_ms, uint32_t *failed_index,
		  int32_t *failed_errno, struct sl_send_result *result);

/*
 * The same through a socket of m, the n-th that was added (from 0), with EBADF when it is not
 * there any more: never into whatever has got the number of a closed descriptor.
 */
void sl_mmsg_send_from(struct sl_mmsg *m, uint32_t n, const struct sl_outgoing *out, int timeout_ms,
		       uint32_t *failed_index, int32_t *failed_errno,
		       struct sl_send_result *result);

/*
 * Sends every payload of a batch to where it came from, through the socket by
 * which it came: one socket after the other, the one with the batch's first
 * datagram first, so with no more calls of sendmmsg than that takes.  The batch
 * keeps its frames.
 *
 * As sl_mmsg_send_from, but a socket that can't be written to fails with its own
 * datagrams only.  So result->stopped is 0, or EINTR: then call again with the
 * same result and order[] (room for the batch's count; its contents are kept from the
 * call with result->next 0) for the rest of the time.  The batch must be one that m filled.
 */
void sl_mmsg_send_back(struct sl_mmsg *m, const struct sl_batch *batch, uint32_t *order,
		       int timeout_ms, uint32_t *failed_index, int32_t *failed_errno,
		       struct sl_send_result *result);

/* cffi: end */

#endif /* SL_MMSG_H */
