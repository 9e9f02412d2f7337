/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a frame to its UDP payload: Ethernet, up to two VLAN tags, IPv4 with
 * options, IPv6 with extension headers, UDP.
 *
 * Whatever is not understood is the kernel's: parse_frame() then returns the
 * reason to pass.  Nothing is read before its bounds are checked against the
 * frame, and nothing beyond the length that the IP header announces (Ethernet
 * padding is not payload).
 *
 * With SLUICE_FRAGS a packet may lie in several buffers, of which only the first
 * can be read through pointers.  Headers are looked for there (drivers put at
 * least the headers into it); lengths are compared with the whole packet.
 */
#ifndef SLUICE_PARSE_H
#define SLUICE_PARSE_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/udp.h>
#include "abi.h"
#include "packet.h"

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
	void *end;  /* of what pointers reach */
	u32 length; /* of the whole packet, bytes; end - data without SLUICE_FRAGS */
#ifdef SLUICE_FRAGS
	struct xdp_md *context; /* leads to the other buffers */
#endif
};

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

/* Whether the packet has fewer than count bytes from cursor on. */
static __always_inline int frame_ends_before(const struct frame *frame, const void *cursor,
					     u32 count)
{
#ifdef SLUICE_FRAGS
	return (u32)(cursor - frame->data) + count > frame->length;
#else
	return cursor + count > frame->end;
#endif
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
	if (frame_ends_before(frame, cursor, total))
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
	if (frame_ends_before(frame, cursor, left))
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
		/* Through the map, so that all the ways to here continue as one (packet.h). */
		*(volatile u16 *)&packet->payload_offset = cursor - frame->data;
		cursor = frame_at(frame, *(volatile u16 *)&packet->payload_offset);
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

#ifdef SLUICE_FRAGS
/* As read_payload() below, for bytes that lie (partly) in a later buffer of the packet. */
static __always_inline int load_payload(const struct frame *frame, u32 offset, u32 width,
					u64 *value)
{
	__be64 number = 0;

	/* 1 to 8: the policy sees to it; the verifier has to see it, too */
	asm volatile("" : "+r"(width));
	width = ((width - 1) & 7) + 1;
	if (bpf_xdp_load_bytes(frame->context, offset & FRAME_REACH_MASK, &number, width))
		return 0;
	*value = __be64_to_cpu(number) >> (64 - width * 8);
	return 1;
}
#endif

/* Reads width bytes in network order; 0 where the payload is too short. */
static __always_inline int read_payload(const struct frame *frame, const struct packet *packet,
					u32 offset, u32 width, u64 *value)
{
	void *at = frame_at(frame, packet->payload_offset + offset);

	if (offset + width > packet->payload_length)
		return 0;
#ifdef SLUICE_FRAGS
	if (packet->payload_offset + offset + width > (u32)(frame->end - frame->data))
		return load_payload(frame, packet->payload_offset + offset, width, value);
#endif
	switch (width) {
	case 1:
		if (at + 1 > frame->end)
			return 0;
		*value = *(u8 *)at;
		return 1;
	case 2:
		if (at + 2 > frame->end)
			return 0;
		*value = bpf_ntohs(*(__be16 *)at);
		return 1;
	case 4:
		if (at + 4 > frame->end)
			return 0;
		*value = bpf_ntohl(*(__be32 *)at);
		return 1;
	case 8:
		if (at + 8 > frame->end)
			return 0;
		*value = __be64_to_cpu(*(__be64 *)at);
		return 1;
	}
	return 0;
}

#endif /* SLUICE_PARSE_H */
