// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * A network that spoils packets, for tests and the lab: some UDP datagrams vanish,
 * of some two bytes of the payload are others.
 *
 * A classifier of traffic control (clsact, direct action), so that one program
 * stands in both directions of an interface.  The checksum is made right again, as
 * that of a router whose memory fails is: with a wrong one the kernel would drop the
 * datagram, and only who was to get it can tell this way.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/udp.h>

/* tools/sluice_cli/lab_spoil.py has the same */
struct spoil {
	__u32 drop;   /* of 2^32 datagrams */
	__u32 change; /* of 2^32 that are not dropped */
	__u64 seen;
	__u64 dropped;
	__u64 changed;
};

BPF_TABLE("array", u32, struct spoil, spoil, 1);

/* Larger than any packet; tells the verifier that an offset is one. */
#define REACH_MASK 0xffff

/* Bytes before the UDP payload; 0: no UDP datagram of plain headers. */
static __always_inline __u32 payload_offset(struct __sk_buff *skb)
{
	__u8 protocol = 0;
	__u32 offset;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		offset = sizeof(struct ethhdr) + sizeof(struct iphdr);
		if (bpf_skb_load_bytes(skb,
				       sizeof(struct ethhdr) + offsetof(struct iphdr, protocol),
				       &protocol, sizeof(protocol)))
			return 0;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		offset = sizeof(struct ethhdr) + sizeof(struct ipv6hdr);
		if (bpf_skb_load_bytes(skb,
				       sizeof(struct ethhdr) + offsetof(struct ipv6hdr, nexthdr),
				       &protocol, sizeof(protocol)))
			return 0;
	} else {
		return 0;
	}
	return protocol == IPPROTO_UDP ? offset + sizeof(struct udphdr) : 0;
}

int sluice_spoil(struct __sk_buff *skb)
{
	__u32 zero = 0, offset = payload_offset(skb), pairs, at;
	struct spoil *what = spoil.lookup(&zero);
	__u16 pair, changed, flip;

	if (!what || !offset || offset >= skb->len)
		return TC_ACT_OK;
	__sync_fetch_and_add(&what->seen, 1);
	if (bpf_get_prandom_u32() < what->drop) {
		__sync_fetch_and_add(&what->dropped, 1);
		return TC_ACT_SHOT;
	}
	if (bpf_get_prandom_u32() >= what->change)
		return TC_ACT_OK;
	/* Pairs of bytes, as the checksum (RFC 1071) has them; headers have an even length. */
	pairs = (skb->len - offset) / 2;
	if (!pairs)
		return TC_ACT_OK;
	at = (offset + bpf_get_prandom_u32() % pairs * 2) & REACH_MASK;
	flip = bpf_get_prandom_u32();
	flip += !flip;
	if (bpf_skb_load_bytes(skb, at, &pair, sizeof(pair)))
		return TC_ACT_OK;
	changed = pair ^ flip;
	if (bpf_skb_store_bytes(skb, at, &changed, sizeof(changed), 0) ||
	    bpf_l4_csum_replace(skb,
				offset - sizeof(struct udphdr) + offsetof(struct udphdr, check),
				pair, changed, sizeof(pair) | BPF_F_MARK_MANGLED_0))
		return TC_ACT_SHOT;
	__sync_fetch_and_add(&what->changed, 1);
	return TC_ACT_OK;
}
