// SPDX-License-Identifier: Apache-2.0
/*
 * Reading where each lane has sockets of its own, filled by the kernel.  No lane has to
 * be read in order to find another's datagrams behind it.  So no more of a lane is read
 * than the call may hand out: a flood stays in its socket buffer, where it costs nothing.
 */
#define _GNU_SOURCE
#include "mmsg_state.h"

#include <errno.h>

#define DONE UINT32_MAX /* in place of a socket's number: nothing more of it in this call */

int sl_mmsg_set_lane(struct sl_mmsg *m, int fd, uint8_t lane)
{
	if (m->options.gro || (lane >= SLUICE_MAX_LANES && lane != SL_MMSG_DRAIN))
		return -EINVAL;
	for (uint32_t i = 0; i < m->sockets; i++) {
		if (m->socket[i].fd != fd)
			continue;
		m->socket[i].selected = lane + 1;
		m->by_lane = true;
		return 0;
	}
	return -ENOENT;
}

/* How many more of a lane to read.  What has no lane yet comes last. */
static uint32_t wanted(const struct sl_mmsg *m, uint32_t l, uint32_t maximum)
{
	const struct sl_lane *lane;
	uint32_t want, room;

	if (l == SLUICE_NO_LANE)
		return maximum;
	lane = &m->lane[l];
	if (lane->count >= maximum)
		return 0;
	want = maximum - lane->count;
	room = m->options.quota[l] - lane->small;
	if (room)
		return want < room ? want : room;
	/*
	 * The application holds all of the quota: what comes is dropped (lane_full).  Left where it
	 * is, it would end every wait for other lanes at once.
	 */
	return lane->count ? 0 : want;
}

static int top_up_lane(struct sl_mmsg *m, struct epoll_event *ready, uint32_t n, uint32_t lane,
		       uint32_t want)
{
	uint32_t total = 0;
	bool more = true;

	while (more && total < want) {
		more = false;
		for (uint32_t i = 0; i < n && total < want; i++) {
			struct epoll_event *at = &ready[(m->turn + i) % n];
			struct sl_socket *s;
			int got;

			if (at->data.u32 >= m->sockets)
				continue;
			s = &m->socket[at->data.u32];
			if (s->fd < 0 || (s->selected ? s->selected - 1U : SLUICE_NO_LANE) != lane)
				continue;
			got = sl_mmsg_read_burst(m, s, want - total);
			if (got < 0)
				return got;
			total += got;
			/* A full burst: there may be more. */
			if (got && m->waiting.messages == SL_MMSG_BURST)
				more = true;
			else
				at->data.u32 = DONE;
		}
	}
	return (int)total;
}

int sl_mmsg_top_up(struct sl_mmsg *m, uint32_t maximum)
{
	struct epoll_event ready[SL_MMSG_SOCKETS + 1];
	int n = sl_mmsg_find_ready(m, ready, SL_MMSG_SOCKETS + 1), total = 0;

	if (n == 0 && m->poll_us && sl_mmsg_look(m))
		n = sl_mmsg_find_ready(m, ready, SL_MMSG_SOCKETS + 1);
	if (n <= 0)
		return n;
	/* Sockets of one lane take turns. */
	m->turn++;
	for (uint32_t lane = 0; lane <= SLUICE_NO_LANE; lane++) {
		int got = top_up_lane(m, ready, n, lane, wanted(m, lane, maximum));

		if (got < 0)
			return got;
		total += got;
	}
	return total;
}
