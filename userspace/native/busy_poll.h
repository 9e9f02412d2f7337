/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Busy polling: a receive call that finds nothing looks again for a while before it
 * sleeps, and has the kernel look at the interface's queue meanwhile.
 * Documentation/networking/napi.rst and af_xdp.rst.
 *
 * The settings are the socket's, so whoever is handed one follows them without being
 * told.  Which queue (NAPI instance) a socket belongs to the kernel finds out by itself,
 * when it binds or by the first packet, and not everywhere: AF_XDP in copy mode has had
 * none since Linux 6.13 (xsk_bind, net/xdp/xsk.c).  Then there is only the looking again.
 */
#ifndef SL_BUSY_POLL_H
#define SL_BUSY_POLL_H

#include <stdint.h>

/* cffi: begin */

/*
 * SO_BUSY_POLL, SO_PREFER_BUSY_POLL and SO_BUSY_POLL_BUDGET (0: the kernel's own, 8 packets).
 * 0 or -errno: -EPERM, more than the socket has needs CAP_NET_ADMIN; -ENOPROTOOPT, a
 * kernel without them (the last two are of Linux 5.11).
 */
int sl_busy_poll_set(int fd, uint32_t microseconds, uint32_t budget, int prefer);

/* SO_BUSY_POLL, microseconds; 0 also where there is none.  At first net.core.busy_read. */
uint32_t sl_busy_poll_get(int fd);

/* The NAPI instance that the kernel polls for this socket (SO_INCOMING_NAPI_ID); 0: none known. */
uint32_t sl_busy_poll_napi(int fd);

/* cffi: end */

#endif /* SL_BUSY_POLL_H */
