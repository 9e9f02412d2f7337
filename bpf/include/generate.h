/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the load generator (generate.bpf.c) and user space share.  As with abi.h
 * there is no second copy: the program includes this file and Python feeds it
 * to cffi, so only structs of fixed-size integers and "#define NAME number" are
 * allowed here.
 *
 * Times of a schedule are in units of 2^-16 ns since the start, so that a rate
 * which is no divisor of 10^9 is still kept exactly; 64 bits last for 78 hours.
 */
#ifndef SLUICE_GENERATE_H
#define SLUICE_GENERATE_H

#include <linux/types.h>

#define SLUICE_GENERATE_STREAMS 8
#define SLUICE_GENERATE_TEMPLATES 1024 /* of all streams together */
#define SLUICE_GENERATE_FRAME 2048     /* longest frame, bytes */
#define SLUICE_GENERATE_SHIFT 16       /* schedule units per ns, as a power of 2 */

/* map "control", array[1]: written by user space only */
struct sluice_generate_control {
	__u64 duration_ns; /* nothing is sent later than this after the start; 0: no end */
	__u32 streams;     /* how many entries of "streams" are used */
	__u32 stop;        /* 1: send nothing any more */
	__u32 lazy_clock;  /* 1: neither rates nor stamps, so the time need not be exact */
	__u32 reserved;
};

/* map "progress", array[1]: the program's own memory, zeroed by user space before a run */
struct sluice_generate_progress {
	__u64 start_ns; /* CLOCK_MONOTONIC of the first call: what is before it costs no time */
	__u64 now_ns;   /* of the latest reading of the clock */
	__u32 calls;
	__u32 turn; /* where the search for a due stream begins: none starves another */
};

/*
 * map "streams", array[SLUICE_GENERATE_STREAMS]: the first half is written by
 * user space before the run, the second by the program, which runs on one CPU
 * at a time, so plain stores suffice.
 */
struct sluice_generate_stream {
	__u64 interval; /* schedule units a packet; 0: flat out */
	__u64 backlog;  /* units; what is later than this is given up */
	__u64 limit;    /* packets; 0: no limit */
	__u64 seed;     /* of the choice of sources and ports */
	__u32 first_template;
	__u32 templates; /* used in turn, by sequence number */
	__u32 sources;   /* addresses from the template's on; 0: as it is */
	__u32 ports;     /* source ports from the template's on; 0: as it is */

	__u64 due;      /* when the next packet should leave */
	__u64 earliest; /* when it may, catching up */
	__u64 sent;     /* given to the interface; the next sequence number */
	__u64 bytes;
	__u64 missed;   /* given up */
	__u64 first_ns; /* time of the first and of the last packet */
	__u64 last_ns;
};

/*
 * map "templates", array[SLUICE_GENERATE_TEMPLATES].  Offsets are from the start
 * of the frame; 0: the frame has no such field, or it is left as it is.  Sums are
 * ones' complement sums over what a checksum covers, in 16-bit words of this
 * machine's byte order, with the fields that the program writes counted as zero.
 */
struct sluice_generate_template {
	__u16 length;
	__u16 stamp_offset;    /* struct sluice_stamp; even from the UDP header */
	__u16 source_offset;   /* last 4 bytes of the source address */
	__u16 port_offset;     /* source port */
	__u16 ip_check_offset; /* IPv4 header checksum */
	__u16 udp_check_offset;
	__u16 port;   /* first source port, host order */
	__u16 store;  /* bytes to write into each frame; the rest is there already */
	__u32 source; /* first source address, host order */
	__u32 ip_sum;
	__u32 udp_sum;
	__u32 reserved_2;
	__u8 frame[SLUICE_GENERATE_FRAME];
	__u8 slack[16]; /* so that a field at any offset ends inside this struct */
};

/* In the payload, host order: both ends are on one machine and share its clock. */
struct sluice_stamp {
	__u64 sequence; /* of the stream, from 0 */
	__u64 time_ns;  /* CLOCK_MONOTONIC when it was sent */
};

#endif /* SLUICE_GENERATE_H */
