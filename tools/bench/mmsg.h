/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel-socket references: one UDP socket, recvmmsg and sendmmsg in batches. */
#ifndef SLUICE_BENCH_MMSG_H
#define SLUICE_BENCH_MMSG_H

#include "reference.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#define BATCH_MAX 1024
#define BUFFER_SIZE 2048        /* bytes */
#define SOCKET_BUFFER (8 << 20) /* bytes: what a tuned service asks for */
#define RECEIVE_TIMEOUT_US 100000

struct mmsg_batch {
	struct mmsghdr messages[BATCH_MAX];
	struct iovec vectors[BATCH_MAX];
	struct sockaddr_in sources[BATCH_MAX];
	char buffers[BATCH_MAX][BUFFER_SIZE];
};

static struct mmsg_batch batch;

static inline int open_udp(uint16_t port)
{
	const struct timeval timeout = { .tv_usec = RECEIVE_TIMEOUT_US };
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
	};
	int size = SOCKET_BUFFER;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0)
		fail("socket", errno);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		fail("bind", errno);
	return fd;
}

static inline void prepare_batch(uint32_t length)
{
	for (int i = 0; i < BATCH_MAX; i++) {
		batch.vectors[i].iov_base = batch.buffers[i];
		batch.vectors[i].iov_len = length;
		batch.messages[i].msg_hdr.msg_iov = &batch.vectors[i];
		batch.messages[i].msg_hdr.msg_iovlen = 1;
		batch.messages[i].msg_hdr.msg_name = &batch.sources[i];
		batch.messages[i].msg_hdr.msg_namelen = sizeof(batch.sources[i]);
	}
}

#endif /* SLUICE_BENCH_MMSG_H */
