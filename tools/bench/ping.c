// SPDX-License-Identifier: Apache-2.0
/*
 * Round trips: sends a datagram of --size bytes to --address and --port, waits
 * for the answer, and does so --seconds long, --interval microseconds apart.
 * With --open it does not wait: it asks every --interval microseconds, so that
 * a server that is late is asked as often as one that is not.
 * The payload is a Sluice heartbeat probe (abi.h), so that the steer program can
 * answer it too; an echo server does not care.
 */
#include "mmsg.h"
#include "abi.h"
#include <poll.h>
#include <stddef.h>
#include <sys/prctl.h>

#define SAMPLES_MAX 4000000
#define ANSWER_TIMEOUT_US 100000

#define LAST_ANSWERS_NS (NANOSECONDS / 2) /* what a full socket buffer holds back, and more */

struct asked {
	uint64_t sent;
	uint64_t answered;
	uint64_t lost;
};

static uint64_t samples[SAMPLES_MAX];
static uint64_t sent_ns[SAMPLES_MAX + 1]; /* by sequence number; 0: answered */

static int by_value(const void *left, const void *right)
{
	const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static double percentile(uint64_t count, double part)
{
	return count ? samples[(uint64_t)(part * (count - 1))] / 1000.0 : 0;
}

static int ask(int fd, struct sluice_heartbeat *probe, const struct arguments *arguments,
	       struct asked *asked)
{
	probe->sequence = ++asked->sent;
	sent_ns[asked->sent] = clock_ns(CLOCK_MONOTONIC);
	return send(fd, probe, arguments->size, 0) < 0 ? -1 : 0;
}

/* One answer: its sequence number, or 0 when none came. */
static uint64_t hear(int fd, int flags, struct asked *asked)
{
	char answer[BUFFER_SIZE];
	uint64_t sequence;

	if (recv(fd, answer, sizeof(answer), flags) < (ssize_t)sizeof(struct sluice_heartbeat))
		return 0;
	memcpy(&sequence, answer + offsetof(struct sluice_heartbeat, sequence), sizeof(sequence));
	if (sequence > asked->sent || !sent_ns[sequence])
		return UINT64_MAX; /* twice, or not for us */
	samples[asked->answered++] = clock_ns(CLOCK_MONOTONIC) - sent_ns[sequence];
	sent_ns[sequence] = 0;
	return sequence;
}

static void one_after_another(int fd, struct sluice_heartbeat *probe,
			      const struct arguments *arguments, struct asked *asked)
{
	const uint64_t end = clock_ns(CLOCK_MONOTONIC) + arguments->seconds * NANOSECONDS;

	while (!stopped && asked->answered < SAMPLES_MAX && asked->sent < SAMPLES_MAX) {
		uint64_t heard;

		if (clock_ns(CLOCK_MONOTONIC) > end)
			break;
		if (ask(fd, probe, arguments, asked)) {
			asked->lost++;
			continue;
		}
		/* Answers to earlier probes that were given up come late: skip them. */
		do
			heard = hear(fd, 0, asked);
		while (heard && heard != asked->sent);
		if (!heard) {
			asked->lost++;
			sent_ns[asked->sent] = 0;
		}
		if (arguments->interval_us)
			usleep(arguments->interval_us);
	}
}

/* Take the answers that come until a time; last: no longer than one is outstanding. */
static void listen_until(int fd, uint64_t when, int last, struct asked *asked)
{
	for (;;) {
		struct pollfd readable = { .fd = fd, .events = POLLIN };
		uint64_t now = clock_ns(CLOCK_MONOTONIC);
		struct timespec left;

		if (stopped || now >= when || asked->answered == SAMPLES_MAX ||
		    (last && asked->answered == asked->sent))
			return;
		left.tv_sec = (time_t)((when - now) / NANOSECONDS);
		left.tv_nsec = (long)((when - now) % NANOSECONDS);
		if (ppoll(&readable, 1, &left, NULL) > 0) {
			while (hear(fd, MSG_DONTWAIT, asked))
				;
		}
	}
}

static void on_time(int fd, struct sluice_heartbeat *probe, const struct arguments *arguments,
		    struct asked *asked)
{
	const uint64_t interval = arguments->interval_us ? arguments->interval_us * 1000ULL : 1;
	uint64_t next = clock_ns(CLOCK_MONOTONIC);
	const uint64_t end = next + arguments->seconds * NANOSECONDS;

	while (!stopped && next < end && asked->sent < SAMPLES_MAX) {
		uint64_t now;

		listen_until(fd, next, 0, asked);
		ask(fd, probe, arguments,
		    asked); /* what could not be sent is not answered either */
		now = clock_ns(CLOCK_MONOTONIC);
		next += interval;
		if (next < now) /* not two at once */
			next = now + interval;
	}
	listen_until(fd, clock_ns(CLOCK_MONOTONIC) + LAST_ANSWERS_NS, 1, asked);
	asked->lost = asked->sent - asked->answered;
}

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	const struct timeval timeout = { .tv_usec = ANSWER_TIMEOUT_US };
	struct sockaddr_in server = { .sin_family = AF_INET };
	static char payload[BUFFER_SIZE];
	struct sluice_heartbeat *probe = (struct sluice_heartbeat *)payload;
	struct asked asked = { 0 };
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
	prctl(PR_SET_TIMERSLACK, 1UL); /* else sleeps end up to 50 microseconds late (prctl(2)) */
	say_ready();
	if (arguments.open_loop)
		on_time(fd, probe, &arguments, &asked);
	else
		one_after_another(fd, probe, &arguments, &asked);
	qsort(samples, asked.answered, sizeof(samples[0]), by_value);
	printf("{\"packets\": %llu, \"lost\": %llu, \"p50\": %.1f, \"p99\": %.1f, \"p999\": %.1f}\n",
	       (unsigned long long)asked.sent, (unsigned long long)asked.lost,
	       percentile(asked.answered, 0.5), percentile(asked.answered, 0.99),
	       percentile(asked.answered, 0.999));
	close(fd);
	return 0;
}
