// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "mmsg_state.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

#define READY 64 /* sockets served per look at epoll; the kernel rotates them */
/* Pending errors of one socket taken in one call; more wait for the next. */
#define ERRORS_PER_CALL 16

/* Answers the k probes, which are given as positions in the columns. */
static void reply(struct sl_mmsg *m, const struct sl_socket *s, const uint32_t *which, uint32_t k)
{
	uint32_t offset[SL_MMSG_BURST], length[SL_MMSG_BURST], failed[SL_MMSG_BURST];
	struct sl_source to[SL_MMSG_BURST];
	struct sl_send_result result = { 0 };
	int32_t errors[SL_MMSG_BURST];
	struct sl_outgoing out = {
		.base = m->area,
		.offset = offset,
		.length = length,
		.destination = to,
		.count = k,
		.destinations = k,
	};

	for (uint32_t i = 0; i < k; i++) {
		offset[i] = m->offset[which[i]];
		length[i] = m->length[which[i]];
		to[i] = m->source[which[i]];
		sl_heartbeat_reply(m->area + offset[i]);
	}
	sl_mmsg_send(s->fd, &out, 0, failed, errors, &result);
	m->statistics.replied += result.sent;
	m->statistics.reply_failed += k - result.sent;
}

/* Into its lane's queue, or false: the quota is used up. */
static bool enqueue(struct sl_mmsg *m, const struct sl_socket *s, uint32_t i, uint64_t now)
{
	struct sl_lane *lane = &m->lane[m->lane_of[i]];
	uint32_t index = m->index[i], at;

	if (m->lane_of[i] != m->recent_lane) {
		m->recent_lane = m->lane_of[i];
		m->mixed_ns = now;
	}
	if (sl_is_large(m, index)) {
		if (lane->large == m->options.large_frames || !lane->capacity) {
			m->statistics.no_large_frame++;
			return false;
		}
		lane->large++;
	} else {
		if (lane->small == m->options.quota[m->lane_of[i]]) {
			m->statistics.lane_full[m->lane_of[i]]++;
			return false;
		}
		lane->small++;
	}
	m->frame[index] = (struct sl_frame){
		.time_ns = m->time_ns[i],
		.source = m->source[i],
		.length = m->length[i],
		.peer = m->peer[i],
		.lane = m->lane_of[i],
		.kind = m->kind[i],
		.class_id = m->class_id[i],
		.service = m->service[i],
		.place = SL_QUEUED,
		.socket = s - m->socket,
	};
	at = lane->head + lane->count++;
	lane->ring[at >= lane->capacity ? at - lane->capacity : at] = index;
	m->queued++;
	return true;
}

/* Classifies the first k entries of the columns and puts each frame where it belongs. */
static void sort_out(struct sl_mmsg *m, const struct sl_socket *s, uint32_t k, uint64_t now)
{
	struct sl_datagrams d = {
		m->area,    m->offset,  m->length,   m->address, m->to,   m->reason,
		m->lane_of, m->service, m->class_id, m->kind,    m->peer,
	};
	uint32_t probes[SL_MMSG_BURST], n = 0;

	if (s->selected)
		sl_describe(m->classifier, &d, k, s->selected - 1, now);
	else
		sl_classify(m->classifier, &d, k, now);
	for (uint32_t i = 0; i < k; i++) {
		switch (m->reason[i]) {
		case SLUICE_STEER:
		case SLUICE_STEER_DEMOTED:
		case SLUICE_PASS_LANE:
		case SLUICE_PASS_DEMOTED:
			if (!enqueue(m, s, i, now))
				sl_put_free(m, m->index[i]);
			continue;
		case SLUICE_REPLY:
			if (!m->silent[i]) {
				probes[n++] = i;
				continue;
			}
			m->statistics.reply_failed++;
			sl_put_free(m, m->index[i]);
			continue;
		default:
			m->statistics.discarded++;
			sl_put_free(m, m->index[i]);
		}
	}
	if (n)
		reply(m, s, probes, n);
	for (uint32_t i = 0; i < n; i++)
		sl_put_free(m, m->index[probes[i]]);
}

/* What the kernel said of a message. */
struct said {
	uint32_t segment; /* how long the datagrams are that share it, 0: it is one alone */
	uint64_t time_ns; /* of arrival */
};

/* The kernel's CLOCK_REALTIME as CLOCK_MONOTONIC; never later than now. */
static uint64_t arrival(const struct sl_mmsg *m, const struct cmsghdr *c)
{
	struct timespec t;
	uint64_t at;

	memcpy(&t, CMSG_DATA(c), sizeof(t));
	at = t.tv_sec * 1000000000ULL + t.tv_nsec + m->clocks_ns;
	return (int64_t)(m->read_ns - at) < 0 ? m->read_ns : at;
}

static struct said read_control(const struct sl_mmsg *m, uint32_t i)
{
	const struct msghdr *h = &m->header[i].msg_hdr;
	struct said said = { .time_ns = m->read_ns };
	int segment;

	if (!h->msg_controllen)
		return said;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR((struct msghdr *)h, c)) {
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_TIMESTAMPNS) {
			said.time_ns = arrival(m, c);
		} else if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
			memcpy(&segment, CMSG_DATA(c), sizeof(segment));
			said.segment = segment;
		}
	}
	return said;
}

/* Where datagram i of the call came from, into entry k. */
static void read_source(struct sl_mmsg *m, uint32_t i, uint32_t k)
{
	sl_mmsg_source(&m->source[k], &m->name[i], m->header[i].msg_hdr.msg_namelen);
	memcpy(&m->address[k], m->source[k].address, sizeof(m->address[k]));
}

/* Copies a part of message i, which lies in its slot's frame and goes on in the spill area. */
static void copy_out(struct sl_mmsg *m, uint32_t i, uint32_t offset, uint32_t length,
		     uint32_t frame)
{
	uint8_t *to = m->area + sl_offset_of(m, frame);
	uint32_t size = m->options.frame_size, first = 0;

	if (offset < size) {
		first = length < size - offset ? length : size - offset;
		memcpy(to, (uint8_t *)m->payload[i][0].iov_base + offset, first);
		offset = size;
	}
	if (first < length)
		memcpy(to + first, (uint8_t *)m->payload[i][1].iov_base + (offset - size),
		       length - first);
}

/*
 * Whether a heartbeat must not be answered.  The socket's filter drops those that
 * came by broadcast or multicast (sockets.py), but looks at the first datagram of a message
 * only.  Where that one is a heartbeat, all of them were sent to this host alone.
 */
static bool is_silent(const struct sl_mmsg *m, uint32_t i, uint32_t offset)
{
	const uint8_t *first = m->payload[i][0].iov_base;

	return offset > 0 &&
	       (m->header[i].msg_len < 4 || first[0] != (SLUICE_HEARTBEAT_MAGIC >> 24) ||
		first[1] != (SLUICE_HEARTBEAT_MAGIC >> 16 & 0xff) ||
		first[2] != (SLUICE_HEARTBEAT_MAGIC >> 8 & 0xff) ||
		first[3] != (SLUICE_HEARTBEAT_MAGIC & 0xff));
}

/* A frame with the datagram at offset of message i, or SL_NO_FRAME: it is too long for all. */
static uint32_t frame_for(struct sl_mmsg *m, uint32_t i, uint32_t offset, uint32_t length)
{
	uint32_t index = m->slot[i];

	if (length > m->options.frame_size) {
		if (!m->options.large_frames)
			return SL_NO_FRAME;
		index = m->free_large[--m->free_large_count];
	} else if (length == m->header[i].msg_len) {
		m->slot[i] = SL_NO_FRAME; /* alone, and where it belongs already */
		return index;
	} else {
		index = m->free_small[--m->free_small_count];
	}
	copy_out(m, i, offset, length, index);
	return index;
}

/* Sorts out at most want datagrams of the messages that are there; how many. */
static uint32_t take(struct sl_mmsg *m, uint32_t want)
{
	struct sl_waiting *w = &m->waiting;
	struct sl_socket *s = &m->socket[w->socket];
	uint32_t taken = 0, k = 0;

	if (w->next == w->messages)
		return 0;
	while (w->next < w->messages && taken < want) {
		uint32_t i = w->next, whole = m->header[i].msg_len, length = whole - w->offset;
		struct said said = read_control(m, i);
		uint32_t index = SL_NO_FRAME;
		bool whole_lost = m->header[i].msg_hdr.msg_flags & MSG_TRUNC;

		if (said.segment && length > said.segment && !whole_lost)
			length = said.segment;
		if (!whole_lost)
			index = frame_for(m, i, w->offset, length);
		m->statistics.received++;
		m->statistics.shared += said.segment > 0;
		taken++;
		if (index == SL_NO_FRAME) {
			m->statistics.truncated++;
		} else {
			if (k == SL_MMSG_BURST || (k && sl_is_large(m, index))) {
				sort_out(m, s, k, m->read_ns);
				k = 0;
			}
			m->index[k] = index;
			m->offset[k] = sl_offset_of(m, index);
			m->length[k] = length;
			m->to[k] = s->port;
			m->silent[k] = is_silent(m, i, w->offset);
			m->time_ns[k] = said.time_ns;
			read_source(m, i, k++);
			/* Alone, so that one large frame in reserve is enough. */
			if (sl_is_large(m, index)) {
				sort_out(m, s, k, m->read_ns);
				k = 0;
			}
		}
		w->offset += length;
		if (w->offset >= whole) {
			w->offset = 0;
			w->next++;
		}
	}
	sort_out(m, s, k, m->read_ns);
	return taken;
}

/*
 * Makes the first n headers ready for recvmmsg, which has written to them.  Frames are found only
 * now: those that the application gave back last, and that are still in the cache, are used again.
 */
static void offer(struct sl_mmsg *m, uint32_t n)
{
	for (uint32_t i = n; i-- > 0;) {
		struct msghdr *h = &m->header[i].msg_hdr;

		if (m->slot[i] == SL_NO_FRAME)
			sl_fill_slot(m, i);
		h->msg_namelen = sizeof(m->name[i]);
		h->msg_control = m->options.gro || m->options.timestamps ? &m->control[i] : NULL;
		h->msg_controllen = h->msg_control ? sizeof(m->control[i]) : 0;
	}
}

int sl_mmsg_read_burst(struct sl_mmsg *m, struct sl_socket *s, uint32_t want)
{
	uint32_t most = want < SL_MMSG_BURST ? want : SL_MMSG_BURST;
	int n;

	for (int tries = 0; tries < ERRORS_PER_CALL; tries++) {
		offer(m, most);
		n = recvmmsg(s->fd, m->header, most, MSG_DONTWAIT, NULL);
		if (n > 0) {
			m->statistics.calls++;
			m->read_ns = sl_now_ns();
			if (m->options.timestamps)
				m->clocks_ns = m->read_ns - sl_clock_ns(CLOCK_REALTIME);
			m->waiting = (struct sl_waiting){ .messages = n, .socket = s - m->socket };
			return (int)take(m, want);
		}
		if (n == 0 || errno == EAGAIN) {
			/* An event loop was woken for nothing, perhaps by an error. */
			if (m->watched && m->sockets == 1)
				sl_mmsg_drain_errors(m, s, 0);
			return 0;
		}
		if (errno == EBADF || errno == ENOTSOCK || errno == EFAULT || errno == EINVAL)
			return -errno;
		/* An ICMP error that was pending on the socket; taken now, so ask again. */
		m->statistics.errors++;
		sl_mmsg_drain_errors(m, s, 0);
	}
	return 0;
}

/* Of n ready sockets, moves the one whose turn it is to the front: the same ones in a circle. */
static void take_turns(const struct sl_mmsg *m, struct epoll_event *ready, int n)
{
	struct epoll_event first;
	uint32_t best = UINT32_MAX;
	int at = 0;

	for (int i = 0; i < n; i++) {
		uint32_t index = ready[i].data.u32;
		uint32_t wait = (index >= m->turn ? 0 : m->sockets) + index - m->turn;

		if (index < m->sockets && wait < best) {
			best = wait;
			at = i;
		}
	}
	first = ready[at];
	ready[at] = ready[0];
	ready[0] = first;
}

int sl_mmsg_find_ready(struct sl_mmsg *m, struct epoll_event *ready, int room)
{
	struct pollfd fds[SL_MMSG_POLLED];
	int n, found = 0;

	/* With one socket, trying to read is as cheap as asking whether to. */
	if (m->sockets == 1) {
		ready[0].data.u32 = 0;
		return 1;
	}
	if (m->watched) {
		n = epoll_wait(m->epoll, ready, room, 0);
		for (int i = 0; i < n; i++)
			if (ready[i].events & EPOLLERR && ready[i].data.u32 < m->sockets &&
			    m->socket[ready[i].data.u32].fd >= 0)
				sl_mmsg_drain_errors(m, &m->socket[ready[i].data.u32], 0);
		return n < 0 ? -errno : n;
	}
	if (!m->ready) {
		n = sl_mmsg_poll(m, fds, 0);
		if (n < 0)
			return n;
		for (uint32_t i = 0; i < m->sockets; i++)
			m->ready |= (uint32_t)(fds[i].revents != 0) << i;
	}
	for (uint32_t i = 0; i < m->sockets; i++)
		if (m->ready >> i & 1)
			ready[found++].data.u32 = i;
	m->ready = 0;
	return found;
}

int sl_mmsg_read_sockets(struct sl_mmsg *m, uint32_t want)
{
	struct epoll_event ready[READY];
	uint32_t total = take(m, want);
	int n, got;

	if (total == want)
		return (int)total;
	n = sl_mmsg_find_ready(m, ready, READY);
	if (n == 0 && m->poll_us && sl_mmsg_look(m))
		n = sl_mmsg_find_ready(m, ready, READY);
	if (n < 0)
		return n;
	if (n > 1)
		take_turns(m, ready, n);
	while (n > 0 && total < want) {
		int still = 0;

		for (int i = 0; i < n && total < want; i++) {
			uint32_t index = ready[i].data.u32;

			if (index >= m->sockets || m->socket[index].fd < 0)
				continue;
			got = sl_mmsg_read_burst(m, &m->socket[index], want - total);
			if (got < 0)
				return got;
			m->turn = index + 1;
			total += got;
			/* A full burst: there may be more. */
			if (got && m->waiting.messages == SL_MMSG_BURST)
				ready[still++] = ready[i];
		}
		n = still;
	}
	return (int)total;
}
