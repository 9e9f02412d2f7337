// SPDX-License-Identifier: Apache-2.0
/*
 * Round trips: sends a datagram of --size bytes to --address and --port, waits
 * for the answer, and does so --seconds long, --interval microseconds apart.
 * The payload is a Sluice heartbeat probe (abi.h), so that the steer program can
 * answer it too; an echo server does not care.
 */
#include "mmsg.h"
#include "abi.h"

#define SAMPLES_MAX 4000000
#define ANSWER_TIMEOUT_US 100000

static uint64_t samples[SAMPLES_MAX];

static int by_value(const void *left, const void *right)
{
	const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static double percentile(uint64_t count, double part)
{
	return count ? samples[(uint64_t)(part * (count - 1))] / 1000.0 : 0;
}

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	const struct timeval timeout = { .tv_usec = ANSWER_TIMEOUT_US };
	struct sockaddr_in server = { .sin_family = AF_INET };
	char payload[BUFFER_SIZE] = { 0 }, answer[BUFFER_SIZE];
	struct sluice_heartbeat *probe = (struct sluice_heartbeat *)payload;
	uint64_t sent = 0, lost = 0, answered = 0, began, sent_ns;
	int fd = open_udp(0);

	if (!arguments.address || arguments.size < sizeof(*probe) ||
	    arguments.size > sizeof(payload) ||
	    inet_pton(AF_INET, arguments.address, &server.sin_addr) != 1) {
		fprintf(stderr, "--address is needed and --size is %zu to %zu\n", sizeof(*probe),
			sizeof(payload));
		return 2;
	}
	server.sin_port = htons(arguments.port);
	if (connect(fd, (struct sockaddr *)&server, sizeof(server)))
		fail("connect", errno);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	probe->magic = htonl(SLUICE_HEARTBEAT_MAGIC);
	probe->type = SLUICE_HEARTBEAT_PROBE;
	say_ready();
	began = clock_ns(CLOCK_MONOTONIC);
	while (!stopped && answered < SAMPLES_MAX) {
		sent_ns = clock_ns(CLOCK_MONOTONIC);
		if (sent_ns - began > arguments.seconds * NANOSECONDS)
			break;
		probe->sequence = ++sent;
		if (send(fd, payload, arguments.size, 0) < 0) {
			lost++;
			continue;
		}
		/* Answers to earlier probes that were given up come late: skip them. */
		for (;;) {
			ssize_t length = recv(fd, answer, sizeof(answer), 0);

			if (length < 0) {
				lost++;
				break;
			}
			if (((struct sluice_heartbeat *)answer)->sequence == sent) {
				samples[answered++] = clock_ns(CLOCK_MONOTONIC) - sent_ns;
				break;
			}
		}
		if (arguments.interval_us)
			usleep(arguments.interval_us);
	}
	qsort(samples, answered, sizeof(samples[0]), by_value);
	printf("{\"packets\": %llu, \"lost\": %llu, \"p50\": %.1f, \"p99\": %.1f, \"p999\": %.1f}\n",
	       (unsigned long long)sent, (unsigned long long)lost, percentile(answered, 0.5),
	       percentile(answered, 0.99), percentile(answered, 0.999));
	close(fd);
	return 0;
}
