/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of struct sl_mmsg, for mmsg.c (frames and lanes) and mmsg_receive.c (sockets). */
#ifndef SL_MMSG_STATE_H
#define SL_MMSG_STATE_H

#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <time.h>

#include "mmsg.h"

#ifndef UDP_GRO
#define UDP_GRO 104 /* linux/udp.h, Linux 5.0 */
#endif

#define SL_NO_FRAME UINT32_MAX

/*
 * Up to so many sockets are asked one by one.  In an epoll set each datagram that comes
 * makes the kernel look at the set, whether or not anybody waits: a tenth of what receiving
 * costs, paid by the CPU that is busiest.  With many sockets asking all costs more.
 */
#define SL_MMSG_POLLED 16

/* Where a frame is, see mmsg.h. */
enum sl_place { SL_FREE, SL_SLOT, SL_QUEUED, SL_HELD, SL_PLACES };

struct sl_frame {
	uint64_t time_ns;
	struct sl_source source;
	uint32_t length;
	uint32_t peer;
	uint8_t lane, kind, class_id, service;
	uint8_t place;
	uint16_t socket; /* by which it came */
};

struct sl_lane {
	uint32_t *ring; /* frames, capacity of them */
	uint32_t capacity, head, count;
	uint32_t small, large; /* queued and held */
	uint64_t credit;       /* of its share, in 1/SL_MMSG_SHARE_ONE datagrams */
};

struct sl_socket {
	int fd; /* -1: removed */
	int family;
	uint64_t cookie; /* the kernel's own number of it; a descriptor may be used again */
	uint16_t port;
	uint32_t overflow; /* the kernel's count when last asked, wraps */
	uint32_t gso;      /* longest datagram that may share a message with others, 0: none */
};

/* What recvmmsg says beside a datagram: SO_TIMESTAMPNS, and UDP_GRO where datagrams share a message. */
union sl_control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct timespec))];
};

/* Messages of the last recvmmsg call that are not used up: more of them than were wanted. */
struct sl_waiting {
	uint32_t messages, next; /* the first of them is next */
	uint32_t offset;         /* bytes of it that are used up */
	uint32_t socket;
};

struct sl_mmsg {
	struct sl_mmsg_options options;
	struct sl_classifier *classifier;
	struct sl_mmsg_statistics statistics;
	int epoll, event;
	bool watched;        /* the sockets are in epoll */
	bool signalled;      /* event is readable: datagrams are queued */
	uint8_t recent_lane; /* of the last datagram */
	uint64_t mixed_ns;   /* when it last was another than the one before */
	uint64_t read_ns;    /* when recvmmsg last returned datagrams */
	uint64_t clocks_ns;  /* CLOCK_MONOTONIC - CLOCK_REALTIME then; wraps */
	uint64_t checked_ns; /* when all sockets were last looked at */
	uint32_t sockets;
	uint32_t turn; /* the socket whose turn it is to be read first */
	struct sl_socket socket[SL_MMSG_SOCKETS];

	uint8_t *area;
	uint64_t area_size;
	uint8_t *spill; /* behind the frames in the area */
	uint32_t small_frames, frames;
	struct sl_frame *frame;
	uint32_t *free_small, *free_large; /* stacks */
	uint32_t free_small_count, free_large_count;
	uint32_t queued;
	struct sl_lane lane[SLUICE_MAX_LANES];

	uint32_t slot[SL_MMSG_BURST]; /* frames offered to recvmmsg */
	struct mmsghdr header[SL_MMSG_BURST];
	struct iovec payload[SL_MMSG_BURST][2];
	struct sockaddr_in6 name[SL_MMSG_BURST];
	union sl_control control[SL_MMSG_BURST];
	struct sl_waiting waiting;

	/* What is classified together; index[] are its frames. */
	uint32_t index[SL_MMSG_BURST], offset[SL_MMSG_BURST], length[SL_MMSG_BURST],
		peer[SL_MMSG_BURST];
	struct sluice_address address[SL_MMSG_BURST];
	struct sl_source source[SL_MMSG_BURST];
	uint16_t to[SL_MMSG_BURST];
	uint8_t reason[SL_MMSG_BURST], lane_of[SL_MMSG_BURST], service[SL_MMSG_BURST];
	uint8_t class_id[SL_MMSG_BURST], kind[SL_MMSG_BURST];
	bool silent[SL_MMSG_BURST];      /* not to be answered */
	uint64_t time_ns[SL_MMSG_BURST]; /* of arrival */
};

static inline uint64_t sl_clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static inline uint64_t sl_now_ns(void)
{
	return sl_clock_ns(CLOCK_MONOTONIC);
}

static inline bool sl_is_large(const struct sl_mmsg *m, uint32_t frame)
{
	return frame >= m->small_frames;
}

static inline uint32_t sl_offset_of(const struct sl_mmsg *m, uint32_t frame)
{
	if (!sl_is_large(m, frame))
		return frame * m->options.frame_size;
	return m->small_frames * m->options.frame_size +
	       (frame - m->small_frames) * SL_MMSG_LARGE_FRAME;
}

static inline void sl_put_free(struct sl_mmsg *m, uint32_t frame)
{
	m->frame[frame].place = SL_FREE;
	if (sl_is_large(m, frame))
		m->free_large[m->free_large_count++] = frame;
	else
		m->free_small[m->free_small_count++] = frame;
}

/* Offers a free frame in slot i; there always is one, as the quotas leave SL_MMSG_BURST over. */
static inline void sl_fill_slot(struct sl_mmsg *m, uint32_t i)
{
	uint32_t frame = m->free_small[--m->free_small_count];

	m->frame[frame].place = SL_SLOT;
	m->slot[i] = frame;
	m->payload[i][0].iov_base = m->area + sl_offset_of(m, frame);
}

/* 0, or the errno that says why it is not that socket any more. */
int sl_mmsg_check_socket(const struct sl_socket *s);

/* Waits for any of the sockets that are not in epoll; as poll(2), or -errno. */
int sl_mmsg_poll(const struct sl_mmsg *m, struct pollfd *fds, int timeout_ms);

/* Reads at most want datagrams into the lanes' queues.  How many, or -errno. */
int sl_mmsg_read_sockets(struct sl_mmsg *m, uint32_t want);

#endif /* SL_MMSG_STATE_H */
