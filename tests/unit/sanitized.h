/* SPDX-License-Identifier: Apache-2.0 */
/* What datapath_sanitized.c checks with: expectations, seeded draws, a checksum of its own. */
#ifndef SANITIZED_H
#define SANITIZED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "headers.h"

#define EXPECT(condition)                                                               \
	do {                                                                            \
		if (!(condition)) {                                                     \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(1);                                                        \
		}                                                                       \
	} while (0)

static uint64_t random_state;

static uint32_t draw(uint32_t below)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (random_state >> 32) % below;
}

/* As RFC 1071 has it, word by word: independent of checksum.c. */
static uint16_t slow_checksum(const uint8_t *data, size_t length, uint32_t sum)
{
	size_t i;

	for (i = 0; i < length; i++)
		sum += i & 1 ? data[i] : data[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum & 0xffff;
}

static uint32_t pseudo_sum(const uint8_t *ip, uint32_t udp_length)
{
	const uint8_t *addresses = ip[0] >> 4 == 4 ? ip + 12 : ip + 8;
	uint32_t i, sum = 17 + udp_length, size = ip[0] >> 4 == 4 ? 8 : 32;

	for (i = 0; i < size; i++)
		sum += i & 1 ? addresses[i] : addresses[i] << 8;
	return sum;
}

static void check_udp(const uint8_t *frame, uint32_t length)
{
	struct sl_packet packet;

	EXPECT(!sl_parse(frame, length, &packet));
	EXPECT(packet.payload + packet.payload_length <= length);
	EXPECT(slow_checksum(frame + packet.udp, packet.payload_length + 8,
			     pseudo_sum(frame + packet.ip, packet.payload_length + 8)) == 0);
	EXPECT(frame[packet.udp + 6] || frame[packet.udp + 7]);
	if (packet.family == 4)
		EXPECT(slow_checksum(frame + packet.ip, 20, 0) == 0);
}

static void fill_random(void *data, size_t size)
{
	uint8_t *p = data;

	while (size--)
		*p++ = draw(256);
}

#endif /* SANITIZED_H */
