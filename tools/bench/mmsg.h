/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel-socket references: one UDP socket, recvmmsg and sendmmsg in batches. */
#ifndef SLUICE_BENCH_MMSG_H
#define SLUICE_BENCH_MMSG_H

#include "reference.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sys/socket.h>

#ifndef UDP_SEGMENT /* linux/udp.h */
#define UDP_SEGMENT 103
#define UDP_GRO 104
#endif

#ifndef SO_MEMINFO /* asm-generic/socket.h */
#define SO_MEMINFO 55
#endif
#define MEMINFO_WORDS 9
#define MEMINFO_DROPS 8 /* linux/sock_diag.h: SK_MEMINFO_DROPS */

#define BATCH_MAX 1024
#define BUFFER_SIZE 2048        /* bytes */
#define SOCKET_BUFFER (8 << 20) /* bytes: what a tuned service asks for */
#define RECEIVE_TIMEOUT_US 100000

/* With --offload: datagrams of one message, and the bytes of a message. */
#define SHARE_MAX 64
#define MESSAGE_SIZE 65536
#define MESSAGES_MAX 64

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

/* Datagrams that found the socket's buffer full. */
static inline uint64_t socket_drops(int fd)
{
	uint32_t words[MEMINFO_WORDS] = { 0 };
	socklen_t length = sizeof(words);

	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, words, &length))
		return 0;
	return words[MEMINFO_DROPS];
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

union control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int))];
};

/* Messages that hold many datagrams each. */
struct shared_batch {
	struct mmsghdr messages[MESSAGES_MAX];
	struct iovec vectors[MESSAGES_MAX];
	struct sockaddr_in sources[MESSAGES_MAX];
	union control controls[MESSAGES_MAX];
	char buffers[MESSAGES_MAX][MESSAGE_SIZE];
};

static struct shared_batch shared;

static inline void prepare_shared(uint32_t length)
{
	for (int i = 0; i < MESSAGES_MAX; i++) {
		struct msghdr *header = &shared.messages[i].msg_hdr;

		shared.vectors[i].iov_base = shared.buffers[i];
		shared.vectors[i].iov_len = length;
		header->msg_iov = &shared.vectors[i];
		header->msg_iovlen = 1;
		header->msg_name = &shared.sources[i];
		header->msg_namelen = sizeof(shared.sources[i]);
		header->msg_control = &shared.controls[i];
		header->msg_controllen = sizeof(shared.controls[i]);
	}
}

#endif /* SLUICE_BENCH_MMSG_H */
