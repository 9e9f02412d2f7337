/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of struct sl_mmsg, for mmsg.c (frames and lanes) and mmsg_receive.c (sockets). */
#ifndef SL_MMSG_STATE_H
#define SL_MMSG_STATE_H

#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>
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
	uint16_t selected;  /* lane + 1 that the kernel fills it with; 0: all, to be classified */
	uint32_t overflow;  /* the kernel's count when last asked, wraps */
	uint32_t gso;       /* longest datagram that may share a message with others, 0: none */
	bool deaf;          /* to errors of what it sends, for a while */
	uint64_t errors_ns; /* until when; else when its errors are paid for, see is_flood */
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
	bool by_lane;        /* some socket has a lane of its own */
	uint32_t ready;      /* a bit for each that the last wait has found to have something */
	bool signalled;      /* event is readable: datagrams are queued */
	uint8_t recent_lane; /* of the last datagram */
	uint64_t mixed_ns;   /* when it last was another than the one before */
	uint64_t read_ns;    /* when recvmmsg last returned datagrams */
	uint64_t clocks_ns;  /* CLOCK_MONOTONIC - CLOCK_REALTIME then; wraps */
	uint64_t checked_ns; /* when all sockets were last looked at */
	uint32_t sockets;
	uint32_t turn;    /* the socket whose turn it is to be read first */
	uint32_t poll_us; /* of SO_BUSY_POLL: how long to look before sleeping, 0: not at all */
	uint32_t polled;  /* the socket that the kernel polls the interface for */
	bool polls;       /* it is known to do so */
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

	struct sl_socket_error *error; /* ring of SL_MMSG_ERRORS */
	uint32_t error_head, error_count;

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
int sl_mmsg_poll(struct sl_mmsg *m, struct pollfd *fds, int timeout_ms);

/* Has the kernel queue errors of what a socket sends (IP_RECVERR), or not. */
void sl_mmsg_hear_errors(const struct sl_socket *s, bool on);

enum sl_told {
	SL_TOLD_NOTHING,
	SL_TOLD_EARLIER, /* of datagrams that had left */
	SL_TOLD_OWN,     /* this host's own error of one that has not */
};

/*
 * Empties the error queue of a socket, which has failed with error (0: no matter); what was in it.
 * While it is not empty, poll and epoll return at once.
 */
enum sl_told sl_mmsg_drain_errors(struct sl_mmsg *m, struct sl_socket *s, int error);

/* The same now and then, for those that nobody waits for; and ends a socket's deafness. */
void sl_mmsg_tend_errors(struct sl_mmsg *m, struct sl_socket *s, uint64_t now);

/* A name as the kernel writes it; all zero when it is no address of ours. */
static inline void sl_mmsg_source(struct sl_source *source, const struct sockaddr_in6 *name,
				  socklen_t length)
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)name;

	/* Written where it is to be, in no more pieces than needed: it is read again at once. */
	if (length && name->sin6_family == AF_INET6) {
		memcpy(source->address, &name->sin6_addr, sizeof(source->address));
		source->scope = name->sin6_scope_id;
		source->port = ntohs(name->sin6_port);
		source->family = IN6_IS_ADDR_V4MAPPED(&name->sin6_addr) ? 4 : 6;
		source->reserved = 0;
	} else if (length && v4->sin_family == AF_INET) {
		memcpy(source->address, mapped, sizeof(mapped));
		memcpy(source->address + sizeof(mapped), &v4->sin_addr, sizeof(v4->sin_addr));
		source->scope = 0;
		source->port = ntohs(v4->sin_port);
		source->family = 4;
		source->reserved = 0;
	} else {
		memset(source, 0, sizeof(*source));
	}
}

/*
 * Which sockets have something: their numbers are data.u32, among others that are none.
 * How many, at most room, or -errno.
 */
int sl_mmsg_find_ready(struct sl_mmsg *m, struct epoll_event *ready, int room);

/*
 * Up to want datagrams from one socket in one call.  How many, 0: nothing there,
 * or -errno when the socket can't be used any more.
 */
int sl_mmsg_read_burst(struct sl_mmsg *m, struct sl_socket *s, uint32_t want);

/* Reads into each lane's queue what a call may hand out of it (mmsg_lanes.c).  How many, or -errno. */
int sl_mmsg_top_up(struct sl_mmsg *m, uint32_t maximum);
/* Busy polling: has the kernel look at the interface once; whether it can for any of the sockets. */
bool sl_mmsg_look(struct sl_mmsg *m);

/* Reads at most want datagrams into the lanes' queues.  How many, or -errno. */
int sl_mmsg_read_sockets(struct sl_mmsg *m, uint32_t want);

#endif /* SL_MMSG_STATE_H */
