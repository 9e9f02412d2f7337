/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ethernet, VLAN, IPv4, IPv6 and UDP headers: read from received frames, built
 * for frames to send, turned round for answers.
 *
 * Reading follows the steer program: up to two tags, IPv4 with options, IPv6
 * with up to 8 extension headers (RFC 8200, hop-by-hop, routing, destination
 * options, AH; an atomic fragment header, RFC 6946), no fragments.  It is for
 * frames without metadata and for sender addresses; all bytes are hostile.
 *
 * Building is from a template: all headers of one destination with what does not
 * change already summed, so that a packet costs a copy and one pass over its payload.
 */
#ifndef SL_HEADERS_H
#define SL_HEADERS_H

#include <stdint.h>

#include "batch.h"

/* cffi: begin */

/* Where the parts of a UDP packet are, as offsets from the Ethernet header. */
struct sl_packet {
	uint16_t ip;  /* the IP header */
	uint16_t udp; /* the UDP header */
	uint16_t payload;
	uint16_t payload_length;
	uint8_t family; /* 4 or 6 */
	uint8_t plain;  /* 1: no IPv4 options, no extension headers */
};

/* 0, or -EBADMSG: not a whole, unfragmented UDP packet. */
int sl_parse(const uint8_t *frame, uint32_t length, struct sl_packet *packet);

/* Sender of a frame that sl_parse understood. */
void sl_parse_source(const uint8_t *frame, const struct sl_packet *packet,
		     struct sl_source *source);

struct sl_destination {
	uint8_t source_mac[6];
	uint8_t destination_mac[6];
	uint8_t source[16]; /* network order; IPv4 in the first 4 bytes */
	uint8_t destination[16];
	uint16_t source_port; /* host order, as all numbers here */
	uint16_t destination_port;
	uint16_t identification; /* IPv4; don't-fragment is set, so any value will do (RFC 6864) */
	uint16_t mtu;            /* bytes of the IP packet */
	int32_t vlan;            /* 0 to 4094, -1: untagged */
	uint32_t flow_label;     /* IPv6, 20 bits */
	uint8_t family;          /* 4 or 6 */
	uint8_t hops;            /* TTL or hop limit */
	uint8_t traffic_class;   /* DSCP and ECN */
};

/* Ethernet 14, one tag 4, IPv6 40, UDP 8: 66, and up to a multiple of 8. */
#define SL_TEMPLATE_SIZE 72
#define SL_HEADERS_MAX 66

struct sl_template {
	uint8_t header[SL_TEMPLATE_SIZE];
	uint32_t length;          /* bytes of header that count */
	uint32_t ip;              /* offset of the IP header */
	uint32_t udp;             /* offset of the UDP header */
	uint32_t payload_maximum; /* bytes that fit the MTU */
	uint64_t ip_sum;          /* IPv4 header without its length */
	uint64_t udp_sum;         /* pseudo header and ports, without lengths */
	uint8_t family;
};

/* 0, or -EINVAL: family, VLAN or MTU is out of range. */
int sl_template_init(struct sl_template *built, const struct sl_destination *destination);

/*
 * Writes headers and payload to frame, checksums included, and returns the
 * frame's length.  frame has room for SL_TEMPLATE_SIZE + length bytes; length is
 * at most payload_maximum.  payload_sum is sl_sum(payload, length, 0), which who
 * sends one payload to many computes once.
 */
uint32_t sl_template_build(const struct sl_template *built, uint8_t *frame, const uint8_t *payload,
			   uint32_t length, uint64_t payload_sum);

/*
 * The same for a payload that is in its place already: headers are written in front of it,
 * so that they end where it begins, and it is neither moved nor read.  built->length bytes
 * in front of payload (at most SL_HEADERS_MAX) are the frame's.
 */
uint32_t sl_template_head(const struct sl_template *built, uint8_t *payload, uint32_t length,
			  uint64_t payload_sum);

/*
 * What a received frame's UDP checksum says that its payload's sum is, so that a payload which
 * is passed on keeps the protection that its sender gave it (as RFC 1624 does for a changed
 * field).  0, or -EBADMSG: not understood, options or extension headers; -ENODATA: it has none.
 */
int sl_payload_sum(const uint8_t *frame, uint32_t length, uint64_t *payload_sum);

/*
 * Turns a received frame into one to its sender: MAC addresses, IP addresses and
 * ports swapped, TTL or hop limit 64.  With checksum, the UDP checksum is computed anew
 * (needed when the payload was changed, or when it came from a kernel sender on
 * the same machine, which leaves it to the device).  0, or -EBADMSG: not
 * understood, has IPv4 options or IPv6 extension headers (a source route must
 * not be followed backwards), or a group address (RFC 1122, 3.2.1.3).
 */
int sl_reverse(uint8_t *frame, uint32_t length, int checksum);

/* cffi: end */

#endif /* SL_HEADERS_H */
