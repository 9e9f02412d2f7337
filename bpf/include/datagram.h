/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The same struct packet as parse.h makes, from a datagram that is about to enter
 * a socket (BPF_PROG_TYPE_SK_REUSEPORT).
 *
 * By then the kernel has checked the headers of IP and the lengths of UDP, put
 * fragments together and cut off what is behind the datagram.  The context begins
 * at the UDP header; of a datagram that was in fragments, or lies in several
 * pages, only the beginning can be read directly, so bpf_skb_load_bytes() reads.
 */
#ifndef SLUICE_DATAGRAM_H
#define SLUICE_DATAGRAM_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/udp.h>
#include "abi.h"
#include "packet.h"

/* Where the bytes are; named as in parse.h, for policy.h. */
struct frame {
	struct sk_reuseport_md *context;
};

static __always_inline int is_ipv4(const struct frame *frame)
{
	return frame->context->eth_protocol == bpf_htons(ETH_P_IP);
}

/* False: what was announced can't be read, which does not happen. */
static __always_inline int read_datagram(const struct frame *frame, struct packet *packet)
{
	struct sk_reuseport_md *context = frame->context;
	__be16 port;

	if (bpf_skb_load_bytes(context, offsetof(struct udphdr, dest), &port, sizeof(port)))
		return 0;
	packet->destination_port = bpf_ntohs(port);
	packet->payload_length = context->len - sizeof(struct udphdr);
	if (is_ipv4(frame)) {
		packet->version = 4;
		packet->source.word[0] = 0;
		packet->source.word[1] = 0;
		packet->source.word[2] = bpf_htonl(0xffff);
		return !bpf_skb_load_bytes_relative(context, offsetof(struct iphdr, saddr),
						    &packet->source.word[3], sizeof(__be32),
						    BPF_HDR_START_NET);
	}
	packet->version = 6;
	return !bpf_skb_load_bytes_relative(context, offsetof(struct ipv6hdr, saddr),
					    &packet->source, sizeof(packet->source),
					    BPF_HDR_START_NET);
}

/* Reads width bytes in network order; 0 where the payload is too short. */
static __always_inline int read_payload(const struct frame *frame, const struct packet *packet,
					u32 offset, u32 width, u64 *value)
{
	u32 at = sizeof(struct udphdr) + offset;
	__be64 eight;
	__be32 four;
	__be16 two;
	u8 one;

	if (offset + width > packet->payload_length)
		return 0;
	switch (width) {
	case 1:
		if (bpf_skb_load_bytes(frame->context, at, &one, sizeof(one)))
			return 0;
		*value = one;
		return 1;
	case 2:
		if (bpf_skb_load_bytes(frame->context, at, &two, sizeof(two)))
			return 0;
		*value = bpf_ntohs(two);
		return 1;
	case 4:
		if (bpf_skb_load_bytes(frame->context, at, &four, sizeof(four)))
			return 0;
		*value = bpf_ntohl(four);
		return 1;
	case 8:
		if (bpf_skb_load_bytes(frame->context, at, &eight, sizeof(eight)))
			return 0;
		*value = __be64_to_cpu(eight);
		return 1;
	}
	return 0;
}

/*
 * As classify.h of the native modules: a loopback source is legal, for the kernel's
 * routing refuses it when it comes from outside.
 */
static __always_inline int is_impossible_source(const struct packet *packet)
{
	const u32 *word = packet->source.word;
	u32 first;

	if (packet->version == 4) {
		first = bpf_ntohl(word[3]) >> 24;
		return first == 0 || first >= 224;
	}
	if ((bpf_ntohl(word[0]) >> 24) == 0xff)
		return 1;
	if (word[0] | word[1])
		return 0;
	return word[2] == bpf_htonl(0xffff) || (!word[2] && !word[3]);
}

static __always_inline int is_probe(const struct frame *frame, const struct packet *packet)
{
	u64 magic, type;

	return packet->payload_length == sizeof(struct sluice_heartbeat) &&
	       read_payload(frame, packet, offsetof(struct sluice_heartbeat, magic), 4, &magic) &&
	       magic == SLUICE_HEARTBEAT_MAGIC &&
	       read_payload(frame, packet, offsetof(struct sluice_heartbeat, type), 1, &type) &&
	       type == SLUICE_HEARTBEAT_PROBE;
}

#endif /* SLUICE_DATAGRAM_H */
