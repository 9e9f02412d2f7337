/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AF_XDP sockets, one step per function, so that the caller can name the step
 * that failed.  Opening needs CAP_NET_RAW (and CAP_IPC_LOCK or enough
 * RLIMIT_MEMLOCK); what comes after binding needs nothing.
 *
 * Raw system calls, not libxdp's set-up functions: those keep state of their own
 * in the process that opened the socket, and ours may be handed to another one.
 *
 *      socket 0   UMEM, fill and completion rings, receive ring, bind to (interface, queue)
 *      socket 1.. receive ring, bind with XDP_SHARED_UMEM to socket 0: same UMEM, same fill ring
 *      last       transmit ring instead, bound likewise
 */
#ifndef SL_XSK_H
#define SL_XSK_H

#include <stdint.h>

/* cffi: begin */

/* XDP_STATISTICS; counted by the kernel since the socket was opened. */
struct sl_xsk_statistics {
	uint64_t rx_dropped;               /* no frame to put it in, or too long for one */
	uint64_t rx_invalid_descs;         /* we put nonsense into the fill ring */
	uint64_t tx_invalid_descs;         /* we put nonsense into the transmit ring */
	uint64_t rx_ring_full;             /* the application did not read in time */
	uint64_t rx_fill_ring_empty_descs; /* no frame to put it in; of all the queue's sockets */
	uint64_t tx_ring_empty_descs; /* the kernel looked for packets to send and found none */
};

#define SL_XSK_ZEROCOPY 1
#define SL_XSK_COPY 2
#define SL_XSK_SHARED 4
#define SL_XSK_SG 8

/* All return 0 (or what is said) or -errno. */

int sl_xsk_socket(void); /* a descriptor, close-on-exec */
int sl_xsk_register(int fd, uint8_t *area, uint64_t size, uint32_t frame_size);
int sl_xsk_umem_rings(int fd, uint32_t fill, uint32_t completion);
int sl_xsk_receive_ring(int fd, uint32_t size);
int sl_xsk_transmit_ring(int fd, uint32_t size);

/*
 * Puts the frames 0 to count - 1 into the fill ring.  Before binding: zero-copy
 * drivers take them from there when the queue starts.
 */
int sl_xsk_fill(int fd, uint32_t ring_size, uint32_t count, uint32_t frame_size);

/*
 * flags: SL_XSK_ZEROCOPY, SL_XSK_COPY (with need_wakeup, always), both with SL_XSK_SG where
 * packets may be in several frames (Linux 6.6), or SL_XSK_SHARED with the first socket's
 * descriptor, whose flags it shares.  -EBUSY right after another socket on the queue was closed:
 * the kernel frees the queue a moment later, try again.
 */
int sl_xsk_bind(int fd, uint32_t ifindex, uint32_t queue, uint32_t flags, int shared_fd);

/* 1: zero-copy, 0: copy (XDP_OPTIONS, the truth rather than what was asked for) */
int sl_xsk_zerocopy(int fd);

int sl_xsk_statistics(int fd, struct sl_xsk_statistics *statistics);

/*
 * 0: all is well; -ENETDOWN: the interface is down, and may come up again;
 * -ENXIO: the interface is gone, this socket will never receive again.
 * poll and epoll say nothing of either.
 */
int sl_xsk_check(int fd);

/*
 * Packets sent in one system call, at least 32 (the kernel's default) and at
 * most the transmit ring's size.  -ENOPROTOOPT before Linux 6.17.
 */
int sl_xsk_transmit_budget(int fd, uint32_t packets);

/*
 * Bytes of packets on their way out that the socket may have in copy mode
 * (SO_SNDBUFFORCE, needs CAP_NET_ADMIN).
 */
int sl_xsk_send_buffer(int fd, int bytes);

/* Receive queues of an interface of this network namespace (ethtool channels). */
int sl_xsk_queues(const char *interface);

/* cffi: end */

#endif /* SL_XSK_H */
