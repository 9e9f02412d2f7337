/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Several queues served as one: who has something, fairly, and sleeping until
 * somebody has.
 *
 * A group is one epoll set of all lanes' sockets (lanes at their quota are left
 * out: they would keep it ready for ever), a descriptor that wakes a sleeper when the
 * group is closed, and a netlink socket that tells of interfaces that change,
 * because an AF_XDP socket whose interface vanishes is silent: poll says nothing.
 */
#ifndef SL_WAIT_H
#define SL_WAIT_H

#include <stdint.h>

#include "batch.h"
#include "queue.h"

/* cffi: begin */

struct sl_group;

/*
 * Over count queues, which must outlive it.  slot: which of a queue's two watchers it
 * becomes (0: the set of all queues, 1: a set of one).  NULL with *error set.
 */
struct sl_group *sl_group_new(struct sl_queue **queues, uint32_t count, uint32_t slot,
			      struct sl_error *error);

/*
 * One descriptor more that ends the waiting: sl_group_receive then returns -EAGAIN, when
 * the queues have nothing.  Not owned.  0 or -errno.
 */
int sl_group_watch(struct sl_group *group, int fd);

/* Wakes whoever waits; nothing is received any more.  The last one out closes the descriptors. */
void sl_group_close(struct sl_group *group);
void sl_group_free(struct sl_group *group);

/* Ready for reading when something may be received, or should be known; -1 when closed. */
int sl_group_fd(const struct sl_group *group);

/*
 * At most maximum packets of one queue; the next call begins with the next
 * queue.  Waits up to timeout seconds, negative: without end.  Returns the
 * number of packets (0: the timeout passed), or
 *
 *      -EINTR    a signal; call again
 *      -EAGAIN   the descriptor of sl_group_watch is ready
 *      -EBADF    closed, maybe meanwhile
 *      -ENXIO    the interface is gone
 *      -EDQUOT   without a timeout, but every lane holds all it may: would wait for ever
 *      -EPROTO   as sl_queue_receive
 */
int sl_group_receive(struct sl_group *group, struct sl_batch *batch, uint32_t maximum,
		     double timeout);

/* cffi: end */

#endif /* SL_WAIT_H */
