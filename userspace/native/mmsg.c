// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "busy_poll.h"
#include "mmsg_state.h"

#include <errno.h>
#include <linux/sock_diag.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define NO_SOCKET UINT32_MAX /* epoll data of the event descriptor */
/* Traffic counts as mixed for so long after lanes last alternated: a rare lane is one too. */
#define MIXED_NS 1000000000ULL
/* Offsets in the area are 32 bits. */
#define AREA_MAX (1ULL << 32)

static bool options_fit(const struct sl_mmsg_options *o, uint64_t *small, uint64_t *large)
{
	uint64_t lanes = 0;

	/* In the slots, and while they are being classified. */
	*small = o->gro ? 2 * SL_MMSG_BURST : SL_MMSG_BURST;
	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		*small += o->quota[i];
		lanes += o->quota[i] > 0;
		if (o->share[i] > SL_MMSG_SHARE_ONE)
			return false;
	}
	/* One large frame more than the lanes may keep: the one that is being joined. */
	*large = o->large_frames ? lanes * o->large_frames + 1 : 0;
	return o->frame_size >= 64 && o->frame_size <= SL_MMSG_LARGE_FRAME && o->drain >= 1 &&
	       *small * o->frame_size + (*large + SL_MMSG_BURST) * SL_MMSG_LARGE_FRAME < AREA_MAX;
}

static int make_frames(struct sl_mmsg *m, uint32_t small, uint32_t large)
{
	uint64_t frames_size =
		(uint64_t)small * m->options.frame_size + (uint64_t)large * SL_MMSG_LARGE_FRAME;
	uint32_t rest = SL_MMSG_LARGE_FRAME - m->options.frame_size;

	m->small_frames = small;
	m->frames = small + large;
	bool spill = large || m->options.gro;

	m->area_size = frames_size + (spill ? (uint64_t)rest * SL_MMSG_BURST : 0);
	m->area = mmap(NULL, m->area_size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m->area == MAP_FAILED) {
		m->area = NULL;
		return ENOMEM;
	}
	m->spill = m->area + frames_size;
	m->frame = calloc(m->frames, sizeof(*m->frame));
	m->free_small = calloc(small, sizeof(uint32_t));
	m->free_large = calloc(large + 1, sizeof(uint32_t));
	m->error = calloc(SL_MMSG_ERRORS, sizeof(*m->error));
	if (!m->frame || !m->free_small || !m->free_large || !m->error)
		return ENOMEM;
	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		struct sl_lane *lane = &m->lane[i];

		lane->capacity =
			m->options.quota[i] + (m->options.quota[i] ? m->options.large_frames : 0);
		lane->ring = calloc(lane->capacity + 1, sizeof(uint32_t));
		if (!lane->ring)
			return ENOMEM;
	}
	/* Stacks, so that the frame used last, still in the cache, is used next. */
	for (uint32_t i = m->frames; i-- > 0;)
		sl_put_free(m, i);
	for (uint32_t i = 0; i < SL_MMSG_BURST; i++) {
		struct msghdr *h = &m->header[i].msg_hdr;

		sl_fill_slot(m, i);
		m->payload[i][0].iov_len = m->options.frame_size;
		m->payload[i][1].iov_base = m->spill + (uint64_t)i * rest;
		m->payload[i][1].iov_len = rest;
		h->msg_name = &m->name[i];
		h->msg_namelen = sizeof(m->name[i]);
		h->msg_iov = m->payload[i];
		h->msg_iovlen = spill && rest ? 2 : 1;
	}
	return 0;
}

struct sl_mmsg *sl_mmsg_new(const struct sl_mmsg_options *options, struct sl_classifier *classifier,
			    int *error)
{
	struct epoll_event wake = { .events = EPOLLIN, .data.u32 = NO_SOCKET };
	uint64_t small, large;
	struct sl_mmsg *m;

	*error = EINVAL;
	if (!options_fit(options, &small, &large))
		return NULL;
	*error = ENOMEM;
	m = calloc(1, sizeof(*m));
	if (!m)
		return NULL;
	m->options = *options;
	m->classifier = classifier;
	m->event = -1;
	m->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (m->epoll >= 0)
		m->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (m->event < 0 || epoll_ctl(m->epoll, EPOLL_CTL_ADD, m->event, &wake))
		*error = errno;
	else
		*error = make_frames(m, small, large);
	if (*error) {
		sl_mmsg_free(m);
		return NULL;
	}
	return m;
}

void sl_mmsg_free(struct sl_mmsg *m)
{
	if (!m)
		return;
	for (int i = 0; i < SLUICE_MAX_LANES; i++)
		free(m->lane[i].ring);
	free(m->frame);
	free(m->free_small);
	free(m->free_large);
	free(m->error);
	if (m->area)
		munmap(m->area, m->area_size);
	if (m->event >= 0)
		close(m->event);
	if (m->epoll >= 0)
		close(m->epoll);
	free(m);
}

uint8_t *sl_mmsg_area(const struct sl_mmsg *m)
{
	return m->area;
}

uint64_t sl_mmsg_area_size(const struct sl_mmsg *m)
{
	return m->area_size;
}

/* Socket n into epoll; 0 or -errno. */
static int watch(struct sl_mmsg *m, uint32_t n)
{
	struct epoll_event readable = { .events = EPOLLIN, .data.u32 = n };

	if (m->socket[n].fd < 0)
		return 0;
	return epoll_ctl(m->epoll, EPOLL_CTL_ADD, m->socket[n].fd, &readable) ? -errno : 0;
}

static int watch_all(struct sl_mmsg *m)
{
	int error = 0;

	for (uint32_t i = 0; i < m->sockets && !m->watched && !error; i++)
		error = watch(m, i);
	if (!error) {
		m->watched = true;
		return 0;
	}
	for (uint32_t i = 0; i < m->sockets; i++)
		epoll_ctl(m->epoll, EPOLL_CTL_DEL, m->socket[i].fd, NULL);
	return error;
}

int sl_mmsg_fileno(struct sl_mmsg *m)
{
	int error = watch_all(m);

	return error ? error : m->epoll;
}

/*
 * How many datagrams the socket had no room for, since it was made; last: that can't be
 * told.  SO_RXQ_OVFL would tell it with each datagram, for a tenth of what receiving costs.
 */
static uint32_t drops_of(int fd, uint32_t last)
{
	uint32_t memory[SK_MEMINFO_VARS];
	socklen_t size = sizeof(memory);

	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &size) ||
	    size < (SK_MEMINFO_DROPS + 1) * sizeof(*memory))
		return last;
	return memory[SK_MEMINFO_DROPS];
}

static void note_overflow(struct sl_mmsg *m, struct sl_socket *s)
{
	uint32_t drops = s->fd < 0 ? s->overflow : drops_of(s->fd, s->overflow);

	if (s->selected == SL_MMSG_DRAIN + 1)
		return;
	m->statistics.overflowed += (uint32_t)(drops - s->overflow);
	s->overflow = drops;
}

int sl_mmsg_add(struct sl_mmsg *m, int fd, uint16_t port)
{
	struct sl_socket s = { .fd = fd, .port = port, .gso = UINT16_MAX };
	socklen_t family_size = sizeof(s.family), cookie_size = sizeof(s.cookie);
	int on = 1, error = 0;

	if (m->sockets == SL_MMSG_SOCKETS)
		return -ENOSPC;
	/* Before Linux 5.0 there is none, and every datagram comes by itself. */
	if (m->options.gro)
		setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
	if ((m->options.timestamps &&
	     setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof(on))) ||
	    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &s.family, &family_size) ||
	    getsockopt(fd, SOL_SOCKET, SO_COOKIE, &s.cookie, &cookie_size))
		return -errno;
	s.overflow = drops_of(fd, 0);
	if (m->poll_us < sl_busy_poll_get(fd))
		m->poll_us = sl_busy_poll_get(fd);
	sl_mmsg_hear_errors(&s, true);
	m->socket[m->sockets] = s;
	if (m->watched)
		error = watch(m, m->sockets);
	m->sockets += !error;
	if (m->sockets > SL_MMSG_POLLED && !m->watched) {
		error = watch_all(m);
		m->sockets -= error != 0;
	}
	return error;
}

int sl_mmsg_remove(struct sl_mmsg *m, int fd)
{
	uint32_t i = 0;

	while (i < m->sockets && m->socket[i].fd != fd)
		i++;
	if (i == m->sockets || fd < 0)
		return -ENOENT;
	if (!sl_mmsg_check_socket(&m->socket[i]))
		note_overflow(m, &m->socket[i]);
	/* Gone from there already when the descriptor was closed. */
	epoll_ctl(m->epoll, EPOLL_CTL_DEL, fd, NULL);
	m->socket[i].fd = -1;
	return 0;
}

int sl_mmsg_poll(struct sl_mmsg *m, struct pollfd *fds, int timeout_ms)
{
	int n;

	for (uint32_t i = 0; i < m->sockets; i++)
		fds[i] = (struct pollfd){ .fd = m->socket[i].fd, .events = POLLIN };
	n = poll(fds, m->sockets, timeout_ms);
	for (uint32_t i = 0; i < m->sockets && n > 0; i++)
		if (fds[i].revents & POLLERR)
			sl_mmsg_drain_errors(m, &m->socket[i], 0);
	return n < 0 ? -errno : n;
}

/* The same wherever they are. */
static int wait_for_datagrams(struct sl_mmsg *m, int timeout_ms)
{
	struct pollfd fds[SL_MMSG_POLLED];
	struct epoll_event ready;

	int n;

	if (!m->watched) {
		n = sl_mmsg_poll(m, fds, timeout_ms);
		for (uint32_t i = 0; i < m->sockets && n > 0; i++)
			m->ready |= (uint32_t)(fds[i].revents != 0) << i;
		return n;
	}
	return epoll_wait(m->epoll, &ready, 1, timeout_ms) < 0 ? -errno : 0;
}

int sl_mmsg_check_socket(const struct sl_socket *s)
{
	uint64_t cookie = 0;
	socklen_t size = sizeof(cookie);

	if (getsockopt(s->fd, SOL_SOCKET, SO_COOKIE, &cookie, &size))
		return errno == ENOTSOCK || errno == ENOPROTOOPT ? EBADF : errno;
	return cookie == s->cookie ? 0 : EBADF;
}

/* 0, or -errno when one of the sockets is not there any more. */
static int check_sockets(struct sl_mmsg *m, uint64_t now)
{
	if (now - m->checked_ns < SL_MMSG_CHECK_MS * 1000000ULL)
		return 0;
	for (uint32_t i = 0; i < m->sockets; i++) {
		int error = m->socket[i].fd < 0 ? 0 : sl_mmsg_check_socket(&m->socket[i]);

		if (error)
			return -error;
		if (m->socket[i].fd >= 0)
			sl_mmsg_tend_errors(m, &m->socket[i], now);
	}
	m->checked_ns = now;
	return 0;
}

/*
 * Reads what one receive call may read; how many, or -errno.  Reading ahead pays
 * only where there is something to sort: a lone lane would lose by it.
 */
static int pump(struct sl_mmsg *m, uint32_t maximum, uint32_t budget)
{
	uint64_t limit = (uint64_t)maximum * m->options.drain;
	int n, more;

	if (m->by_lane)
		return sl_mmsg_top_up(m, maximum);
	if (budget && budget < maximum)
		maximum = budget;
	if (budget && budget < limit)
		limit = budget;
	n = sl_mmsg_read_sockets(m, maximum);
	if (n == (int)maximum && limit > maximum && m->mixed_ns &&
	    m->read_ns - m->mixed_ns < MIXED_NS) {
		more = sl_mmsg_read_sockets(m, limit - maximum);
		n = more < 0 ? more : n + more;
	}
	return n;
}

/* How many of each lane go into a batch of at most maximum. */
static void share_out(struct sl_mmsg *m, uint32_t maximum, uint32_t *counts)
{
	uint32_t left = maximum;

	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		struct sl_lane *lane = &m->lane[i];
		uint64_t due;

		counts[i] = 0;
		if (!lane->count)
			continue;
		lane->credit += (uint64_t)m->options.share[i] * maximum;
		due = lane->credit / SL_MMSG_SHARE_ONE;
		due = due < lane->count ? due : lane->count;
		counts[i] = due < left ? due : left;
		lane->credit -= (uint64_t)counts[i] * SL_MMSG_SHARE_ONE;
		left -= counts[i];
	}
	for (int i = 0; i < SLUICE_MAX_LANES && left; i++) {
		uint32_t more = m->lane[i].count - counts[i];

		more = more < left ? more : left;
		counts[i] += more;
		left -= more;
	}
}

static void hand_out(struct sl_mmsg *m, struct sl_batch *b, uint32_t maximum)
{
	uint32_t counts[SLUICE_MAX_LANES];

	share_out(m, maximum, counts);
	for (int l = 0; l < SLUICE_MAX_LANES; l++) {
		struct sl_lane *lane = &m->lane[l];

		for (uint32_t k = 0; k < counts[l]; k++) {
			uint32_t index = lane->ring[lane->head], i = b->count++;
			struct sl_frame *frame = &m->frame[index];

			lane->head = lane->head + 1 == lane->capacity ? 0 : lane->head + 1;
			frame->place = SL_HELD;
			b->offsets[i] = sl_offset_of(m, index);
			b->lengths[i] = frame->length;
			b->lanes[i] = frame->lane;
			b->kinds[i] = frame->kind;
			b->classes[i] = frame->class_id;
			b->services[i] = frame->service;
			b->peers[i] = frame->peer;
			b->times[i] = frame->time_ns;
			b->sources[i] = frame->source;
			b->addresses[i] = index;
			b->sizes[i] = frame->socket;
		}
		lane->count -= counts[l];
		if (!lane->count)
			lane->credit = 0; /* a share that was not needed is not saved up */
		m->queued -= counts[l];
		m->statistics.lane_delivered[l] += counts[l];
	}
	m->statistics.delivered += b->count;
	b->columns_ready = b->sources_ready = 1;
}

/* The event descriptor is readable exactly while there are datagrams that were read already. */
static void signal_queued(struct sl_mmsg *m)
{
	uint64_t one = 1;
	bool queued = m->queued > 0 || m->waiting.next < m->waiting.messages;

	if (queued != m->signalled && (queued ? write(m->event, &one, sizeof(one)) :
						read(m->event, &one, sizeof(one))) == sizeof(one))
		m->signalled = queued;
}

int sl_mmsg_receive(struct sl_mmsg *m, struct sl_batch *batch, uint32_t maximum, uint32_t budget,
		    int timeout_ms)
{
	uint64_t start = sl_now_ns(), now = start;
	/* Several sockets are asked which of them have something: that call may as well wait for it. */
	bool wait_first = timeout_ms && m->sockets > 1 && !m->watched && !m->queued &&
			  m->waiting.next == m->waiting.messages;
	int waited;

	batch->count = 0;
	batch->data = m->area;
	batch->data_size = m->area_size;
	if (maximum > batch->capacity)
		maximum = batch->capacity;
	for (;;) {
		int left = SL_MMSG_CHECK_MS, n = check_sockets(m, now);

		if (!n && !wait_first)
			n = pump(m, maximum, budget);
		if (n < 0)
			return n;
		wait_first = false;
		if (m->queued || !timeout_ms)
			break;
		/* All were dropped.  Under a flood that may last, and signals must get through. */
		if (n > 0)
			return -EAGAIN;
		if (timeout_ms > 0) {
			uint64_t gone = (sl_now_ns() - start) / 1000000;

			if (gone >= (uint64_t)timeout_ms)
				break;
			if (timeout_ms - (int)gone < left)
				left = timeout_ms - (int)gone;
		}
		if (sl_now_ns() - start < m->poll_us * 1000ULL)
			continue;
		waited = wait_for_datagrams(m, left);
		if (waited < 0)
			return waited;
		now = sl_now_ns();
	}
	hand_out(m, batch, maximum);
	signal_queued(m);
	batch->received_ns = sl_now_ns();
	return (int)batch->count;
}

uint32_t sl_mmsg_release(struct sl_mmsg *m, struct sl_batch *batch)
{
	uint32_t released = 0;

	for (uint32_t i = 0; i < batch->count; i++) {
		uint64_t index = batch->addresses[i];
		struct sl_lane *lane;

		if (index >= m->frames || m->frame[index].place != SL_HELD)
			continue;
		lane = &m->lane[m->frame[index].lane];
		if (sl_is_large(m, index))
			lane->large--;
		else
			lane->small--;
		sl_put_free(m, index);
		released++;
	}
	batch->count = 0;
	return released;
}

void sl_mmsg_read_statistics(struct sl_mmsg *m, struct sl_mmsg_statistics *statistics)
{
	for (uint32_t i = 0; i < m->sockets; i++)
		note_overflow(m, &m->socket[i]);
	*statistics = m->statistics;
	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		statistics->queued[i] = m->lane[i].count;
		statistics->held[i] = m->lane[i].small + m->lane[i].large - m->lane[i].count;
	}
}

void sl_mmsg_census(const struct sl_mmsg *m, uint32_t *counts)
{
	memset(counts, 0, SL_PLACES * sizeof(*counts));
	for (uint32_t i = 0; i < m->frames; i++)
		counts[m->frame[i].place]++;
}
