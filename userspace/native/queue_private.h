/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of a queue (queue.c, queue_*.c, wait.c) know of it. */
#ifndef SL_QUEUE_PRIVATE_H
#define SL_QUEUE_PRIVATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "queue.h"
#include "rings.h"

/*
 * Where a frame is, one byte each; the low bits are the lane's position.  The
 * kind of frame needs no bit: those below fill_frames are for receiving.
 */
#define SL_LANE_BITS 7
#define SL_FREE 0x00
#define SL_KERNEL 0x10
#define SL_APPLICATION 0x20
#define SL_TRANSMIT 0x30
#define SL_RESERVED 0x40

/* A frame of a packet in several frames; next is SL_LAST_PIECE for all others. */
struct sl_link {
	uint32_t next;   /* address of the packet's next piece */
	uint32_t length; /* of this piece */
	uint32_t slot; /* of the first one: where the packet is put together, from the area's start */
};

#define SL_LAST_PIECE UINT32_MAX

/*
 * Frames of the longest packet that there can be.  The kernel's code stops at 46
 * buffers (MAX_SKB_FRAGS at most, and the first), and at 64 KiB in copy mode, which
 * are 37 frames.
 */
#define SL_CHAIN_FRAMES 64

struct sl_lane {
	struct xsk_ring_cons rx;
	struct sl_map map;
	int fd;
	uint32_t number;
	uint32_t quota;
	uint32_t held;   /* application, and echoes not yet completed */
	uint32_t needs;  /* frames of the packet that comes next, as far as is known; at least 1 */
	uint32_t share;  /* 1/65536 of a batch */
	uint64_t credit; /* packets * 65536 that higher lanes owe it */
	bool muted;      /* at its quota and out of the epoll sets */
	uint64_t received;
	uint64_t received_bytes;
	uint64_t jumbo;    /* of those received, in several frames */
	uint64_t too_long; /* longer than a slot, so given back at once */
	uint32_t *slots;   /* stack: where packets can be put together */
	uint32_t slots_free;
};

/* A queue's sockets may be watched by the set of all queues and by one of its own. */
#define SL_WATCHERS 2

struct sl_queue {
	pthread_mutex_t lock;
	bool closed;
	bool broken; /* the rings said something that can't be */

	uint8_t *area;
	uint64_t area_size; /* of all frames */
	uint64_t data_size; /* with the slots behind them */
	uint32_t frame_shift;
	uint32_t fill_frames;
	uint32_t cookie;
	uint32_t longest;       /* packet in several frames, bytes; 0: there are none */
	uint32_t slots_at;      /* the first slot, from the area's start */
	struct sl_link *pieces; /* fill_frames of them, with longest only */
	uint32_t *slots;        /* memory of all lanes' stacks */
	uint8_t *state;         /* frames.total of them */
	uint32_t *free_frames;  /* stack: frames to build packets in */

	struct xsk_ring_prod fill;
	struct xsk_ring_cons completion;
	struct xsk_ring_prod transmit;
	struct sl_map fill_map, completion_map, transmit_map;

	uint32_t lanes;
	struct sl_lane lane[SL_QUEUE_LANES];
	struct sl_frames frames;
	struct sl_queue_counters counters;
	int umem_fd, transmit_fd;
	uint32_t poll_us; /* of SO_BUSY_POLL: how long to look before sleeping, 0: not at all */
	int polled;       /* position of a lane whose socket the kernel polls for, -1: none known */
	int watcher[SL_WATCHERS]; /* epoll descriptors, -1: none */
};

static inline void sl_lock(struct sl_queue *queue)
{
	pthread_mutex_lock(&queue->lock);
}

static inline void sl_unlock(struct sl_queue *queue)
{
	pthread_mutex_unlock(&queue->lock);
}

static inline uint32_t sl_frame_of(const struct sl_queue *queue, uint64_t address)
{
	uint64_t frame = address >> queue->frame_shift;

	/* One that can't exist stands for all that are out of range. */
	return frame < queue->frames.total ? (uint32_t)frame : UINT32_MAX;
}

/* Under the lock: */

/* Rings and lanes are set; states, counts and free frames begin.  0 or -ENOMEM. */
int sl_queue_begin(struct sl_queue *queue, uint32_t transmit_frames);
/* Gives count frames, already in state SL_KERNEL, to the fill ring; addresses anywhere within them. */
void sl_queue_fill(struct sl_queue *queue, const uint64_t *addresses, uint32_t count);
/*
 * The batch's frames, if all are the application's, become the kernel's (they
 * are not in the fill ring yet).  0, or -EINVAL: nothing was changed.  Of packets in
 * several frames, all but the first are in the fill ring afterwards, and their size is 0.
 */
int sl_queue_give_back(struct sl_queue *queue, struct sl_batch *batch);
/* After sl_queue_fill: tells a driver that waits for frames. */
void sl_queue_wake(struct sl_queue *queue);
/* A lane came to its quota, or below it again: take its socket out of epoll, or put it back. */
void sl_queue_mute(struct sl_queue *queue, struct sl_lane *lane);
/* Completed frames go where they came from: building stack or fill ring. */
void sl_queue_complete(struct sl_queue *queue);
/*
 * Has the kernel send what is in the transmit ring.  0, also when the interface is down (it
 * will go on from there when it is up again), or -ENXIO.
 */
int sl_queue_kick(struct sl_queue *queue);
/*
 * Packets that can be sent now, at most wanted: entries of the transmit ring and, unless those
 * to send are there already, free frames.  When there is none the kernel is asked to go on,
 * which may fail with *error.
 */
uint32_t sl_queue_room(struct sl_queue *queue, uint32_t wanted, bool frames, int *error);
/* Why nothing can be sent: 0, -EBADF, -EPROTO. */
static inline int sl_queue_unusable(const struct sl_queue *queue)
{
	/* Broken is for receiving and sending alike: nobody knows where frames are. */
	return queue->closed ? -EBADF : queue->broken ? -EPROTO : 0;
}
/* Bytes of payload that fit a packet and a frame: an MTU may be larger than a frame. */
static inline uint32_t sl_queue_longest(const struct sl_queue *queue, const struct sl_template *to)
{
	uint32_t room = (1U << queue->frame_shift) - to->length;

	return to->payload_maximum < room ? to->payload_maximum : room;
}
/* Which lane of the queue a packet's lane column names. */
static inline uint32_t sl_queue_position(const struct sl_queue *queue, uint8_t number)
{
	uint32_t position = 0;

	while (position + 1 < queue->lanes && queue->lane[position].number != number)
		position++;
	return position;
}
/* Completed frames return; the kernel is asked to send what is left. */
void sl_queue_progress(struct sl_queue *queue);
/* Busy polling: has the kernel look at the interface's queue once, if it can for one of the sockets. */
void sl_queue_poll(struct sl_queue *queue);
/* Closed and no frame held any more: the memory may go. */
void sl_queue_unmap(struct sl_queue *queue);
bool sl_queue_held(const struct sl_queue *queue);

/* Packets in several frames, queue_chain.c; only with longest: */

/* Bytes of all slots.  Lanes, their quotas and longest are set. */
uint64_t sl_chain_room(const struct sl_queue *queue);
/* Part of sl_queue_begin, with slots_at set. */
int sl_chain_begin(struct sl_queue *queue);
/* Moves at most count packets of a lane into the batch at position at; how many. */
uint32_t sl_chain_move(struct sl_queue *queue, uint32_t position, struct sl_batch *batch,
		       uint32_t at, uint32_t count);
/* Where the packet that begins at address lies in one piece, once it was gathered. */
uint64_t sl_chain_place(const struct sl_queue *queue, uint64_t address);
/* The same, and puts it there; needs no lock. */
uint64_t sl_chain_gather(const struct sl_queue *queue, uint64_t address);
/* Where the slot begins that an offset is in; 0: it is in none. */
uint64_t sl_chain_slot(const struct sl_queue *queue, uint64_t offset);
/* Part of sl_queue_give_back; counts, by lane, grow by the frames given back. */
void sl_chain_give_back(struct sl_queue *queue, struct sl_batch *batch, uint32_t *counts);

#endif /* SL_QUEUE_PRIVATE_H */
