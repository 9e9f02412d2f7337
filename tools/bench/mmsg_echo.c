// SPDX-License-Identifier: Apache-2.0
/* Sends every datagram back to where it came from, a batch at a time. */
#include "mmsg.h"

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct report report = { 0 };
	int fd = open_udp(arguments.port);
	int received, sent, i;
	uint64_t bytes;

	prepare_batch(BUFFER_SIZE);
	say_ready();
	while (running(&report, &arguments)) {
		received = recvmmsg(fd, batch.messages, arguments.batch, MSG_WAITFORONE, NULL);
		if (received < 0) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			fail("recvmmsg", errno);
		}
		bytes = 0;
		for (i = 0; i < received; i++) {
			bytes += batch.messages[i].msg_len;
			batch.vectors[i].iov_len = batch.messages[i].msg_len;
		}
		sent = sendmmsg(fd, batch.messages, received, 0);
		if (sent < received)
			report.lost += received - (sent < 0 ? 0 : sent);
		for (i = 0; i < received; i++) {
			batch.vectors[i].iov_len = BUFFER_SIZE;
			batch.messages[i].msg_hdr.msg_namelen = sizeof(batch.sources[i]);
		}
		count(&report, received, bytes);
	}
	finish(&report);
	report.lost += socket_drops(fd);
	print_report(&report);
	close(fd);
	return 0;
}
