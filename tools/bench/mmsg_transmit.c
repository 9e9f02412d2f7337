// SPDX-License-Identifier: Apache-2.0
/*
 * Sends --size bytes to --address and --port, a batch at a time with sendmmsg; with --ports to as
 * many ports in turn, the same bytes to all.  With --offload datagrams share messages
 * (UDP_SEGMENT): a batch is as many datagrams as without.
 */
#include "mmsg.h"

static void transmit_shared(int fd, const struct arguments *arguments, struct report *report)
{
	uint32_t share = MESSAGE_SIZE / (arguments->size + 64), n, i;
	uint16_t segment = arguments->size;
	int sent;

	if (share > SHARE_MAX)
		share = SHARE_MAX;
	if (share > arguments->batch)
		share = arguments->batch;
	n = (arguments->batch + share - 1) / share;
	prepare_shared(share * arguments->size);
	for (i = 0; i < MESSAGES_MAX; i++) {
		struct cmsghdr *control = &shared.controls[i].header;

		shared.sources[i].sin_family = AF_INET;
		shared.sources[i].sin_port = htons(arguments->port);
		if (inet_pton(AF_INET, arguments->address, &shared.sources[i].sin_addr) != 1)
			fail(arguments->address, EINVAL);
		control->cmsg_level = IPPROTO_UDP;
		control->cmsg_type = UDP_SEGMENT;
		control->cmsg_len = CMSG_LEN(sizeof(segment));
		memcpy(CMSG_DATA(control), &segment, sizeof(segment));
		shared.messages[i].msg_hdr.msg_controllen = CMSG_SPACE(sizeof(segment));
	}
	/* The last one of a batch has what is left. */
	shared.vectors[n - 1].iov_len =
		(size_t)(arguments->batch - (n - 1) * share) * arguments->size;
	say_ready();
	while (running(report, arguments)) {
		uint64_t packets = 0;

		sent = sendmmsg(fd, shared.messages, n, 0);
		if (sent < 0) {
			if (errno == EINTR)
				continue;
			if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
				fail("sendmmsg", errno);
			report->lost++;
			continue;
		}
		for (i = 0; i < (uint32_t)sent; i++)
			packets += shared.vectors[i].iov_len / arguments->size;
		count(report, packets, packets * arguments->size);
	}
}

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
	if (arguments.offload) {
		transmit_shared(fd, &arguments, &report);
		goto out;
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
out:
	finish(&report);
	print_report(&report);
	close(fd);
	return 0;
}
