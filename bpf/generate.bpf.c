// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Load generator for tests and benchmarks.
 *
 * User space runs this program with BPF_PROG_TEST_RUN and
 * BPF_F_TEST_XDP_LIVE_FRAMES (Documentation/bpf/bpf_prog_run.rst): the kernel
 * calls it again and again with a frame of its own making, and really transmits
 * what comes back with XDP_TX.  So each call decides whether a packet is due,
 * and if so which, and writes it into the frame.
 *
 * The frames are recycled: they come back as the receiver left them.  With several
 * templates nothing is assumed about their contents and the template is stored
 * whole each time; with a single one the frames hold it from the start, and only
 * as much is stored as may have changed (a quarter of the cost with long frames).
 * They all start with the length of the longest template and are cut to size.
 *
 * Runs on one CPU at a time, so its maps need no atomics.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include "generate.h"

/*
 * Behind schedule (the machine was busy, or user space was between two calls), a
 * stream catches up at no more than 4 times its rate, so that a delay does not
 * become a burst that overflows the receiver's rings.
 */
#define CATCH_UP_SHIFT 2

/*
 * The compiler folds "a <= x && x <= b" into one unsigned comparison of a copy,
 * and the verifier then knows nothing of x.  This keeps the comparisons apart.
 */
#define KEEP(x) asm volatile("" : "+r"(x))

BPF_ARRAY(control, struct sluice_generate_control, 1);
BPF_ARRAY(streams, struct sluice_generate_stream, SLUICE_GENERATE_STREAMS);
BPF_ARRAY(templates, struct sluice_generate_template, SLUICE_GENERATE_TEMPLATES);

BPF_ARRAY(progress, struct sluice_generate_progress, 1);

/* With a lazy clock the time is read once in so many calls; reading it costs 35 ns. */
#define CLOCK_CALLS 32

/* The mixing step of splitmix64: same seed and sequence number, same source. */
static __always_inline __u64 mix(__u64 x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static __always_inline __u64 words(__u64 value)
{
	return (value & 0xffff) + ((value >> 16) & 0xffff) + ((value >> 32) & 0xffff) +
	       (value >> 48);
}

/* RFC 1071: fold the carries in, complement. */
static __always_inline __u16 checksum(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * A place in the template's frame.  User space never writes an offset out of
 * bounds; the mask proves it to the verifier, and the slack behind the frame
 * makes room for the widest field.
 */
static __always_inline void *place(struct sluice_generate_template *template, __u32 offset)
{
	return template->frame + (offset & (SLUICE_GENERATE_FRAME - 1));
}

static __always_inline void put16(struct sluice_generate_template *template, __u32 offset,
				  __u16 value)
{
	*(__u16 *)place(template, offset) = value;
}

/* True when the stream may send now; its schedule is moved on. */
static __always_inline bool take(struct sluice_generate_stream *stream, __u64 elapsed)
{
	__u64 late;

	if (stream->limit && stream->sent >= stream->limit)
		return false;
	if (!stream->interval)
		return true;
	if (elapsed < stream->due || elapsed < stream->earliest)
		return false;
	late = elapsed - stream->due;
	if (late > stream->backlog) {
		__u64 lost = (late - stream->backlog) / stream->interval;

		stream->missed += lost;
		stream->due += lost * stream->interval;
	}
	stream->due += stream->interval;
	stream->earliest = elapsed + (stream->interval >> CATCH_UP_SHIFT);
	return true;
}

/* Write sequence, time, source and checksums into the template. */
static __always_inline void fill(struct sluice_generate_stream *stream,
				 struct sluice_generate_template *template, __u64 now)
{
	__u64 ip_sum = template->ip_sum;
	__u64 udp_sum = template->udp_sum;
	__u64 random = mix(stream->seed ^ stream->sent);
	__u32 offset;

	offset = template->stamp_offset;
	if (offset) {
		struct sluice_stamp *stamp = place(template, offset);

		stamp->sequence = stream->sent;
		stamp->time_ns = now;
		udp_sum += words(stream->sent) + words(now);
	}
	offset = template->source_offset;
	if (offset) {
		__u32 source = template->source;

		if (stream->sources)
			source += (__u32)random % stream->sources;
		source = bpf_htonl(source);
		*(__u32 *)place(template, offset) = source;
		ip_sum += words(source);
		udp_sum += words(source);
	}
	offset = template->port_offset;
	if (offset) {
		__u16 port = template->port;

		if (stream->ports)
			port += (__u32)(random >> 32) % stream->ports;
		port = bpf_htons(port);
		put16(template, offset, port);
		udp_sum += port;
	}
	offset = template->ip_check_offset;
	if (offset)
		put16(template, offset, checksum(ip_sum));
	offset = template->udp_check_offset;
	if (offset) {
		__u16 check = checksum(udp_sum);

		/* RFC 768: 0 means that there is none, so 0 is sent as its other form. */
		put16(template, offset, check ? check : 0xffff);
	}
}

static __always_inline int send(struct xdp_md *ctx, struct sluice_generate_stream *stream,
				__u64 now)
{
	struct sluice_generate_template *template;
	__u32 present = ctx->data_end - ctx->data;
	__u32 index = stream->first_template;
	__u64 length, store;

	if (stream->templates > 1)
		index += stream->sent % stream->templates;
	template = templates.lookup(&index);
	if (!template)
		return XDP_ABORTED;
	length = template->length;
	KEEP(length);
	if (length < ETH_HLEN || length > present)
		return XDP_ABORTED;
	fill(stream, template, now);
	if (length < present && bpf_xdp_adjust_tail(ctx, (int)(length - present)))
		return XDP_ABORTED;
	store = template->store;
	KEEP(store);
	if (store > SLUICE_GENERATE_FRAME)
		return XDP_ABORTED;
	KEEP(store);
	if (store && bpf_xdp_store_bytes(ctx, 0, template->frame, store))
		return XDP_ABORTED;
	if (!stream->sent)
		stream->first_ns = now;
	stream->last_ns = now;
	stream->sent++;
	stream->bytes += length;
	return XDP_TX;
}

int sluice_generate(struct xdp_md *ctx)
{
	struct sluice_generate_control *what;
	struct sluice_generate_stream *stream;
	struct sluice_generate_progress *memory;
	__u32 zero = 0, first, i;
	__u64 now, elapsed;

	what = control.lookup(&zero);
	memory = progress.lookup(&zero);
	if (!what || !memory || what->stop)
		return XDP_DROP;
	if (!what->lazy_clock || !(memory->calls++ % CLOCK_CALLS))
		memory->now_ns = bpf_ktime_get_ns();
	now = memory->now_ns;
	if (!memory->start_ns)
		memory->start_ns = now;
	elapsed = now - memory->start_ns;
	if (what->duration_ns && elapsed >= what->duration_ns)
		return XDP_DROP;
	elapsed <<= SLUICE_GENERATE_SHIFT;

	first = memory->turn + 1;
	if (first >= what->streams)
		first = 0;
	memory->turn = first;
	for (i = 0; i < SLUICE_GENERATE_STREAMS; i++) {
		__u32 index = first + i;

		if (i >= what->streams)
			break;
		if (index >= what->streams)
			index -= what->streams;
		stream = streams.lookup(&index);
		if (!stream)
			break;
		if (take(stream, elapsed))
			return send(ctx, stream, now);
	}
	return XDP_DROP;
}
