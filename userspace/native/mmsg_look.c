// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <errno.h>

#include "busy_poll.h"
#include "mmsg_state.h"

/*
 * One socket a call, until one is found that has a queue to poll: it gets one by its first
 * packet, and there may be thousands of sockets that have none.
 */
static bool find_polled(struct sl_mmsg *m)
{
	const struct sl_socket *s = &m->socket[m->polled < m->sockets ? m->polled : 0];

	if (m->polls && m->polled < m->sockets && s->fd >= 0)
		return true;
	m->polled = m->polled + 1 < m->sockets ? m->polled + 1 : 0;
	s = &m->socket[m->polled];
	m->polls = m->sockets && s->fd >= 0 && sl_busy_poll_napi(s->fd);
	return m->polls;
}

bool sl_mmsg_look(struct sl_mmsg *m)
{
	if (!find_polled(m))
		return false;
	/* A receive call that waits for nothing polls once (__skb_recv_udp, net/ipv4/udp.c). */
	if (recv(m->socket[m->polled].fd, NULL, 0, MSG_DONTWAIT | MSG_PEEK) < 0 && errno != EAGAIN)
		m->statistics.errors++; /* a pending one, which is told only once */
	return true;
}
