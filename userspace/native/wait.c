// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "wait.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "queue_private.h"
#include "xsk.h"

/*
 * How long to sleep before looking whether the interface is still there, ns.
 * Netlink says it at once, but not to a process in another network namespace.
 */
#define CHECK_INTERVAL 100000000LL

/* The same while a lane waits for its echoes to be sent: nothing wakes us for that. */
#define ECHO_INTERVAL 1000000LL

/* And while something is left to send that the kernel did not take (interface down, no memory). */
#define RETRY_INTERVAL 10000000LL

/* Longer than anybody waits, ns: a year.  Keeps a deadline within 64 bits. */
#define LONGEST_WAIT (365LL * 86400 * 1000000000)

#define EVENTS 16

/* What an event is about; lanes have the data 0. */
#define EVENT_WAKE 1
#define EVENT_LINK 2
#define EVENT_OTHER 3

struct sl_group {
	pthread_mutex_t lock; /* of waiting, closed and the descriptors */
	uint32_t waiting;
	bool closed;
	int epoll_fd, wake_fd, link_fd;
	uint32_t slot;
	uint32_t count;
	uint32_t next;      /* queue to begin with */
	int64_t checked_ns; /* when the interface was last seen to be there */
	int64_t poll_ns;    /* how long to look before sleeping, 0: not at all */
	struct sl_queue *queues[];
};

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void close_descriptors(struct sl_group *group)
{
	uint32_t i;

	for (i = 0; i < group->count; i++) {
		struct sl_queue *queue = group->queues[i];

		sl_lock(queue);
		if (queue->watcher[group->slot] == group->epoll_fd)
			queue->watcher[group->slot] = -1;
		sl_unlock(queue);
	}
	if (group->link_fd >= 0)
		close(group->link_fd);
	if (group->wake_fd >= 0)
		close(group->wake_fd);
	if (group->epoll_fd >= 0)
		close(group->epoll_fd);
	group->epoll_fd = group->wake_fd = group->link_fd = -1;
}

static int watch(int epoll_fd, int fd, uint32_t events, uint64_t what)
{
	struct epoll_event event = { .events = events, .data.u64 = what };

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static int watch_queue(struct sl_group *group, struct sl_queue *queue)
{
	uint32_t i;
	int error = 0;

	sl_lock(queue);
	for (i = 0; i < queue->lanes && !error; i++)
		error = watch(group->epoll_fd, queue->lane[i].fd,
			      queue->lane[i].muted ? 0 : EPOLLIN, 0);
	if (!error)
		queue->watcher[group->slot] = group->epoll_fd;
	sl_unlock(queue);
	return error;
}

/* Link changes of this network namespace; needs no privilege. */
static int open_link_socket(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE);

	if (fd < 0)
		return -errno;
	if (bind(fd, (struct sockaddr *)&address, sizeof(address))) {
		int error = -errno;

		close(fd);
		return error;
	}
	return fd;
}

struct sl_group *sl_group_new(struct sl_queue **queues, uint32_t count, uint32_t slot,
			      struct sl_error *error)
{
	struct sl_group *group;
	int code = 0;
	uint32_t i;

	memset(error, 0, sizeof(*error));
	snprintf(error->step, sizeof(error->step), "making an epoll set of the lanes");
	group = calloc(1, sizeof(*group) + count * sizeof(*queues));
	if (!group || count == 0 || slot >= SL_WATCHERS) {
		error->code = group ? EINVAL : ENOMEM;
		free(group);
		return NULL;
	}
	pthread_mutex_init(&group->lock, NULL);
	group->count = count;
	group->slot = slot;
	memcpy(group->queues, queues, count * sizeof(*queues));
	group->wake_fd = group->link_fd = -1;
	group->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (group->epoll_fd < 0)
		code = -errno;
	if (!code) {
		group->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		code = group->wake_fd < 0 ?
			       -errno :
			       watch(group->epoll_fd, group->wake_fd, EPOLLIN, EVENT_WAKE);
	}
	if (!code) {
		group->link_fd = open_link_socket();
		code = group->link_fd < 0 ?
			       group->link_fd :
			       watch(group->epoll_fd, group->link_fd, EPOLLIN, EVENT_LINK);
	}
	for (i = 0; i < count && !code; i++) {
		code = watch_queue(group, queues[i]);
		if (group->poll_ns < queues[i]->poll_us * 1000LL)
			group->poll_ns = queues[i]->poll_us * 1000LL;
	}
	if (code) {
		error->code = -code;
		close_descriptors(group);
		free(group);
		return NULL;
	}
	return group;
}

int sl_group_watch(struct sl_group *group, int fd)
{
	return watch(group->epoll_fd, fd, EPOLLIN, EVENT_OTHER);
}

void sl_group_close(struct sl_group *group)
{
	uint64_t one = 1;

	pthread_mutex_lock(&group->lock);
	if (!group->closed) {
		group->closed = true;
		if (group->waiting == 0)
			close_descriptors(group);
		else if (write(group->wake_fd, &one, sizeof(one)) < 0)
			abort(); /* an eventfd at 0 takes a 1 */
	}
	pthread_mutex_unlock(&group->lock);
}

void sl_group_free(struct sl_group *group)
{
	sl_group_close(group);
	free(group);
}

int sl_group_fd(const struct sl_group *group)
{
	return group->epoll_fd;
}

static int try_all(struct sl_group *group, struct sl_batch *batch, uint32_t maximum)
{
	uint32_t i, index = group->next;
	int count = 0;

	for (i = 0; i < group->count; i++) {
		if (index >= group->count)
			index = 0;
		count = sl_queue_receive(group->queues[index++], batch, maximum);
		if (count) {
			group->next = index;
			break;
		}
	}
	return count;
}

/*
 * Busy polling: looks again, and has the kernel look, for at most poll_ns and timeout
 * (ns, negative: without end), at least once.  As sl_queue_receive.
 */
static int poll_and_receive(struct sl_group *group, struct sl_batch *batch, uint32_t maximum,
			    int64_t timeout)
{
	int64_t end = now_ns() + group->poll_ns;
	uint32_t i;
	int result;

	if (timeout >= 0 && timeout < group->poll_ns)
		end += timeout - group->poll_ns;
	do {
		for (i = 0; i < group->count; i++)
			sl_queue_poll(group->queues[i]);
		result = try_all(group, batch, maximum);
	} while (!result && now_ns() < end);
	return result;
}

/* -ENXIO when an interface is gone, -EBADF when a queue was closed. */
static int check_all(struct sl_group *group)
{
	uint32_t i;

	for (i = 0; i < group->count; i++) {
		struct sl_queue *queue = group->queues[i];
		int result;

		sl_lock(queue);
		result = queue->closed ? -EBADF : sl_xsk_check(queue->lane[0].fd);
		sl_unlock(queue);
		/* Down is not gone: it may come up, and the sockets then go on. */
		if (result == -ENXIO || result == -EBADF)
			return result;
	}
	return 0;
}

/*
 * Every lane of every queue holds its quota; *echoes says whether some of that will
 * come back, *unsent whether there is something left to send.
 */
static bool exhausted(struct sl_group *group, bool *echoes, bool *unsent)
{
	bool all = true;
	uint32_t i, k;

	*echoes = *unsent = false;
	for (i = 0; i < group->count; i++) {
		struct sl_queue *queue = group->queues[i];

		sl_lock(queue);
		for (k = 0; k < queue->lanes; k++) {
			if (queue->lane[k].held + queue->lane[k].needs <= queue->lane[k].quota)
				all = false;
			else if (queue->lane[k].held > queue->frames.application[k])
				*echoes = true;
		}
		if (queue->frames.transmit && !queue->closed &&
		    sl_ring_level(queue->transmit.producer, queue->transmit.consumer))
			*unsent = true;
		sl_unlock(queue);
	}
	return all;
}

static void drain(int fd)
{
	char buffer[4096];

	while (recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT) > 0)
		;
}

/*
 * Sleeps once, at most nanoseconds.  1: something happened, 0: nothing, or an
 * error of sl_group_receive.
 */
static int sleep_once(struct sl_group *group, int64_t nanoseconds, bool *other)
{
	struct timespec timeout = { nanoseconds / 1000000000, nanoseconds % 1000000000 };
	struct epoll_event events[EVENTS];
	bool check = false;
	int64_t now;
	int count, i;

	count = epoll_pwait2(group->epoll_fd, events, EVENTS, &timeout, NULL);
	if (count < 0)
		return -errno;
	for (i = 0; i < count; i++) {
		if (events[i].data.u64 == EVENT_WAKE)
			return -EBADF;
		if (events[i].data.u64 == EVENT_OTHER)
			*other = true;
		if (events[i].data.u64 == EVENT_LINK)
			drain(group->link_fd);
		if (events[i].data.u64 == EVENT_LINK || events[i].events & ~EPOLLIN)
			check = true;
	}
	if (count == 0) {
		now = now_ns();
		if (now - group->checked_ns >= CHECK_INTERVAL) {
			group->checked_ns = now;
			check = true;
		}
	}
	if (check) {
		int error = check_all(group);

		if (error)
			return error;
	}
	return count > 0;
}

/* timeout: ns, negative: without end */
static int wait_and_receive(struct sl_group *group, struct sl_batch *batch, uint32_t maximum,
			    int64_t timeout)
{
	int64_t deadline = timeout > 0 ? now_ns() + timeout : 0, left = timeout;
	int result;
	bool echoes, unsent, other = false;

	for (;;) {
		int64_t slice = CHECK_INTERVAL;

		if (exhausted(group, &echoes, &unsent) && !echoes && timeout < 0)
			return -EDQUOT;
		if (echoes)
			slice = ECHO_INTERVAL;
		else if (unsent)
			slice = RETRY_INTERVAL;
		if (timeout >= 0) {
			left = timeout ? deadline - now_ns() : 0;
			if (left < 0)
				left = 0;
			if (left < slice)
				slice = left;
		}
		result = sleep_once(group, slice, &other);
		if (result < 0)
			return result;
		result = try_all(group, batch, maximum);
		if (!result && other)
			return -EAGAIN;
		if (result || (timeout >= 0 && left <= slice))
			return result;
	}
}

int sl_group_receive(struct sl_group *group, struct sl_batch *batch, uint32_t maximum,
		     double timeout)
{
	int result = try_all(group, batch, maximum);
	int64_t nanoseconds = -1;

	if (result)
		return result;
	/* Descriptors stay open while somebody is counted here. */
	pthread_mutex_lock(&group->lock);
	if (group->closed) {
		pthread_mutex_unlock(&group->lock);
		return -EBADF;
	}
	group->waiting++;
	pthread_mutex_unlock(&group->lock);

	if (timeout >= 0)
		nanoseconds = timeout < LONGEST_WAIT / 1e9 ? (int64_t)(timeout * 1e9) :
							     LONGEST_WAIT;
	result = group->poll_ns ? poll_and_receive(group, batch, maximum, nanoseconds) : 0;
	if (!result)
		result = wait_and_receive(group, batch, maximum, nanoseconds);

	pthread_mutex_lock(&group->lock);
	if (--group->waiting == 0 && group->closed)
		close_descriptors(group);
	pthread_mutex_unlock(&group->lock);
	return result;
}
