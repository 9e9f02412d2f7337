// SPDX-License-Identifier: Apache-2.0
/*
 * Sends --size bytes to --address and --port, a batch at a time with sendmmsg; with --ports to as
 * many ports in turn, the same bytes to all.
 */
#include "mmsg.h"

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct report report = { 0 };
	int fd = open_udp(0);
	uint32_t i;
	int sent;

	if (arguments.size > BUFFER_SIZE || !arguments.address) {
		fprintf(stderr, "--address is needed and --size is at most %d\n", BUFFER_SIZE);
		return 2;
	}
	prepare_batch(arguments.size);
	for (i = 0; i < BATCH_MAX; i++) {
		batch.sources[i].sin_family = AF_INET;
		batch.sources[i].sin_port = htons(arguments.port + i % arguments.ports);
		if (arguments.ports > 1)
			batch.vectors[i].iov_base = batch.buffers[0];
		if (inet_pton(AF_INET, arguments.address, &batch.sources[i].sin_addr) != 1)
			fail(arguments.address, EINVAL);
	}
	say_ready();
	while (running(&report, &arguments)) {
		sent = sendmmsg(fd, batch.messages, arguments.batch, 0);
		if (sent < 0) {
			if (errno == EINTR)
				continue;
			if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
				fail("sendmmsg", errno);
			report.lost++;
			continue;
		}
		count(&report, sent, (uint64_t)sent * arguments.size);
	}
	finish(&report);
	print_report(&report);
	close(fd);
	return 0;
}
