// SPDX-License-Identifier: Apache-2.0
/*
 * Receives with recvmmsg and forgets; --touch reads 8 bytes of each datagram.  With
 * --offload datagrams of one flow may share a message (UDP_GRO).  With --interval it
 * sleeps so many microseconds before each call: larger batches, fewer wake-ups.
 */
#include "mmsg.h"

/* Datagrams of message i: all but the last are as long as the kernel says. */
static uint64_t datagrams_of(uint32_t i)
{
	struct cmsghdr *control = CMSG_FIRSTHDR(&shared.messages[i].msg_hdr);
	uint32_t length = shared.messages[i].msg_len;
	int segment;

	if (!control || control->cmsg_level != IPPROTO_UDP || control->cmsg_type != UDP_GRO)
		return 1;
	memcpy(&segment, CMSG_DATA(control), sizeof(segment));
	return segment > 0 ? (length + segment - 1) / segment : 1;
}

static void receive_shared(int fd, const struct arguments *arguments, struct report *report)
{
	uint32_t most = arguments->batch < MESSAGES_MAX ? arguments->batch : MESSAGES_MAX;
	int on = 1, received, i;
	uint64_t bytes, packets;

	if (setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on)))
		fail("UDP_GRO", errno);
	prepare_shared(MESSAGE_SIZE);
	say_ready();
	while (running(report, arguments)) {
		received = recvmmsg(fd, shared.messages, most, MSG_WAITFORONE, NULL);
		if (received < 0) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			fail("recvmmsg", errno);
		}
		bytes = packets = 0;
		for (i = 0; i < received; i++) {
			bytes += shared.messages[i].msg_len;
			packets += datagrams_of(i);
			shared.messages[i].msg_hdr.msg_namelen = sizeof(shared.sources[i]);
			shared.messages[i].msg_hdr.msg_controllen = sizeof(shared.controls[i]);
		}
		count(report, packets, bytes);
	}
}

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct report report = { 0 };
	int fd = open_udp(arguments.port);
	int received, i;
	uint64_t bytes;

	if (arguments.offload) {
		receive_shared(fd, &arguments, &report);
		goto out;
	}
	prepare_batch(BUFFER_SIZE);
	say_ready();
	while (running(&report, &arguments)) {
		if (arguments.interval_us)
			usleep(arguments.interval_us);
		received = recvmmsg(fd, batch.messages, arguments.batch, MSG_WAITFORONE, NULL);
		if (received < 0) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			fail("recvmmsg", errno);
		}
		bytes = 0;
		for (i = 0; i < received; i++) {
			bytes += batch.messages[i].msg_len;
			if (arguments.touch)
				report.sink += *(uint64_t *)batch.buffers[i];
			batch.messages[i].msg_hdr.msg_namelen = sizeof(batch.sources[i]);
		}
		count(&report, received, bytes);
	}
out:
	finish(&report);
	report.lost += socket_drops(fd);
	print_report(&report);
	close(fd);
	return 0;
}
