/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The heartbeat: a probe (struct sluice_heartbeat) is answered in place, by
 * XDP_TX, so that a peer can tell a dead host from a busy application.
 *
 * It is no reflector: the caller has applied deny and limits; the reply is
 * exactly as long as the probe; a reply is never answered, nor anything that
 * came by multicast or broadcast, with IP options or extension headers.
 */
#ifndef SLUICE_REPLY_H
#define SLUICE_REPLY_H

#include "abi.h"
#include "parse.h"

#define REPLY_HOPS 64 /* RFC 1700's default TTL; the probe's own is used up */

struct probe {
	struct udphdr udp;
	struct sluice_heartbeat heartbeat;
};

static __always_inline int is_probe(const struct frame *frame, const struct packet *packet)
{
	const struct ethhdr *ethernet = frame->data;
	const struct sluice_heartbeat *heartbeat = frame_at(frame, packet->payload_offset);

	if (!packet->plain || packet->payload_length != sizeof(*heartbeat))
		return 0;
	if ((void *)(ethernet + 1) > frame->end || (void *)(heartbeat + 1) > frame->end)
		return 0;
	/* The group bit covers multicast and broadcast of every family (IEEE 802, 8.2). */
	if (ethernet->h_dest[0] & 1)
		return 0;
	return heartbeat->magic == bpf_htonl(SLUICE_HEARTBEAT_MAGIC) &&
	       heartbeat->type == SLUICE_HEARTBEAT_PROBE;
}

static __always_inline u16 fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * The UDP checksum is computed anew, not adjusted: a sender on the same
 * machine (veth, virtio) leaves it unfinished for the hardware to complete, and
 * adjusting an unfinished sum would send out a wrong one.
 */
static __always_inline void finish_udp(struct probe *probe, u64 addresses)
{
	__be16 port = probe->udp.source;
	u64 sum;

	probe->udp.source = probe->udp.dest;
	probe->udp.dest = port;
	probe->heartbeat.type = SLUICE_HEARTBEAT_REPLY;
	probe->udp.check = 0;
	sum = addresses + probe->udp.len + bpf_htons(IPPROTO_UDP);
	sum += (u32)bpf_csum_diff(NULL, 0, (void *)probe, sizeof(*probe), 0);
	probe->udp.check = fold(sum);
	/* RFC 768: a computed zero is sent as all ones */
	if (!probe->udp.check)
		probe->udp.check = 0xffff;
}

static __always_inline int reply_ipv4(const struct frame *frame, struct iphdr *ip,
				      struct probe *probe)
{
	__be32 address;
	u16 unchecked;

	if ((void *)(ip + 1) > frame->end || (void *)(probe + 1) > frame->end)
		return 0;
	address = ip->saddr;
	ip->saddr = ip->daddr;
	ip->daddr = address;
	/* RFC 1624: HC' = ~(~HC + ~m + m'), m being the word of TTL and protocol */
	ip->check = fold((u64)(u16)~ip->check + (u16)~bpf_htons(ip->ttl << 8) +
			 bpf_htons(REPLY_HOPS << 8));
	ip->ttl = REPLY_HOPS;
	/* Zero means that the sender computed none (RFC 768); then we don't either. */
	unchecked = !probe->udp.check;
	finish_udp(probe, (u64)ip->saddr + ip->daddr);
	if (unchecked)
		probe->udp.check = 0;
	return 1;
}

static __always_inline int reply_ipv6(const struct frame *frame, struct ipv6hdr *ip,
				      struct probe *probe)
{
	u64 addresses = 0;
	u32 word;
	int i;

	if ((void *)(ip + 1) > frame->end || (void *)(probe + 1) > frame->end)
		return 0;
#pragma unroll
	for (i = 0; i < 4; i++) {
		word = ip->saddr.s6_addr32[i];
		ip->saddr.s6_addr32[i] = ip->daddr.s6_addr32[i];
		ip->daddr.s6_addr32[i] = word;
		addresses += (u64)word + ip->saddr.s6_addr32[i];
	}
	ip->hop_limit = REPLY_HOPS;
	finish_udp(probe, addresses);
	return 1;
}

/* Turns a probe into its reply; 0 if the frame is not what is_probe() saw. */
static __always_inline int make_reply(const struct frame *frame, const struct packet *packet)
{
	struct probe *probe = frame_at(frame, packet->payload_offset - sizeof(struct udphdr));
	void *ip = frame_at(frame, packet->ip_offset);
	struct ethhdr *ethernet = frame->data;
	u8 address[ETH_ALEN];

	if ((void *)(ethernet + 1) > frame->end)
		return 0;
	if (!(packet->version == 4 ? reply_ipv4(frame, ip, probe) : reply_ipv6(frame, ip, probe)))
		return 0;
	__builtin_memcpy(address, ethernet->h_source, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, ethernet->h_dest, ETH_ALEN);
	__builtin_memcpy(ethernet->h_dest, address, ETH_ALEN);
	return 1;
}

#endif /* SLUICE_REPLY_H */
