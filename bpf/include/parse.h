/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a frame to its UDP payload: Ethernet, up to two VLAN tags, IPv4 with
 * options, IPv6 with extension headers, UDP.
 *
 * Whatever is not understood is the kernel's: parse_frame() then returns the
 * reason to pass.  Nothing is read before its bounds are checked against the
 * frame, and nothing beyond the length that the IP header announces (Ethernet
 * padding is not payload).
 */
#ifndef SLUICE_PARSE_H
#define SLUICE_PARSE_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/udp.h>
#include "abi.h"

/* The packet goes on; any other value is an enum sluice_reason. */
#define PARSE_UDP (-1)

#define VLAN_TAGS 2 /* 802.1Q, 802.1ad, QinQ */

/* RFC 8200 names no bound; Linux and others stop well before 8 headers too. */
#define EXTENSION_HEADERS 8

#define IP_MORE_FRAGMENTS_OR_OFFSET 0x3fff  /* RFC 791: MF and the 13 offset bits */
#define IP6_MORE_FRAGMENTS_OR_OFFSET 0xfff9 /* RFC 8200, 4.5: the offset bits and M */

/*
 * The frame's bounds.  Everything else known about a packet is kept as plain
 * numbers in struct packet, and pointers are made anew from them.
 */
struct frame {
	void *data;
	void *end;
};

/*
 * What parsing found.  It lives in a map ("scratch", one entry per CPU), not on
 * the stack: the verifier forgets what it knew about a number that has been
 * stored in a map, so all the ways through the parser continue as one.  On the
 * stack each would be followed to the end of the program by itself, and the
 * program would be refused as too complex.
 */
struct packet {
	struct sluice_address source;
	u16 ip_offset; /* offsets are from the start of the frame */
	u16 payload_offset;
	u16 payload_length;
	u16 destination_port; /* host order */
	u8 version;           /* 4 or 6 */
	u8 plain;             /* neither IP options nor extension headers */
	u8 reserved[38];      /* to a cache line: CPUs share none */
};

BPF_TABLE("array", u32, struct packet, scratch, SLUICE_CPUS);

/*
 * All headers together are below 17,000 bytes, patterns reach at most 9,000
 * bytes further: the mask changes no offset.  It tells the verifier, which
 * allows 65,535 at most.
 */
#define FRAME_REACH_MASK 0x7fff

static __always_inline void *frame_at(const struct frame *frame, u32 offset)
{
	return frame->data + (offset & FRAME_REACH_MASK);
}

struct vlan_tag {
	__be16 control;
	__be16 encapsulated;
};

/* First bytes of hop-by-hop, routing and destination option headers (RFC 8200, 4.2). */
struct extension_header {
	u8 next;
	u8 length; /* 8-byte units beyond the first 8 bytes */
	u8 type;   /* routing header: type, segments left */
	u8 segments_left;
};

struct fragment_header {
	u8 next;
	u8 reserved;
	__be16 offset;
	__be32 identification;
};

static __always_inline int is_vlan(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

/* An IP payload that holds UDP, or the reason why there is none. */
struct ip_payload {
	void *start;
	u32 left; /* bytes */
	int reason;
};

static __always_inline void parse_ipv4(const struct frame *frame, struct packet *packet,
				       void *cursor, struct ip_payload *payload)
{
	struct iphdr *ip = cursor;
	u32 header, total;

	payload->reason = SLUICE_PASS_TRUNCATED;
	if ((void *)(ip + 1) > frame->end)
		return;
	payload->reason = SLUICE_PASS_IP_HEADER;
	if (ip->version != 4 || ip->ihl < 5)
		return;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (total < header)
		return;
	payload->reason = SLUICE_PASS_TRUNCATED;
	if (cursor + total > frame->end)
		return;
	payload->reason = SLUICE_PASS_NOT_UDP;
	if (ip->protocol != IPPROTO_UDP)
		return;
	payload->reason = SLUICE_PASS_FRAGMENT;
	if (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS_OR_OFFSET))
		return;
	payload->reason = PARSE_UDP;
	payload->start = cursor + header;
	payload->left = total - header;
	packet->version = 4;
	packet->plain = header == sizeof(*ip);
	packet->source.word[0] = 0;
	packet->source.word[1] = 0;
	packet->source.word[2] = bpf_htonl(0xffff);
	packet->source.word[3] = ip->saddr;
}

static __always_inline void parse_ipv6(const struct frame *frame, struct packet *packet,
				       void *cursor, struct ip_payload *payload)
{
	struct ipv6hdr *ip = cursor;
	struct extension_header *extension;
	struct fragment_header *fragment;
	u32 left, size;
	u8 next;
	int i;

	payload->reason = SLUICE_PASS_TRUNCATED;
	if ((void *)(ip + 1) > frame->end)
		return;
	payload->reason = SLUICE_PASS_IP_HEADER;
	if (ip->version != 6)
		return;
	payload->reason = SLUICE_PASS_TRUNCATED;
	left = bpf_ntohs(ip->payload_len);
	cursor = ip + 1;
	if (cursor + left > frame->end)
		return;
	packet->version = 6;
	packet->plain = ip->nexthdr == IPPROTO_UDP;
	__builtin_memcpy(&packet->source, &ip->saddr, sizeof(packet->source));
	next = ip->nexthdr;

#pragma clang loop unroll(disable)
	for (i = 0; i < EXTENSION_HEADERS; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		/* all four are at least 8 bytes long */
		if (left < 8 || cursor + 8 > frame->end)
			return;
		if (next == IPPROTO_FRAGMENT) {
			fragment = cursor;
			next = fragment->next;
			if (fragment->offset & bpf_htons(IP6_MORE_FRAGMENTS_OR_OFFSET)) {
				payload->reason = next == IPPROTO_UDP ? SLUICE_PASS_FRAGMENT :
									SLUICE_PASS_NOT_UDP;
				return;
			}
			size = sizeof(*fragment);
		} else {
			extension = cursor;
			/* Not yet at its final destination: routing is the kernel's. */
			if (next == IPPROTO_ROUTING && extension->segments_left) {
				payload->reason = SLUICE_PASS_EXTENSION;
				return;
			}
			next = extension->next;
			size = (extension->length + 1) * 8;
		}
		if (size > left)
			return;
		cursor += size;
		left -= size;
	}
	payload->start = cursor;
	payload->left = left;
	switch (next) {
	case IPPROTO_UDP:
		payload->reason = PARSE_UDP;
		break;
	case IPPROTO_HOPOPTS: /* too many of them */
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_FRAGMENT:
	case IPPROTO_AH: /* the kernel verifies what it protects */
		payload->reason = SLUICE_PASS_EXTENSION;
		break;
	default:
		payload->reason = SLUICE_PASS_NOT_UDP;
	}
}

/* PARSE_UDP and everything in *packet, or the reason why this is not for us. */
static __always_inline int parse_frame(const struct frame *frame, struct packet *packet)
{
	struct ethhdr *ethernet = frame->data;
	void *cursor = ethernet + 1;
	struct ip_payload payload = {};
	struct vlan_tag *tag;
	struct udphdr *udp;
	__be16 protocol;
	u32 length;
	int i;

	if (cursor > frame->end)
		return SLUICE_PASS_TRUNCATED;
	protocol = ethernet->h_proto;
#pragma unroll
	for (i = 0; i < VLAN_TAGS; i++) {
		if (!is_vlan(protocol))
			break;
		tag = cursor;
		cursor = tag + 1;
		if (cursor > frame->end)
			return SLUICE_PASS_TRUNCATED;
		protocol = tag->encapsulated;
	}
	packet->ip_offset = cursor - frame->data;
	if (protocol == bpf_htons(ETH_P_IP))
		parse_ipv4(frame, packet, cursor, &payload);
	else if (protocol == bpf_htons(ETH_P_IPV6))
		parse_ipv6(frame, packet, cursor, &payload);
	else
		return is_vlan(protocol) ? SLUICE_PASS_VLAN_DEPTH : SLUICE_PASS_NOT_IP;
	if (payload.reason != PARSE_UDP)
		return payload.reason;

	udp = payload.start;
	if (payload.left < sizeof(*udp))
		return SLUICE_PASS_UDP_LENGTH;
	if ((void *)(udp + 1) > frame->end)
		return SLUICE_PASS_TRUNCATED;
	length = bpf_ntohs(udp->len);
	if (length < sizeof(*udp) || length > payload.left)
		return SLUICE_PASS_UDP_LENGTH;
	packet->payload_offset = (void *)(udp + 1) - frame->data;
	packet->payload_length = length - sizeof(*udp);
	packet->destination_port = bpf_ntohs(udp->dest);
	return PARSE_UDP;
}

/*
 * RFC 1122, 3.2.1.3 and RFC 4291, 2.5 and 2.7: addresses that no packet from
 * the network may carry as its source.  The kernel gets them and drops them.
 */
static __always_inline int is_impossible_source(const struct packet *packet)
{
	const u32 *word = packet->source.word;
	u32 first;

	if (packet->version == 4) {
		first = bpf_ntohl(word[3]) >> 24;
		return first == 0 || first == 127 || first >= 224;
	}
	if ((bpf_ntohl(word[0]) >> 24) == 0xff)
		return 1;
	if (word[0] | word[1])
		return 0;
	/* ::, ::1 and IPv4-mapped */
	return word[2] == bpf_htonl(0xffff) || (!word[2] && (!word[3] || word[3] == bpf_htonl(1)));
}

#endif /* SLUICE_PARSE_H */
