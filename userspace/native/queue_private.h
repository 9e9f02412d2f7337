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

struct sl_lane {
	struct xsk_ring_cons rx;
	struct sl_map map;
	int fd;
	uint32_t number;
	uint32_t quota;
	uint32_t held;   /* application, and echoes not yet completed */
	uint32_t share;  /* 1/65536 of a batch */
	uint64_t credit; /* packets * 65536 that higher lanes owe it */
	bool muted;      /* at its quota and out of the epoll sets */
	uint64_t received;
	uint64_t received_bytes;
};

/* A queue's sockets may be watched by the set of all queues and by one of its own. */
#define SL_WATCHERS 2

struct sl_queue {
	pthread_mutex_t lock;
	bool closed;
	bool broken; /* the rings said something that can't be */

	uint8_t *area;
	uint64_t area_size;
	uint32_t frame_shift;
	uint32_t fill_frames;
	uint32_t cookie;
	uint8_t *state;        /* frames.total of them */
	uint32_t *free_frames; /* stack: frames to build packets in */

	struct xsk_ring_prod fill;
	struct xsk_ring_cons completion;
	struct xsk_ring_prod transmit;
	struct sl_map fill_map, completion_map, transmit_map;

	uint32_t lanes;
	struct sl_lane lane[SL_QUEUE_LANES];
	struct sl_frames frames;
	struct sl_queue_counters counters;
	int umem_fd, transmit_fd;
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
 * are not in the fill ring yet).  0, or -EINVAL: nothing was changed.
 */
int sl_queue_give_back(struct sl_queue *queue, const struct sl_batch *batch);
/* After sl_queue_fill: tells a driver that waits for frames. */
void sl_queue_wake(struct sl_queue *queue);
/* A lane came to its quota, or below it again: take its socket out of epoll, or put it back. */
void sl_queue_mute(struct sl_queue *queue, struct sl_lane *lane);
/* Completed frames return; the kernel is asked to send what is left. */
void sl_queue_progress(struct sl_queue *queue);
/* Closed and no frame held any more: the memory may go. */
void sl_queue_unmap(struct sl_queue *queue);
bool sl_queue_held(const struct sl_queue *queue);

#endif /* SL_QUEUE_PRIVATE_H */
