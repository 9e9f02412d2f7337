// SPDX-License-Identifier: Apache-2.0
/* Receives with recvmmsg and forgets; --touch reads 8 bytes of each datagram. */
#include "mmsg.h"

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct report report = { 0 };
	int fd = open_udp(arguments.port);
	int received, i;
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
			if (arguments.touch)
				report.sink += *(uint64_t *)batch.buffers[i];
			batch.messages[i].msg_hdr.msg_namelen = sizeof(batch.sources[i]);
		}
		count(&report, received, bytes);
	}
	finish(&report);
	print_report(&report);
	close(fd);
	return 0;
}
