// SPDX-License-Identifier: Apache-2.0
/* Errors of datagrams that were sent: from the sockets' error queues (ip(7), IP_RECVERR) into a ring. */
#define _GNU_SOURCE
#include "mmsg_state.h"

#include <errno.h>
#include <linux/errqueue.h>
#include <stdlib.h>
#include <string.h>

#define ERRORS_BURST 32           /* of one system call */
#define ERROR_NS 100000ULL        /* each socket has one error in so long for free */
#define FREE_NS (8192 * ERROR_NS) /* saved up at most; what is more is a flood */
#define DEAF_NS 1000000000ULL     /* and then none is heard of for so long */

/* What comes with an error: itself, who sent it, and a time stamp where those are on. */
union control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6)) +
		   CMSG_SPACE(sizeof(struct timespec)) + 64];
};

void sl_mmsg_hear_errors(const struct sl_socket *s, bool on)
{
	int value = on;

	/* An IPv6 socket that speaks IPv4 too has an option for each; turned off, the queue is emptied. */
	if (s->family == AF_INET6)
		setsockopt(s->fd, IPPROTO_IPV6, IPV6_RECVERR, &value, sizeof(value));
	setsockopt(s->fd, IPPROTO_IP, IP_RECVERR, &value, sizeof(value));
}

/* The error in an answer of recvmmsg, or NULL: none that is ours to tell. */
static const struct sock_extended_err *find_error(struct msghdr *h)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
		const struct sock_extended_err *e = (const void *)CMSG_DATA(c);
		bool is_error = (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_RECVERR) ||
				(c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_RECVERR);

		if (is_error &&
		    (e->ee_origin == SO_EE_ORIGIN_LOCAL || e->ee_origin == SO_EE_ORIGIN_ICMP ||
		     e->ee_origin == SO_EE_ORIGIN_ICMP6))
			return e;
	}
	return NULL;
}

/*
 * Whether an error of this host is told already: it says it again each time that the same datagram,
 * or another one like it, is tried.
 */
static bool is_repeated(const struct sl_mmsg *m, const struct sl_socket_error *e)
{
	const struct sl_socket_error *last;

	if (e->origin != SO_EE_ORIGIN_LOCAL || !m->error_count)
		return false;
	last = &m->error[(m->error_head + m->error_count - 1) % SL_MMSG_ERRORS];
	return last->origin == e->origin && last->error == e->error && last->port == e->port &&
	       !memcmp(&last->destination, &e->destination, sizeof(e->destination));
}

static void note(struct sl_mmsg *m, const struct sl_socket *s, const struct sock_extended_err *e,
		 const struct sockaddr_in6 *name, socklen_t name_length, uint64_t now)
{
	struct sl_socket_error error = {
		.time_ns = now,
		.error = e->ee_errno,
		.mtu = e->ee_errno == EMSGSIZE ? e->ee_info : 0,
		.port = s->port,
		.origin = e->ee_origin,
		.type = e->ee_type,
		.code = e->ee_code,
	};
	sl_mmsg_source(&error.destination, name, name_length);
	sl_mmsg_source(&error.offender, (const void *)SO_EE_OFFENDER(e), sizeof(*name));
	if (is_repeated(m, &error))
		return;
	m->statistics.reported++;
	if (m->error_count == SL_MMSG_ERRORS) {
		m->statistics.unread++;
		m->error_count--;
		m->error_head = (m->error_head + 1) % SL_MMSG_ERRORS;
	}
	m->error[(m->error_head + m->error_count++) % SL_MMSG_ERRORS] = error;
}

/* Whether these many more are too many: then the socket is deaf from now on. */
static bool is_flood(struct sl_mmsg *m, struct sl_socket *s, uint32_t more, uint64_t now)
{
	if (s->errors_ns + FREE_NS < now)
		s->errors_ns = now - FREE_NS;
	s->errors_ns += more * ERROR_NS;
	if (s->errors_ns <= now)
		return false;
	s->errors_ns = now + DEAF_NS;
	s->deaf = true;
	sl_mmsg_hear_errors(s, false);
	m->statistics.floods++;
	return true;
}

enum sl_told sl_mmsg_drain_errors(struct sl_mmsg *m, struct sl_socket *s, int error)
{
	struct mmsghdr header[ERRORS_BURST];
	struct sockaddr_in6 name[ERRORS_BURST];
	union control control[ERRORS_BURST];
	enum sl_told told = SL_TOLD_NOTHING;
	uint64_t now;
	int n;

	do {
		for (int i = 0; i < ERRORS_BURST; i++)
			/* The datagram's first bytes, which come along, are not asked for. */
			header[i].msg_hdr = (struct msghdr){
				.msg_name = &name[i],
				.msg_namelen = sizeof(name[i]),
				.msg_control = &control[i],
				.msg_controllen = sizeof(control[i]),
			};
		n = recvmmsg(s->fd, header, ERRORS_BURST, MSG_ERRQUEUE | MSG_DONTWAIT, NULL);
		if (n <= 0)
			break;
		now = sl_now_ns();
		for (int i = 0; i < n; i++) {
			struct msghdr *h = &header[i].msg_hdr;
			const struct sock_extended_err *e = find_error(h);

			if (!e)
				continue;
			note(m, s, e, &name[i], h->msg_namelen, now);
			if (e->ee_origin == SO_EE_ORIGIN_LOCAL && (int)e->ee_errno == error)
				told = SL_TOLD_OWN;
			else if (told == SL_TOLD_NOTHING && e->ee_origin != SO_EE_ORIGIN_LOCAL)
				told = SL_TOLD_EARLIER;
		}
	} while (!is_flood(m, s, n, now) && n == ERRORS_BURST);
	return told;
}

void sl_mmsg_tend_errors(struct sl_mmsg *m, struct sl_socket *s, uint64_t now)
{
	if (!s->deaf) {
		sl_mmsg_drain_errors(m, s, 0);
	} else if (now > s->errors_ns) {
		s->deaf = false;
		sl_mmsg_hear_errors(s, true);
	}
}

uint32_t sl_mmsg_errors(struct sl_mmsg *m, int look)
{
	uint64_t now = sl_now_ns();

	for (uint32_t i = 0; i < m->sockets && look; i++)
		if (m->socket[i].fd >= 0 && !sl_mmsg_check_socket(&m->socket[i]))
			sl_mmsg_tend_errors(m, &m->socket[i], now);
	return m->error_count;
}

uint32_t sl_mmsg_take_errors(struct sl_mmsg *m, struct sl_socket_error *errors, uint32_t maximum)
{
	uint32_t n = 0;

	for (; n < maximum && m->error_count; n++, m->error_count--) {
		errors[n] = m->error[m->error_head];
		m->error_head = (m->error_head + 1) % SL_MMSG_ERRORS;
	}
	return n;
}
