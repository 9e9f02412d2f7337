// SPDX-License-Identifier: Apache-2.0
#include "checksum.h"

#include <string.h>

uint64_t sl_sum(const void *data, size_t length, uint64_t sum)
{
	const uint8_t *p = data;
	uint64_t a = 0, b = 0, w[4];
	uint32_t word = 0;
	uint16_t half;

	/*
	 * Both halves of a 64-bit word are added into 64-bit sums of their own: no
	 * carry to catch, and four words in flight at a time.
	 */
	for (; length >= sizeof(w); length -= sizeof(w), p += sizeof(w)) {
		memcpy(w, p, sizeof(w));
		a += (uint32_t)w[0];
		b += w[0] >> 32;
		a += (uint32_t)w[1];
		b += w[1] >> 32;
		a += (uint32_t)w[2];
		b += w[2] >> 32;
		a += (uint32_t)w[3];
		b += w[3] >> 32;
	}
	for (; length >= sizeof(word); length -= sizeof(word), p += sizeof(word)) {
		memcpy(&word, p, sizeof(word));
		a += word;
	}
	if (length >= sizeof(half)) {
		memcpy(&half, p, sizeof(half));
		a += half;
		length -= sizeof(half);
		p += sizeof(half);
	}
	if (length) {
		half = 0;
		memcpy(&half, p, 1);
		a += half;
	}
	return sum + a + b;
}

uint16_t sl_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum & 0xffff;
}
