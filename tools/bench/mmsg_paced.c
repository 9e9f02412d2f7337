// SPDX-License-Identifier: Apache-2.0
/*
 * Sends --size bytes to --address and --port at --rate, and sleeps between: what it costs can be told
 * from the machine's idle time, which a generator that spins would use up.  Ends with SIGTERM, or
 * after --seconds.
 */
#include "mmsg.h"
#include <sys/prctl.h>

/*
 * Datagrams leave together this often: as seldom as network cards with usual settings interrupt, and
 * so seldom that sleeping and waking is a small part of the cost.
 */
#define TICK_NS 100000

static void sleep_until(uint64_t when_ns)
{
	const struct timespec when = {
		.tv_sec = (time_t)(when_ns / NANOSECONDS),
		.tv_nsec = (long)(when_ns % NANOSECONDS),
	};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL);
}

int main(int argc, char **argv)
{
	struct arguments arguments = parse_arguments(argc, argv);
	struct report report = { 0 };
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(arguments.port) };
	uint64_t due, tick;
	int fd = open_udp(0);

	if (!arguments.address || arguments.size > BUFFER_SIZE || arguments.rate <= 0 ||
	    inet_pton(AF_INET, arguments.address, &to.sin_addr) != 1) {
		fprintf(stderr, "--address and --rate are needed, --size is at most %d\n",
			BUFFER_SIZE);
		return 2;
	}
	prepare_batch(arguments.size);
	for (int i = 0; i < BATCH_MAX; i++)
		batch.sources[i] = to;
	/* Else the kernel adds up to 50 microseconds to each sleep (prctl(2)). */
	prctl(PR_SET_TIMERSLACK, 1UL);
	say_ready();
	report.began_ns = tick = clock_ns(CLOCK_MONOTONIC);
	report.cpu_began_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
	while (running(&report, &arguments)) {
		int sent, n;

		tick += TICK_NS;
		sleep_until(tick);
		due = (uint64_t)((double)(tick - report.began_ns) * arguments.rate / NANOSECONDS) -
		      report.packets - report.lost;
		n = due < BATCH_MAX ? (int)due : BATCH_MAX;
		sent = n ? sendmmsg(fd, batch.messages, n, 0) : 0;
		if (sent < 0 && errno != EINTR && errno != ENOBUFS && errno != EAGAIN &&
		    errno != ECONNREFUSED)
			fail("sendmmsg", errno);
		report.packets += sent > 0 ? sent : 0;
		report.lost += sent < 0 && errno != EINTR ? n : 0;
	}
	finish(&report);
	print_report(&report);
	close(fd);
	return 0;
}
