// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "mmsg.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* ENOBUFS (a full device queue) has no event to wait for, so it is asked again this often. */
#define RETRY_MS 1

struct window {
	struct mmsghdr header[SL_MMSG_BURST];
	struct iovec payload[SL_MMSG_BURST];
	struct sockaddr_in6 name[SL_MMSG_BURST];
};

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Length of the name, 0 when an IPv4 socket cannot reach the address. */
static socklen_t write_name(struct sockaddr_in6 *name, int family, const struct sl_outgoing *out,
			    uint32_t i)
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };
	const struct sl_source *to = &out->destination[out->destinations == 1 ? 0 : i];
	struct sockaddr_in *v4 = (struct sockaddr_in *)name;

	memset(name, 0, sizeof(*name));
	if (family == AF_INET) {
		if (memcmp(to->address, mapped, sizeof(mapped)) != 0)
			return 0;
		v4->sin_family = AF_INET;
		v4->sin_port = htons(to->port);
		memcpy(&v4->sin_addr, to->address + sizeof(mapped), sizeof(v4->sin_addr));
		return sizeof(*v4);
	}
	name->sin6_family = AF_INET6;
	name->sin6_port = htons(to->port);
	memcpy(&name->sin6_addr, to->address, sizeof(name->sin6_addr));
	name->sin6_scope_id = to->scope;
	return sizeof(*name);
}

/*
 * Errors that the network reported about an earlier datagram, which the socket
 * keeps and gives to whoever calls next.  The same numbers can be about this
 * datagram (no route); trying it again tells the two apart.
 */
static bool may_be_asynchronous(int error)
{
	return error == ECONNREFUSED || error == EHOSTUNREACH || error == ENETUNREACH ||
	       error == ENOPROTOOPT || error == EHOSTDOWN || error == EPROTO || error == EMSGSIZE ||
	       error == EACCES || error == EOPNOTSUPP;
}

/* Errors of the socket itself: no other datagram would fare better. */
static bool is_final(int error)
{
	return error == EBADF || error == ENOTSOCK || error == EPIPE || error == EFAULT ||
	       error == EDESTADDRREQ || error == ENETDOWN;
}

/* Waits for room; 0, or the errno to stop with. */
static int wait_for_room(int fd, int error, int64_t deadline)
{
	struct pollfd room = { .fd = fd, .events = POLLOUT };
	int64_t left = deadline - now_ms();
	int n;

	if (left <= 0)
		return error;
	if (error == ENOBUFS)
		n = poll(NULL, 0, left < RETRY_MS ? (int)left : RETRY_MS);
	else
		n = poll(&room, 1, left > 60000 ? 60000 : (int)left);
	return n < 0 ? errno : 0;
}

static void fail(struct sl_send_result *result, uint32_t *failed_index, int32_t *failed_errno,
		 int error)
{
	failed_index[result->failed] = result->next++;
	failed_errno[result->failed++] = error;
}

/* Fills the window from datagram i on; stops before one that has no name on this socket. */
static uint32_t fill(struct window *w, int family, const struct sl_outgoing *out, uint32_t i,
		     const uint8_t *payload)
{
	uint32_t n = 0;

	for (; n < SL_MMSG_BURST && i < out->count; n++, i++) {
		struct msghdr *h = &w->header[n].msg_hdr;
		socklen_t length;

		if (out->destinations == 1 && n > 0) {
			h->msg_name = w->header[0].msg_hdr.msg_name;
			h->msg_namelen = w->header[0].msg_hdr.msg_namelen;
		} else {
			length = write_name(&w->name[n], family, out, i);
			if (!length)
				break;
			h->msg_name = &w->name[n];
			h->msg_namelen = length;
		}
		w->payload[n].iov_base =
			(void *)(out->offset ? out->base + out->offset[i] : payload);
		w->payload[n].iov_len = out->length[i];
		h->msg_iov = &w->payload[n];
		h->msg_iovlen = 1;
		h->msg_control = NULL;
		h->msg_controllen = 0;
		h->msg_flags = 0;
		payload += out->length[i];
	}
	return n;
}

void sl_mmsg_send(int fd, const struct sl_outgoing *out, int timeout_ms, uint32_t *failed_index,
		  int32_t *failed_errno, struct sl_send_result *result)
{
	int64_t deadline = now_ms() + timeout_ms;
	const uint8_t *payload = out->base;
	struct window w;
	socklen_t size = sizeof(int);
	uint32_t retried = UINT32_MAX;
	int family = 0;

	result->stopped = 0;
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size)) {
		result->stopped = errno;
		return;
	}
	for (uint32_t i = 0; !out->offset && i < result->next; i++)
		payload += out->length[i];
	while (result->next < out->count) {
		uint32_t start = result->next, n = fill(&w, family, out, start, payload);
		int sent, error;

		sent = n ? sendmmsg(fd, w.header, n, MSG_DONTWAIT | MSG_NOSIGNAL) : -1;
		error = n ? errno : EAFNOSUPPORT;
		if (sent > 0) {
			result->sent += sent;
			result->next += sent;
		} else if (error == EINTR || is_final(error)) {
			result->stopped = error;
			return;
		} else if (error == EAGAIN || error == ENOBUFS) {
			result->stopped = wait_for_room(fd, error, deadline);
			if (result->stopped)
				return;
		} else if (may_be_asynchronous(error) && retried != start) {
			retried = start;
			result->asynchronous++;
		} else {
			/* The same error twice: it was this datagram's own, both times. */
			if (retried == start)
				result->asynchronous--;
			fail(result, failed_index, failed_errno, error);
		}
		for (uint32_t i = start; !out->offset && i < result->next; i++)
			payload += out->length[i];
	}
}
