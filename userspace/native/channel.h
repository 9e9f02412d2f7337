/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A channel: a bounded ring between threads of one process, without locks.  One
 * or many producers, one consumer, elements of one size.  (rings.h is something
 * else: the rings that AF_XDP shares with the kernel.)
 *
 * Layout.  Everything that is written often has a cache line of its own side:
 *
 *      fixed       capacity, sizes, where the elements are, the two descriptors
 *      producers   tail, the head they last saw, "the consumer sleeps", counters
 *      consumer    head, the tail it last saw, "a producer sleeps", counters
 *      elements    capacity * element_size bytes; slot = index & (capacity - 1)
 *      stamps      many producers only: one index per slot, see below
 *
 * A side looks at the other's index only when the one it last saw does not allow
 * what is asked for.  With one producer, a put that fits and a get that is
 * satisfied touch no line of the other side but elements.
 *
 * Indices count elements, in 63 bits, and wrap; what counts is the distance
 * between two.  32 bits would not do: a producer that is preempted between looking
 * at tail and its compare-and-swap must not find the same value a round later, and
 * 2^32 elements can pass in a minute.  2^63 take 2,900 years at 100 million a second.
 * Bit 63 of tail says: closed.
 *
 * One producer.  It copies elements behind tail, then moves tail.  Put and get
 * are wait-free: no loop but the copy.  It moves tail by compare-and-swap, for close
 * may set the bit meanwhile; that costs what the full barrier costs that it needs anyway.
 *
 * Many producers.  A put moves tail by compare-and-swap first, so that the slots are its
 * own, copies, and then stamps each slot with its index + 1.  The consumer takes slots
 * in order as long as their stamps are right.  This is the bounded queue of Dmitry Vyukov
 * (1024cores.net, "Bounded MPMC queue", 2010) with a consumer that writes no slots: it is
 * the only one, so its head says what is free.  The first slot of a put is stamped last;
 * a put is therefore seen as a whole.
 *
 * A producer that is preempted between reserving and stamping leaves a hole.  The
 * consumer gets what is before it and nothing beyond it, but may sleep: the stamp
 * wakes it.  Other producers go on until the ring is full, and are then
 * refused as with a slow consumer.  Nobody spins on the hole.  The alternative, a second
 * tail that each producer moves when all before it have (DPDK's rte_ring by default), makes
 * producers spin for the preempted one: worse where there are more threads than
 * cores.  How long a hole lasts is up to the scheduler: within it there are a copy of at
 * most capacity elements, no system call and no cancellation point, and the ring's pages are
 * all there; a page fault in the source is the caller's.  So a producer of low priority can hold
 * up the consumer while something else has its core: give it the priority of its consumer, or
 * a ring of its own.  The order is that of the reservations, so each producer's own order
 * is kept.  Puts are lock-free: a compare-and-swap fails only because another one succeeded.
 *
 * Many consumers are not offered: each worker can have a ring, and a preempted
 * consumer could then hold up the producers in the same way.
 *
 * Barriers, each with its reason; the code names them by these letters:
 *
 *      A  tail, one producer: compare-and-swap, seq_cst.  Release: the elements are
 *         written before the index says so.  Seq_cst: W.
 *      B  tail, consumer: load, acquire.  Pairs with A: elements are read after it.
 *      C  head, consumer: store, seq_cst.  Release: elements are read before the index says
 *         that they may be overwritten.  Seq_cst: W.
 *      D  head, producers: load, acquire.  Pairs with C: overwritten after that.
 *      E  tail, many producers: load, acquire; compare-and-swap, acq_rel.  Who sees
 *         a tail also sees at least the head that made room for it, so what looks full
 *         is full.  For elements it is no barrier, their stamps are.
 *      F  stamp of a put's first slot, stored last: seq_cst.  As A, for all elements and
 *         stamps of the put; the other stamps are relaxed.
 *      G  stamps, consumer: load, acquire.  As B.
 *      H  the head that producers last saw: store, release, and load, acquire.  Hands D
 *         on: who uses another producer's look at head must have all that look gave.
 *      W  tail or stamp, head, and the two sleep flags: seq_cst.  Store-load, see below.
 *
 * Fences are not used: ThreadSanitizer does not understand them.
 *
 * Waiting.  Each side has an eventfd that is written only when somebody of that side said
 * that it sleeps.  The consumer (a producer waits for room in the same way, head in place of
 * tail):
 *
 *      consumer                        producer
 *      1  read the eventfd empty       a  store tail (or the stamp)
 *      2  store asleep = 1             b  load asleep; if set:
 *      3  load tail: still empty?      c  exchange asleep = 0; was it set?
 *      4  poll the eventfd             d  write the eventfd
 *
 * W: without a barrier between 2 and 3, and between a and b, both loads might be done
 * before both stores are seen (each CPU reads while its own store is still in the store
 * buffer; x86 does this too, release and acquire do not forbid it): the consumer
 * sees an empty ring, the producer nobody asleep, and the wake-up is lost.  All four are
 * seq_cst, so there is one order of them that all threads agree on.  If 3 comes before
 * a in it, then 2 comes before b, and b sees the flag: d wakes.  If a comes before 3,
 * then 3 sees the element and nobody sleeps.  With many producers a is the stamp of
 * a put's first slot: the consumer waits for a put's first slot or for none of
 * it, for who has seen the first stamp has by F and G seen them all.
 *
 * Two rules keep that true with several sleepers and when a wake-up is thrown away:
 *
 *      R1  who sets a flag to 0 then writes the eventfd;
 *      R2  who reads the eventfd empty then sets the flag and looks again (2, 3), and if
 *          there is something now (so that it does not sleep) does c and d itself.
 *
 * So whenever nobody is in the middle of these steps, the eventfd is readable or the flag is
 * set and there was nothing after it was set.  A flag that is set when nobody sleeps (the
 * wait timed out) costs one write, later.  A wake-up for nothing costs another look.
 * Sleeping producers all wait for the same, room for one element, since one that waits for
 * more would read empty the wake-up of another that needs less.
 * A thread that is preempted between c and d lets the sleeper sleep that long.
 *
 * The eventfd can be watched by poll, epoll or asyncio as well: from the call of
 * sl_channel_item_fd on, each get that took all there was does 1 to 3 at its end, so
 * the descriptor is readable as long as there may be something.
 *
 * Closing sets bit 63 of tail, so each put is wholly before or wholly after it, and
 * the index beside the bit is the last there will be.  Gets go on until head is there (a
 * hole is waited for: it will be stamped), then say -EBADF.  Closed descriptors
 * stay readable, so both sides wake.
 *
 * Lifetime.  sl_channel_new gives one reference; each thread that may still be in a call when
 * another frees needs one of its own, by sl_channel_hold before it starts.  The last
 * sl_channel_free frees memory and descriptors.
 *
 * Elements are copied in and out: 8 bytes for an index or a pointer (of a received batch,
 * say), up to 64 for a descriptor.  What they point to is the user's.
 */
#ifndef SL_CHANNEL_H
#define SL_CHANNEL_H

#include <stdint.h>

/* cffi: begin */

/* Bytes.  One cache line: what is larger should be passed by its address. */
#define SL_CHANNEL_ELEMENT_MAX 64

/* Elements, 2^24: at 64 bytes 1 GiB.  Who needs more has no ring but a store. */
#define SL_CHANNEL_CAPACITY_MAX 16777216

struct sl_channel;

struct sl_channel_options {
	uint32_t capacity;     /* elements, a power of two, 1 to SL_CHANNEL_CAPACITY_MAX */
	uint32_t element_size; /* bytes, 1 to SL_CHANNEL_ELEMENT_MAX */
	uint32_t many;         /* 0: one producer, 1: many */
	uint32_t reserved;     /* 0 */
	uint64_t start;        /* first index, below 2^63.  0, but for tests of the wrap-around */
};

/*
 * Since the beginning.  waiting = enqueued - dequeued, and enqueued + refused is what was
 * offered, apart from calls that ended by close or by a signal.  Read while others
 * work, they are of slightly different moments.
 */
struct sl_channel_counters {
	uint64_t enqueued;
	uint64_t dequeued;
	uint64_t waiting;
	uint64_t refused; /* elements that a put gave up on because the ring was full */
	uint64_t full;    /* puts that found less room than they wanted */
	uint64_t empty;   /* gets that gave nothing, and it was not closed */
	/*
	 * Most elements that a side saw when it looked at the other's index: exact for a full
	 * ring; a peak between two looks of a consumer that takes less than there is may be missed.
	 */
	uint64_t high_water;
	uint64_t consumer_wakes; /* times the eventfd of items was written by a put */
	uint64_t producer_wakes; /* and that of room by a get */
};

/* NULL with *error = EINVAL (an option), ENOMEM, EMFILE or ENFILE.  All its pages are there. */
struct sl_channel *sl_channel_new(const struct sl_channel_options *options, int *error);
struct sl_channel *sl_channel_hold(struct sl_channel *channel);
void sl_channel_free(struct sl_channel *channel);

/*
 * Elements of the array that were accepted, in order: as many as fit, or with whole all or
 * none.  Does not wait.  Any thread with many producers, else one at a time.
 *
 *      -EINVAL   n above INT32_MAX, or with whole above the capacity: it would never fit
 *      -EBADF    closed
 *      -EBUSY    a second producer at the same time on a ring for one: elements may be
 *                damaged.  Not every such mistake is seen
 */
int sl_channel_put(struct sl_channel *channel, const void *elements, uint32_t n, int whole);

/*
 * Elements taken, at most n: as many as there are, or with whole n or none (once closed,
 * whatever is left).  Does not wait.  One thread at a time.  Errors as above; -EBADF only
 * when nothing is left and nothing can come.
 */
int sl_channel_get(struct sl_channel *channel, void *elements, uint32_t n, int whole);

/*
 * Like put without whole, but waits up to timeout seconds (negative: without end) until
 * all are accepted.  Fewer than n: the time is over, it was closed, or a signal came; with
 * none accepted, 0, -EBADF (or -EBUSY) and -EINTR tell which.
 */
int sl_channel_put_wait(struct sl_channel *channel, const void *elements, uint32_t n,
			double timeout);

/* Like get without whole, but waits for the first element.  0: the time is over; -EINTR: a signal. */
int sl_channel_get_wait(struct sl_channel *channel, void *elements, uint32_t n, double timeout);

/* Again is allowed, from any thread. */
void sl_channel_close(struct sl_channel *channel);
int sl_channel_closed(const struct sl_channel *channel);

/*
 * Descriptors for an event loop; they are the channel's, only to be polled for reading.
 * Readable when a get may have something, or when a put may find room for one element, or
 * when it is closed.  From the first call on the side pays a system call each time that it
 * finds the ring empty (or full).
 */
int sl_channel_item_fd(struct sl_channel *channel);
int sl_channel_room_fd(struct sl_channel *channel);

/* Any thread. */
void sl_channel_read_counters(const struct sl_channel *channel,
			      struct sl_channel_counters *counters);

/* cffi: end */

#endif /* SL_CHANNEL_H */
