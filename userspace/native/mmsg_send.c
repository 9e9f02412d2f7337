// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "mmsg_state.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h, Linux 4.18 */
#endif

/*
 * Generic segmentation offload: datagrams of one length to one destination, the last
 * one perhaps shorter, pass through the kernel as one and are cut apart by the device,
 * or right before it (Documentation/networking/segmentation-offloads.rst).
 */
#define GSO_DATAGRAMS 64 /* UDP_MAX_SEGMENTS of older kernels; newer ones allow 128 */
#define GSO_BYTES 65400  /* with IP and UDP headers still no more than an IP packet's 65,535 */

/* Attempts at one datagram while errors of earlier ones come. */
#define TRIES 16

/* Pieces of one sendmmsg call: the payloads of 16 full messages, or of 64 shorter ones. */
#define PIECES 1024 /* and of one message (UIO_MAXIOV) */

/* ENOBUFS (a full device queue) has no event to wait for, so it is asked again this often. */
#define RETRY_MS 1

union control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(uint16_t))];
};

/* What goes out in one call: messages of one or more datagrams each. */
struct window {
	struct mmsghdr header[SL_MMSG_BURST];
	struct sockaddr_in6 name[SL_MMSG_BURST];
	union control control[SL_MMSG_BURST];
	uint32_t datagrams[SL_MMSG_BURST];
	struct iovec piece[PIECES];
};

/* Which datagrams may share a message: up to segment bytes long, and from number from on. */
struct sharing {
	uint32_t segment;
	uint32_t from;
};

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Length of the name, 0 when an IPv4 socket cannot reach the address. */
static socklen_t write_name(struct sockaddr_in6 *name, int family, const struct sl_source *to)
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };
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

/* Which payload is the i-th to be sent. */
static uint32_t payload_at(const struct sl_outgoing *out, uint32_t i)
{
	return out->order ? out->order[i] : i;
}

/* Skips the next datagram. */
static void fail(const struct sl_outgoing *out, struct sl_send_result *result,
		 uint32_t *failed_index, int32_t *failed_errno, int error)
{
	failed_index[result->failed] = payload_at(out, result->next++);
	failed_errno[result->failed++] = error;
}

static const struct sl_source *destination_of(const struct sl_outgoing *out, uint32_t k)
{
	return &out->destination[out->destinations == 1 ? 0 : k];
}

static bool same_destination(const struct sl_outgoing *out, uint32_t k, uint32_t other)
{
	const struct sl_source *a = destination_of(out, k), *b = destination_of(out, other);

	return a == b || (a->port == b->port && a->scope == b->scope &&
			  !memcmp(a->address, b->address, sizeof(a->address)));
}

/* How many datagrams from number i on may go in one message; at least 1. */
static uint32_t run_of(const struct sl_outgoing *out, uint32_t i, const struct sharing *sharing,
		       uint32_t most)
{
	uint32_t k = payload_at(out, i), segment = out->length[k], bytes = segment, n = 1;

	if (!segment || segment > sharing->segment || i < sharing->from)
		return 1;
	if (most > GSO_DATAGRAMS)
		most = GSO_DATAGRAMS;
	for (; n < most && i + n < out->count; n++) {
		uint32_t next = payload_at(out, i + n), length = out->length[next];

		if (!length || length > segment || bytes + length > GSO_BYTES ||
		    !same_destination(out, k, next))
			break;
		bytes += length;
		if (length < segment)
			return n + 1; /* the last one may be shorter */
	}
	return n;
}

static void write_segment(struct msghdr *h, union control *control, uint32_t segment)
{
	uint16_t size = segment;

	h->msg_control = control;
	h->msg_controllen = sizeof(*control);
	control->header.cmsg_level = IPPROTO_UDP;
	control->header.cmsg_type = UDP_SEGMENT;
	control->header.cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(&control->header), &size, sizeof(size));
}

/* The pieces of payload k; how many. */
static uint32_t write_pieces(struct iovec *to, const struct sl_outgoing *out, uint32_t k)
{
	uint32_t first = k ? out->end[k - 1] : 0, i;

	for (i = first; i < out->end[k]; i++) {
		to->iov_base = (void *)out->piece[i].base;
		to++->iov_len = out->piece[i].length;
	}
	return out->end[k] - first;
}

/* Fills the window from datagram i on; stops before one that has no name on this socket. */
static uint32_t fill(struct window *w, int family, const struct sl_outgoing *out,
		     const struct sharing *sharing, uint32_t i, const uint8_t *payload)
{
	uint32_t n = 0, pieces = 0, most = out->piece ? out->most : 1;

	for (; n < SL_MMSG_BURST && i < out->count && pieces + most <= PIECES; n++) {
		struct msghdr *h = &w->header[n].msg_hdr;
		uint32_t k = payload_at(out, i);
		uint32_t run = run_of(out, i, sharing, (PIECES - pieces) / most);
		socklen_t length;

		if (out->destinations == 1 && n > 0) {
			h->msg_name = w->header[0].msg_hdr.msg_name;
			h->msg_namelen = w->header[0].msg_hdr.msg_namelen;
		} else {
			length = write_name(&w->name[n], family, destination_of(out, k));
			if (!length)
				break;
			h->msg_name = &w->name[n];
			h->msg_namelen = length;
		}
		h->msg_control = NULL;
		h->msg_controllen = 0;
		h->msg_flags = 0;
		if (run > 1)
			write_segment(h, &w->control[n], out->length[k]);
		h->msg_iov = &w->piece[pieces];
		w->datagrams[n] = run;
		for (; run; run--, i++) {
			k = payload_at(out, i);
			if (out->piece) {
				pieces += write_pieces(&w->piece[pieces], out, k);
				continue;
			}
			w->piece[pieces].iov_base =
				(void *)(out->offset ? out->base + out->offset[k] : payload);
			w->piece[pieces++].iov_len = out->length[k];
			payload += out->length[k];
		}
		h->msg_iovlen = &w->piece[pieces] - h->msg_iov;
	}
	return n;
}

/*
 * The kernel did not take datagrams that shared a message: each is tried by itself, and
 * what it did not like is not offered again.
 */
static void part(struct sharing *sharing, uint32_t next, uint32_t datagrams, uint32_t segment,
		 int error)
{
	sharing->from = next + datagrams;
	if (error == EINVAL) /* longer than the way's MTU, or no such option */
		sharing->segment = segment - 1;
	else if (error == EIO) /* the device's checksums, or IPsec */
		sharing->segment = 0;
}

/* What the socket has in its error queue, if it is one of m's. */
static enum sl_told drain(struct sl_mmsg *m, struct sl_socket *s, int error)
{
	return m ? sl_mmsg_drain_errors(m, s, error) : SL_TOLD_NOTHING;
}

static void send_all(struct sl_mmsg *m, struct sl_socket *s, const struct sl_outgoing *out,
		     int64_t deadline, uint32_t *failed_index, int32_t *failed_errno,
		     struct sl_send_result *result)
{
	struct sharing sharing = { .segment = s->gso };
	const uint8_t *payload = out->base;
	bool in_a_row = !out->offset && !out->piece;
	struct window w;
	uint32_t tries = 0;
	bool doubtful = false; /* the last try was given up for an error that nothing explains */

	for (uint32_t i = 0; in_a_row && i < result->next; i++)
		payload += out->length[i];
	while (result->next < out->count) {
		uint32_t start = result->next, n;
		enum sl_told told = SL_TOLD_NOTHING;
		int sent, error;

		n = fill(&w, s->family, out, &sharing, start, payload);
		sent = n ? sendmmsg(s->fd, w.header, n, MSG_DONTWAIT | MSG_NOSIGNAL) : -1;
		error = n ? errno : EAFNOSUPPORT;
		/* What ended it early may be an error of an earlier one, which poll would meet too. */
		if (sent < (int)n && !(sent < 0 && (error == EINTR || is_final(error))))
			told = drain(m, s, sent < 0 ? error : 0);
		if (sent > 0) {
			tries = 0;
			doubtful = false;
			for (int i = 0; i < sent; i++) {
				result->sent += w.datagrams[i];
				result->next += w.datagrams[i];
			}
		} else if (error == EINTR || is_final(error)) {
			result->stopped = error;
			return;
		} else if (error == EAGAIN || error == ENOBUFS) {
			result->stopped = wait_for_room(s->fd, error, deadline);
			if (result->stopped)
				return;
		} else if (may_be_asynchronous(error) && told != SL_TOLD_OWN && tries < TRIES &&
			   (told == SL_TOLD_EARLIER || !doubtful)) {
			tries++;
			doubtful = told == SL_TOLD_NOTHING;
			result->asynchronous++;
		} else {
			/* The same error twice, unexplained: it was this datagram's own, both times. */
			result->asynchronous -= doubtful;
			tries = 0;
			doubtful = false;
			if (n && w.datagrams[0] > 1) {
				part(&sharing, start, w.datagrams[0],
				     out->length[payload_at(out, start)], error);
				s->gso = sharing.segment;
			} else {
				fail(out, result, failed_index, failed_errno, error);
			}
		}
		for (uint32_t i = start; in_a_row && i < result->next; i++)
			payload += out->length[i];
	}
}

void sl_mmsg_send(int fd, const struct sl_outgoing *out, int timeout_ms, uint32_t *failed_index,
		  int32_t *failed_errno, struct sl_send_result *result)
{
	struct sl_socket s = { .fd = fd }; /* nothing is known of it */
	socklen_t size = sizeof(s.family);

	result->stopped = 0;
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &s.family, &size)) {
		result->stopped = errno;
		return;
	}
	send_all(NULL, &s, out, now_ms() + timeout_ms, failed_index, failed_errno, result);
}

static void send_through(struct sl_mmsg *m, struct sl_socket *s, const struct sl_outgoing *out,
			 int64_t deadline, uint32_t *failed_index, int32_t *failed_errno,
			 struct sl_send_result *result)
{
	result->stopped = sl_mmsg_check_socket(s);
	if (!result->stopped)
		send_all(m, s, out, deadline, failed_index, failed_errno, result);
}

void sl_mmsg_send_from(struct sl_mmsg *m, uint32_t n, const struct sl_outgoing *out, int timeout_ms,
		       uint32_t *failed_index, int32_t *failed_errno, struct sl_send_result *result)
{
	send_through(m, &m->socket[n], out, now_ms() + timeout_ms, failed_index, failed_errno,
		     result);
}

/*
 * Puts the datagrams of each socket together, the sockets in the order in which
 * they first appear (so the one with the highest lane is not kept waiting), and the
 * datagrams of each as they are.
 */
static void group_by_socket(const struct sl_mmsg *m, const struct sl_batch *b, uint32_t *order)
{
	uint32_t at[SL_MMSG_SOCKETS], first[SL_MMSG_SOCKETS], sockets = 0, start = 0;

	memset(at, 0, m->sockets * sizeof(*at));
	for (uint32_t i = 0; i < b->count; i++)
		if (at[b->sizes[i]]++ == 0)
			first[sockets++] = b->sizes[i];
	for (uint32_t k = 0; k < sockets; k++) {
		uint32_t count = at[first[k]];

		at[first[k]] = start;
		start += count;
	}
	for (uint32_t i = 0; i < b->count; i++)
		order[at[b->sizes[i]]++] = i;
}

void sl_mmsg_send_back(struct sl_mmsg *m, const struct sl_batch *batch, uint32_t *order,
		       int timeout_ms, uint32_t *failed_index, int32_t *failed_errno,
		       struct sl_send_result *result)
{
	int64_t deadline = now_ms() + timeout_ms;
	struct sl_outgoing out = {
		.base = batch->data,
		.offset = batch->offsets,
		.length = batch->lengths,
		.destination = batch->sources,
		.destinations = 2, /* not 1: each has its own */
		.order = order,
	};

	if (result->next == 0)
		group_by_socket(m, batch, order);
	while (result->next < batch->count) {
		uint32_t socket = batch->sizes[order[result->next]];

		out.count = result->next + 1;
		while (out.count < batch->count && batch->sizes[order[out.count]] == socket)
			out.count++;
		send_through(m, &m->socket[socket], &out, deadline, failed_index, failed_errno,
			     result);
		if (result->stopped == EINTR)
			return;
		while (result->next < out.count)
			fail(&out, result, failed_index, failed_errno, result->stopped);
	}
	result->stopped = 0;
}
