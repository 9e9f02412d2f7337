/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is known of a packet once its headers are read, whoever read them:
 * parse.h from a frame, datagram.h from what the kernel gives to a socket.
 */
#ifndef SLUICE_PACKET_H
#define SLUICE_PACKET_H

#include "abi.h"

/*
 * What parsing found, and what was decided on the way.  It lives in a map
 * ("scratch", one entry per CPU), not on the stack: the verifier forgets what it
 * knew about a number that has been stored in a map, so all the ways to it
 * continue as one.  On the stack each would be followed to the end of the program
 * by itself, and the program would take long to load or be refused as too complex.
 * Volatile reads keep the compiler from using what it has in a register.
 */
struct packet {
	struct sluice_address source;
	u16 ip_offset; /* offsets are from the start of the frame */
	u16 payload_offset;
	u16 payload_length;
	u16 destination_port; /* host order */
	u8 version;           /* 4 or 6 */
	u8 plain;             /* neither IP options nor extension headers */
	u8 reason;            /* select program: enum sluice_reason .. */
	u8 lane;              /* .. and SLUICE_NO_LANE, or the lane to enter or to count it in */
	u8 at_home;           /* this CPU counts its peer without a lock */
	u8 reserved[3];
	u64 exact_ns;  /* exact_time(); 0: not asked for yet */
	u8 unused[24]; /* to a cache line: CPUs share none */
};

BPF_TABLE("array", u32, struct packet, scratch, SLUICE_CPUS);

/*
 * Two clocks, both CLOCK_MONOTONIC.  The coarse one is a number in memory that the
 * kernel's tick moves on, by 1 to 10 ms; it says who was silent longest.  The exact
 * one reads the CPU's counter and waits for all loads before it: some 30 ns, where
 * all else of a packet takes 55.  So it is read once a packet, and only for a packet
 * that a limit or a timestamp needs it for.
 */
static __always_inline u64 coarse_time(struct packet *packet)
{
	packet->exact_ns = 0;
	return bpf_ktime_get_coarse_ns();
}

static __always_inline u64 exact_time(struct packet *packet)
{
	/* Through the map: the verifier need not follow both ways to here (see above). */
	u64 now = *(volatile u64 *)&packet->exact_ns;

	if (!now) {
		now = bpf_ktime_get_ns();
		*(volatile u64 *)&packet->exact_ns = now;
	}
	return now;
}

#endif /* SLUICE_PACKET_H */
