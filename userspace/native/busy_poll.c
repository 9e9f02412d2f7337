// SPDX-License-Identifier: Apache-2.0
#include "busy_poll.h"

#include <errno.h>
#include <sys/socket.h>

/* Newer than some C libraries; the values are kernel ABI (asm-generic/socket.h). */
#ifndef SO_BUSY_POLL
#define SO_BUSY_POLL 46
#endif
#ifndef SO_INCOMING_NAPI_ID
#define SO_INCOMING_NAPI_ID 56
#endif
#ifndef SO_PREFER_BUSY_POLL
#define SO_PREFER_BUSY_POLL 69
#endif
#ifndef SO_BUSY_POLL_BUDGET
#define SO_BUSY_POLL_BUDGET 70
#endif

static int set(int fd, int option, int value)
{
	return setsockopt(fd, SOL_SOCKET, option, &value, sizeof(value)) ? -errno : 0;
}

static uint32_t get(int fd, int option)
{
	int value = 0;
	socklen_t size = sizeof(value);

	if (getsockopt(fd, SOL_SOCKET, option, &value, &size) || value < 0)
		return 0;
	return value;
}

int sl_busy_poll_set(int fd, uint32_t microseconds, uint32_t budget, int prefer)
{
	int error = 0;

	if (prefer)
		error = set(fd, SO_PREFER_BUSY_POLL, 1);
	if (!error && budget)
		error = set(fd, SO_BUSY_POLL_BUDGET, (int)budget);
	/* Last: it switches polling on. */
	if (!error)
		error = set(fd, SO_BUSY_POLL, (int)microseconds);
	return error;
}

uint32_t sl_busy_poll_get(int fd)
{
	return get(fd, SO_BUSY_POLL);
}

uint32_t sl_busy_poll_napi(int fd)
{
	return get(fd, SO_INCOMING_NAPI_ID);
}
