// SPDX-License-Identifier: Apache-2.0
#include "headers.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "checksum.h"

#define ETHERNET_SIZE 14
#define TAG_SIZE 4
#define IPV4_SIZE 20
#define IPV6_SIZE 40
#define UDP_SIZE 8

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_TAG 0x8100         /* 802.1Q */
#define ETHERTYPE_SERVICE_TAG 0x88a8 /* 802.1ad */

#define PROTOCOL_HOP_BY_HOP 0
#define PROTOCOL_UDP 17
#define PROTOCOL_ROUTING 43
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_AH 51
#define PROTOCOL_OPTIONS 60

#define MAXIMUM_TAGS 2
#define MAXIMUM_EXTENSIONS 8

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_DONT_FRAGMENT 0x4000
#define IPV4_OFFSET 0x1fff
/* Offset and more-fragments of an IPv6 fragment header; two bits between are reserved. */
#define IPV6_FRAGMENTED 0xfff9

/* What hosts send with today (RFC 1700 and everybody since). */
#define ANSWER_HOPS 64

/* RFC 791: every network takes 68 bytes.  RFC 8200: 1280. */
#define MINIMUM_MTU_V4 68
#define MINIMUM_MTU_V6 1280

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static void put16(uint8_t *p, uint16_t value)
{
	p[0] = value >> 8;
	p[1] = value & 0xff;
}

/* The IP payload begins at *at and ends at *end; 0 or -EBADMSG. */
static int parse_ipv4(const uint8_t *frame, uint32_t length, uint32_t *at, uint32_t *end,
		      struct sl_packet *packet)
{
	const uint8_t *ip = frame + *at;
	uint32_t header, total;

	if (length - *at < IPV4_SIZE || ip[0] >> 4 != 4)
		return -EBADMSG;
	header = (ip[0] & 0xf) * 4;
	total = get16(ip + 2);
	if (header < IPV4_SIZE || total < header || total > length - *at)
		return -EBADMSG;
	if (ip[9] != PROTOCOL_UDP || get16(ip + 6) & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET))
		return -EBADMSG;
	packet->family = 4;
	packet->plain = header == IPV4_SIZE;
	*end = *at + total;
	*at += header;
	return 0;
}

static int parse_ipv6(const uint8_t *frame, uint32_t length, uint32_t *at, uint32_t *end,
		      struct sl_packet *packet)
{
	const uint8_t *ip = frame + *at;
	uint32_t extensions, size;
	uint8_t next;

	if (length - *at < IPV6_SIZE || ip[0] >> 4 != 6)
		return -EBADMSG;
	if (get16(ip + 4) > length - *at - IPV6_SIZE)
		return -EBADMSG;
	*end = *at + IPV6_SIZE + get16(ip + 4);
	*at += IPV6_SIZE;
	next = ip[6];
	packet->family = 6;
	packet->plain = next == PROTOCOL_UDP;
	for (extensions = 0; next != PROTOCOL_UDP; extensions++) {
		const uint8_t *header = frame + *at;

		/* All of them are at least 8 bytes. */
		if (extensions == MAXIMUM_EXTENSIONS || *end - *at < 8)
			return -EBADMSG;
		switch (next) {
		case PROTOCOL_HOP_BY_HOP:
		case PROTOCOL_ROUTING:
		case PROTOCOL_OPTIONS:
			size = (header[1] + 1) * 8;
			break;
		case PROTOCOL_AH: /* counts in 4 bytes, less 2 (RFC 4302) */
			size = (header[1] + 2) * 4;
			break;
		case PROTOCOL_FRAGMENT:
			if (get16(header + 2) & IPV6_FRAGMENTED)
				return -EBADMSG;
			size = 8;
			break;
		default:
			return -EBADMSG;
		}
		if (size > *end - *at)
			return -EBADMSG;
		next = header[0];
		*at += size;
	}
	return 0;
}

int sl_parse(const uint8_t *frame, uint32_t length, struct sl_packet *packet)
{
	uint32_t at = ETHERNET_SIZE, end = 0, tags, udp_length;
	uint16_t type;
	int error;

	/* Offsets are 16 bits; no frame is longer. */
	if (length < ETHERNET_SIZE || length > UINT16_MAX)
		return -EBADMSG;
	type = get16(frame + 12);
	for (tags = 0; type == ETHERTYPE_TAG || type == ETHERTYPE_SERVICE_TAG; tags++) {
		if (tags == MAXIMUM_TAGS || length - at < TAG_SIZE)
			return -EBADMSG;
		type = get16(frame + at + 2);
		at += TAG_SIZE;
	}
	packet->ip = at;
	if (type == ETHERTYPE_IPV4)
		error = parse_ipv4(frame, length, &at, &end, packet);
	else if (type == ETHERTYPE_IPV6)
		error = parse_ipv6(frame, length, &at, &end, packet);
	else
		error = -EBADMSG;
	if (error)
		return error;
	if (end - at < UDP_SIZE)
		return -EBADMSG;
	udp_length = get16(frame + at + 4);
	if (udp_length < UDP_SIZE || udp_length > end - at)
		return -EBADMSG;
	packet->udp = at;
	packet->payload = at + UDP_SIZE;
	packet->payload_length = udp_length - UDP_SIZE;
	return 0;
}

void sl_parse_source(const uint8_t *frame, const struct sl_packet *packet, struct sl_source *source)
{
	const uint8_t *ip = frame + packet->ip;

	memset(source, 0, sizeof(*source));
	if (packet->family == 4) {
		source->address[10] = 0xff;
		source->address[11] = 0xff;
		memcpy(source->address + 12, ip + 12, 4);
	} else {
		memcpy(source->address, ip + 8, 16);
	}
	source->port = get16(frame + packet->udp);
	source->family = packet->family;
}

int sl_template_init(struct sl_template *built, const struct sl_destination *destination)
{
	uint32_t at = 2 * 6, overhead;
	uint8_t *header = built->header, *ip;

	memset(built, 0, sizeof(*built));
	if (destination->family != 4 && destination->family != 6)
		return -EINVAL;
	if (destination->vlan < -1 || destination->vlan > 4094 || destination->flow_label >> 20)
		return -EINVAL;
	if (destination->mtu < (destination->family == 4 ? MINIMUM_MTU_V4 : MINIMUM_MTU_V6))
		return -EINVAL;
	memcpy(header, destination->destination_mac, 6);
	memcpy(header + 6, destination->source_mac, 6);
	if (destination->vlan >= 0) {
		put16(header + at, ETHERTYPE_TAG);
		put16(header + at + 2, destination->vlan);
		at += TAG_SIZE;
	}
	put16(header + at, destination->family == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6);
	at += 2;
	built->ip = at;
	built->family = destination->family;
	ip = header + at;
	if (destination->family == 4) {
		ip[0] = 4 << 4 | IPV4_SIZE / 4;
		ip[1] = destination->traffic_class;
		put16(ip + 4, destination->identification);
		put16(ip + 6, IPV4_DONT_FRAGMENT);
		ip[8] = destination->hops;
		ip[9] = PROTOCOL_UDP;
		memcpy(ip + 12, destination->source, 4);
		memcpy(ip + 16, destination->destination, 4);
		built->ip_sum = sl_sum(ip, IPV4_SIZE, 0);
		built->udp_sum = sl_sum(ip + 12, 8, 0);
		at += IPV4_SIZE;
	} else {
		ip[0] = 6 << 4 | destination->traffic_class >> 4;
		ip[1] = (destination->traffic_class & 0xf) << 4 | destination->flow_label >> 16;
		put16(ip + 2, destination->flow_label & 0xffff);
		ip[6] = PROTOCOL_UDP;
		ip[7] = destination->hops;
		memcpy(ip + 8, destination->source, 16);
		memcpy(ip + 24, destination->destination, 16);
		built->udp_sum = sl_sum(ip + 8, 32, 0);
		at += IPV6_SIZE;
	}
	overhead = at - built->ip + UDP_SIZE;
	built->udp = at;
	put16(header + at, destination->source_port);
	put16(header + at + 2, destination->destination_port);
	built->udp_sum = sl_sum(header + at, 4, built->udp_sum);
	built->udp_sum = sl_sum((const uint8_t[]){ 0, PROTOCOL_UDP }, 2, built->udp_sum);
	built->length = at + UDP_SIZE;
	built->payload_maximum = destination->mtu - overhead;
	return 0;
}

/* Zero means "no checksum" in UDP, so a sum of zero is sent as its other form (RFC 768). */
static void put_udp_checksum(uint8_t *field, uint64_t sum)
{
	uint16_t folded = sl_fold(sum);

	if (folded == 0)
		folded = 0xffff;
	memcpy(field, &folded, sizeof(folded));
}

/* What depends on the payload, in headers that stand in front of it; the length of it all. */
static uint32_t finish(const struct sl_template *built, uint8_t *frame, uint32_t length,
		       uint64_t payload_sum)
{
	uint8_t *ip = frame + built->ip, *udp = frame + built->udp;
	uint16_t udp_length = UDP_SIZE + length, folded;

	put16(udp + 4, udp_length);
	if (built->family == 4) {
		put16(ip + 2, IPV4_SIZE + udp_length);
		folded = sl_fold(sl_sum(ip + 2, 2, built->ip_sum));
		memcpy(ip + 10, &folded, sizeof(folded));
	} else {
		put16(ip + 4, udp_length);
	}
	/* The length counts twice: in the pseudo header and in the UDP header. */
	put_udp_checksum(udp + 6,
			 payload_sum + sl_sum(udp + 4, 2, sl_sum(udp + 4, 2, built->udp_sum)));
	return built->length + length;
}

uint32_t sl_template_build(const struct sl_template *built, uint8_t *frame, const uint8_t *payload,
			   uint32_t length, uint64_t payload_sum)
{
	/* The whole array rather than .length bytes: a constant size is a few moves. */
	memcpy(frame, built->header, SL_TEMPLATE_SIZE);
	memcpy(frame + built->length, payload, length);
	return finish(built, frame, length, payload_sum);
}

uint32_t sl_template_head(const struct sl_template *built, uint8_t *payload, uint32_t length,
			  uint64_t payload_sum)
{
	uint8_t *frame = payload - built->length;

	/*
	 * Here the array may not reach into the payload.  Headers are 42, 46, 62 or 66 bytes:
	 * both ends and the middle, of constant sizes, cover any of them.
	 */
	memcpy(frame, built->header, 32);
	memcpy(frame + 24, built->header + 24, 16);
	memcpy(payload - 32, built->header + built->length - 32, 32);
	return finish(built, frame, length, payload_sum);
}

int sl_payload_sum(const uint8_t *frame, uint32_t length, uint64_t *payload_sum)
{
	struct sl_packet packet;
	const uint8_t *ip, *udp;
	uint16_t checksum;
	uint64_t others;

	if (sl_parse(frame, length, &packet) || !packet.plain)
		return -EBADMSG;
	ip = frame + packet.ip;
	udp = frame + packet.udp;
	memcpy(&checksum, udp + 6, sizeof(checksum));
	if (checksum == 0)
		return -ENODATA;
	others = packet.family == 4 ? sl_sum(ip + 12, 8, 0) : sl_sum(ip + 8, 32, 0);
	others = sl_sum((const uint8_t[]){ 0, PROTOCOL_UDP }, 2, others);
	others = sl_sum(udp, 6, sl_sum(udp + 4, 2, others));
	/* In ones' complement: all = ~checksum, so payload = ~checksum - others, and -x is ~x. */
	*payload_sum = (uint64_t)(uint16_t)~checksum + sl_fold(others);
	return 0;
}

static void swap(uint8_t *a, uint8_t *b, size_t size)
{
	uint8_t kept[16];

	memcpy(kept, a, size);
	memcpy(a, b, size);
	memcpy(b, kept, size);
}

static bool answerable_ipv4(const uint8_t *address)
{
	return address[0] != 0 && address[0] != 127 && address[0] < 224;
}

int sl_reverse(uint8_t *frame, uint32_t length, int checksum)
{
	struct sl_packet packet;
	uint8_t *ip, *udp;
	uint16_t folded;
	uint64_t sum;

	if (sl_parse(frame, length, &packet) || !packet.plain)
		return -EBADMSG;
	ip = frame + packet.ip;
	udp = frame + packet.udp;
	/* The lowest bit of the first byte: a group of stations. */
	if ((frame[0] | frame[6]) & 1)
		return -EBADMSG;
	if (packet.family == 4) {
		if (!answerable_ipv4(ip + 12) || !answerable_ipv4(ip + 16))
			return -EBADMSG;
		swap(ip + 12, ip + 16, 4);
		ip[8] = ANSWER_HOPS;
		memset(ip + 10, 0, 2);
		folded = sl_fold(sl_sum(ip, IPV4_SIZE, 0));
		memcpy(ip + 10, &folded, sizeof(folded));
		sum = sl_sum(ip + 12, 8, 0);
	} else {
		if (ip[8] == 0xff || ip[24] == 0xff)
			return -EBADMSG;
		swap(ip + 8, ip + 24, 16);
		ip[7] = ANSWER_HOPS;
		sum = sl_sum(ip + 8, 32, 0);
	}
	swap(frame, frame + 6, 6);
	swap(udp, udp + 2, 2);
	if (checksum) {
		memset(udp + 6, 0, 2);
		sum = sl_sum((const uint8_t[]){ 0, PROTOCOL_UDP }, 2, sum);
		sum = sl_sum(udp + 4, 2, sum);
		put_udp_checksum(udp + 6, sl_sum(udp, UDP_SIZE + packet.payload_length, sum));
	}
	return 0;
}
