/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the C references of `sluice bench` share: arguments, clocks, the report.
 *
 * A reference is what a careful C program would do with libxdp or with
 * recvmmsg and sendmmsg, and nothing more: it is what Sluice's Python is held
 * against.  It prints "ready" when it could receive, measures from the first
 * packet on for --seconds, and prints one line of JSON.
 */
#ifndef SLUICE_BENCH_REFERENCE_H
#define SLUICE_BENCH_REFERENCE_H

#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS 1000000000ULL

/* Give up when nothing has arrived for that long, so that no run hangs. */
#define PATIENCE_NS (10 * NANOSECONDS)

struct arguments {
	const char *interface;
	uint32_t queue;
	uint32_t map_id;    /* the steer program's XSKMAP */
	uint32_t map_index; /* where in it */
	uint32_t batch;
	uint32_t size; /* bytes: UDP payload or frame, as the program says */
	uint16_t port;
	double seconds;
	uint32_t interval_us; /* between round trips; slept before each look at the socket */
	uint32_t ports;       /* to send to, from port on, in turn; 1: only that one */
	int touch;            /* read 8 bytes of every packet */
	int offload;          /* datagrams share messages: UDP_GRO, UDP_SEGMENT */
	int open_loop;        /* ask on time, whether or not the last answer has come */
	double rate;          /* packets per second, where a program has a pace */
	const char *frame;    /* file with the frame to send */
	const char *address;  /* of the peer */
};

struct report {
	uint64_t packets;
	uint64_t bytes;
	uint64_t lost; /* ring full, no frame, socket buffer full */
	uint64_t began_ns;
	uint64_t ended_ns;
	uint64_t cpu_began_ns;
	uint64_t cpu_ended_ns;
	uint64_t sink; /* of what was touched: keeps the compiler from leaving it out */
	uint64_t umem; /* bytes */
};

static volatile sig_atomic_t stopped;

static inline uint64_t clock_ns(clockid_t id)
{
	struct timespec time;

	clock_gettime(id, &time);
	return time.tv_sec * NANOSECONDS + time.tv_nsec;
}

static inline void stop(int signal_number)
{
	(void)signal_number;
	stopped = 1;
}

static inline void fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(1);
}

static inline struct arguments parse_arguments(int argc, char **argv)
{
	struct arguments arguments = { .batch = 64, .seconds = 1, .size = 64, .ports = 1 };
	static const struct option options[] = {
		{ "interface", required_argument, NULL, 'i' },
		{ "queue", required_argument, NULL, 'q' },
		{ "map-id", required_argument, NULL, 'm' },
		{ "map-index", required_argument, NULL, 'x' },
		{ "batch", required_argument, NULL, 'b' },
		{ "size", required_argument, NULL, 's' },
		{ "port", required_argument, NULL, 'p' },
		{ "seconds", required_argument, NULL, 't' },
		{ "touch", no_argument, NULL, 'T' },
		{ "offload", no_argument, NULL, 'O' },
		{ "open", no_argument, NULL, 'L' },
		{ "rate", required_argument, NULL, 'r' },
		{ "frame", required_argument, NULL, 'f' },
		{ "address", required_argument, NULL, 'a' },
		{ "interval", required_argument, NULL, 'n' },
		{ "ports", required_argument, NULL, 'o' },
		{ 0 },
	};
	struct sigaction action = { .sa_handler = stop };
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'i':
			arguments.interface = optarg;
			break;
		case 'q':
			arguments.queue = strtoul(optarg, NULL, 10);
			break;
		case 'm':
			arguments.map_id = strtoul(optarg, NULL, 10);
			break;
		case 'x':
			arguments.map_index = strtoul(optarg, NULL, 10);
			break;
		case 'b':
			arguments.batch = strtoul(optarg, NULL, 10);
			break;
		case 's':
			arguments.size = strtoul(optarg, NULL, 10);
			break;
		case 'p':
			arguments.port = strtoul(optarg, NULL, 10);
			break;
		case 't':
			arguments.seconds = strtod(optarg, NULL);
			break;
		case 'T':
			arguments.touch = 1;
			break;
		case 'O':
			arguments.offload = 1;
			break;
		case 'L':
			arguments.open_loop = 1;
			break;
		case 'r':
			arguments.rate = strtod(optarg, NULL);
			break;
		case 'f':
			arguments.frame = optarg;
			break;
		case 'a':
			arguments.address = optarg;
			break;
		case 'o':
			arguments.ports = strtoul(optarg, NULL, 10);
			break;
		case 'n':
			arguments.interval_us = strtoul(optarg, NULL, 10);
			break;
		default:
			exit(2);
		}
	}
	if (!arguments.batch || arguments.batch > 1024) {
		fprintf(stderr, "--batch must be 1 to 1024\n");
		exit(2);
	}
	if (!arguments.ports || arguments.ports > 65535U - arguments.port) {
		fprintf(stderr, "--ports must be at least 1, and end at 65535\n");
		exit(2);
	}
	/* No SA_RESTART: a blocked call returns and the loop ends. */
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	return arguments;
}

static inline void say_ready(void)
{
	puts("ready");
	fflush(stdout);
}

/* Called before each batch; 0 ends the run.  The clock starts with the first packet. */
static inline int running(struct report *report, const struct arguments *arguments)
{
	uint64_t now = clock_ns(CLOCK_MONOTONIC);

	if (stopped)
		return 0;
	if (!report->began_ns) {
		static uint64_t waiting;

		if (!waiting)
			waiting = now;
		return now - waiting < PATIENCE_NS;
	}
	return now - report->began_ns < arguments->seconds * NANOSECONDS;
}

static inline void count(struct report *report, uint64_t packets, uint64_t bytes)
{
	if (packets && !report->began_ns) {
		/* The first batch only starts the clocks: it waited in a ring or buffer. */
		report->began_ns = clock_ns(CLOCK_MONOTONIC);
		report->cpu_began_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
		return;
	}
	report->packets += packets;
	report->bytes += bytes;
}

static inline void finish(struct report *report)
{
	report->ended_ns = clock_ns(CLOCK_MONOTONIC);
	report->cpu_ended_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

/*
 * The most memory that this program has used, in KiB.  Not getrusage's ru_maxrss, which an exec does
 * not reset: a small program would show what its large parent had when it forked.
 */
static inline unsigned long peak_rss_kib(void)
{
	FILE *file = fopen("/proc/self/status", "r");
	unsigned long peak = 0;
	char line[128];

	if (!file)
		return 0;
	while (!peak && fgets(line, sizeof(line), file)) {
		if (!strncmp(line, "VmHWM:", 6))
			peak = strtoul(line + 6, NULL, 10);
	}
	fclose(file);
	return peak;
}

static inline void print_report(const struct report *report)
{
	printf("{\"packets\": %llu, \"bytes\": %llu, \"lost\": %llu, \"seconds\": %.6f, "
	       "\"process_cpu_ns\": %llu, \"rss_kib\": %lu, \"umem_kib\": %llu, \"sink\": %llu}\n",
	       (unsigned long long)report->packets, (unsigned long long)report->bytes,
	       (unsigned long long)report->lost,
	       report->began_ns ? (report->ended_ns - report->began_ns) / 1e9 : 0.0,
	       (unsigned long long)(report->cpu_ended_ns - report->cpu_began_ns), peak_rss_kib(),
	       (unsigned long long)report->umem / 1024, (unsigned long long)report->sink);
}

#endif /* SLUICE_BENCH_REFERENCE_H */
