// SPDX-License-Identifier: Apache-2.0
#include "batch.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Columns begin on cache lines of their own. */
#define COLUMN_ALIGN 64

/*
 * How far ahead payloads are fetched, in packets: enough to cover a miss to the
 * other core's cache (about 100 ns) at a few ns of work a packet.
 */
#define PREFETCH_AHEAD 16

static size_t column(size_t *total, uint32_t capacity, size_t entry)
{
	size_t at = *total;

	*total += (capacity * entry + COLUMN_ALIGN - 1) & ~(size_t)(COLUMN_ALIGN - 1);
	return at;
}

struct sl_batch *sl_batch_new(uint32_t capacity)
{
	size_t total = (sizeof(struct sl_batch) + COLUMN_ALIGN - 1) & ~(size_t)(COLUMN_ALIGN - 1);
	size_t times, addresses, gathered, offsets, lengths, peers, sizes, sources;
	size_t lanes, kinds, classes, services;
	struct sl_batch *batch;
	uint8_t *base;

	if (capacity == 0 || capacity > SL_BATCH_MAX)
		return NULL;
	times = column(&total, capacity, sizeof(uint64_t));
	addresses = column(&total, capacity, sizeof(uint64_t));
	gathered = column(&total, capacity, sizeof(uint64_t));
	offsets = column(&total, capacity, sizeof(uint32_t));
	lengths = column(&total, capacity, sizeof(uint32_t));
	peers = column(&total, capacity, sizeof(uint32_t));
	sizes = column(&total, capacity, sizeof(uint32_t));
	sources = column(&total, capacity, sizeof(struct sl_source));
	lanes = column(&total, capacity, 1);
	kinds = column(&total, capacity, 1);
	classes = column(&total, capacity, 1);
	services = column(&total, capacity, 1);

	base = aligned_alloc(COLUMN_ALIGN, total);
	if (!base)
		return NULL;
	memset(base, 0, total);
	batch = (struct sl_batch *)base;
	batch->capacity = capacity;
	batch->columns = base;
	batch->columns_size = total;
	batch->times = (uint64_t *)(base + times);
	batch->addresses = (uint64_t *)(base + addresses);
	batch->gathered = (uint64_t *)(base + gathered);
	batch->offsets = (uint32_t *)(base + offsets);
	batch->lengths = (uint32_t *)(base + lengths);
	batch->peers = (uint32_t *)(base + peers);
	batch->sizes = (uint32_t *)(base + sizes);
	batch->sources = (struct sl_source *)(base + sources);
	batch->lanes = base + lanes;
	batch->kinds = base + kinds;
	batch->classes = base + classes;
	batch->services = base + services;
	return batch;
}

void sl_batch_free(struct sl_batch *batch)
{
	free(batch);
}

int sl_batch_gather(struct sl_batch *batch, uint32_t offset, uint32_t width)
{
	uint32_t i, k;

	if (width == 0 || width > sizeof(uint64_t))
		return -EINVAL;
	for (i = 0; i < batch->count; i++) {
		const uint8_t *payload = batch->data + batch->offsets[i];
		uint64_t value = 0;

		if (i + PREFETCH_AHEAD < batch->count)
			__builtin_prefetch(batch->data + batch->offsets[i + PREFETCH_AHEAD] +
					   offset);
		if ((uint64_t)offset + width <= batch->lengths[i]) {
			if (width == sizeof(value)) {
				memcpy(&value, payload + offset, sizeof(value));
				value = be64toh(value);
			} else {
				for (k = 0; k < width; k++)
					value = value << 8 | payload[offset + k];
			}
		}
		batch->gathered[i] = value;
	}
	return 0;
}

void sl_batch_copy(const struct sl_batch *batch, uint32_t count, uint8_t *to,
		   const uint32_t *offsets, uint32_t room)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint32_t length = batch->lengths[i];

		if (i + PREFETCH_AHEAD < count)
			__builtin_prefetch(batch->data + batch->offsets[i + PREFETCH_AHEAD]);
		memcpy(to + (offsets ? offsets[i] : (uint64_t)i * room),
		       batch->data + batch->offsets[i], length < room ? length : room);
	}
}

int sl_scatter(uint8_t *data, const uint32_t *offsets, uint32_t count, uint32_t offset,
	       uint32_t width, const uint64_t *values)
{
	uint32_t i;

	if (width == 0 || width > sizeof(uint64_t))
		return -EINVAL;
	for (i = 0; i < count; i++) {
		uint64_t value = htobe64(values[i] << 8 * (sizeof(value) - width));

		memcpy(data + offsets[i] + offset, &value, width);
	}
	return 0;
}
