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
	u8 reserved[35];      /* to a cache line: CPUs share none */
};

BPF_TABLE("array", u32, struct packet, scratch, SLUICE_CPUS);

#endif /* SLUICE_PACKET_H */
