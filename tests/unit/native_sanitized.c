// SPDX-License-Identifier: Apache-2.0
/*
 * The C of the kernel-socket backends on its own, for AddressSanitizer and
 * UndefinedBehaviorSanitizer: random policies and datagrams, real sockets on
 * loopback, every size around the frame's, batches held and given back in
 * random order.  Argument: a seed.  Prints "all shown" and exits 0.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mmsg.h"

#define FRAME 256
#define ROUNDS 3000

#define CHECK(condition)                                                       \
	do {                                                                   \
		if (!(condition)) {                                            \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(1);                                               \
		}                                                              \
	} while (0)

static uint64_t state;

/* xorshift64 (Marsaglia, 2003) */
static uint64_t draw(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static struct sluice_port ports[SLUICE_PORTS];
static struct sluice_patterns patterns[SLUICE_MAX_SERVICES];
static struct sluice_rule rules[SLUICE_MAX_SERVICES * SLUICE_MAX_CLASSES * SLUICE_MAX_KINDS];
static struct sluice_policy policy;
static struct sluice_prefix prefixes[500];
static struct sluice_prefix_class classes[500];
static struct sluice_address known[50];
static uint32_t known_ids[50];

static struct sluice_address mapped(uint32_t host)
{
	return (struct sluice_address){ { 0, 0, htonl(0xffff), htonl(host) } };
}

static struct sluice_limit random_limit(void)
{
	uint64_t interval = draw() % 3 ? 0 : draw() % 1000000;

	return (struct sluice_limit){ interval, interval * (draw() % 20) };
}

/* All services and ports in use, no table left empty. */
static struct sl_tables *random_tables(uint16_t port, int deliver)
{
	uint8_t key[16];
	int error;
	struct sl_policy_source source = { &policy, ports, patterns,  rules, prefixes,
					   classes, known, known_ids, 500,   50 };
	struct sl_tables *tables;

	policy.stranger_bits_v4 = draw() % 33;
	policy.stranger_bits_v6 = draw() % 129;
	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		policy.lane[i] = (struct sluice_lane){ .end = draw() % 2,
						       .over = draw() % 2,
						       .demote_lane = draw() % 8 };
		policy.lane[i].limit = deliver ? (struct sluice_limit){ 0 } : random_limit();
	}
	for (int i = 0; i < SLUICE_PORTS; i++) {
		ports[i].service = draw() % SLUICE_MAX_SERVICES;
		ports[i].patterns = draw() % (SLUICE_MAX_PATTERNS + 1);
	}
	ports[port].service = 1;
	for (int i = 0; i < SLUICE_MAX_SERVICES * SLUICE_MAX_PATTERNS; i++) {
		struct sluice_pattern *p =
			&patterns[i / SLUICE_MAX_PATTERNS].pattern[i % SLUICE_MAX_PATTERNS];

		*p = (struct sluice_pattern){ .mask = draw(),
					      .offset = draw() % (draw() % 2 ? 300 : 65536) };
		p->width = 1 << draw() % 4;
		p->mask &= draw() & draw() & draw() & 0xff;
		p->kind = draw() % SLUICE_MAX_KINDS;
	}
	for (unsigned int i = 0; i < sizeof(rules) / sizeof(*rules); i++) {
		rules[i] =
			(struct sluice_rule){ .action = deliver ? SLUICE_ACTION_LANE : draw() % 5,
					      .lane = draw() % 8,
					      .over = draw() % 2,
					      .demote_lane = draw() % 8 };
		if (!deliver) {
			rules[i].peer = random_limit();
			rules[i].prefix = random_limit();
		}
	}
	for (int i = 0; i < 500; i++) {
		prefixes[i].prefixlen = draw() % 129;
		prefixes[i].address = draw() % 2 ? mapped(0x7f000000 | draw() % 512) :
						   (struct sluice_address){ { draw(), 0, 0, 1 } };
		classes[i].class_id = draw() % SLUICE_MAX_CLASSES;
	}
	for (int i = 0; i < 50; i++) {
		known[i] = mapped(0x7f000000 | draw() % 512);
		known_ids[i] = i + 1;
	}
	for (int i = 0; i < 16; i++)
		key[i] = draw();
	tables = sl_tables_new(&source, key, &error);
	CHECK(tables);
	return tables;
}

/* Numbers that do not fit are refused, each of them. */
static void refuse(void)
{
	uint8_t key[16] = { 0 };
	int error = 0;
	struct sl_policy_source s = { &policy, ports, patterns,  rules, prefixes,
				      classes, known, known_ids, 500,   50 };

/* NOLINTBEGIN(bugprone-macro-parentheses): place is assigned to */
#define REFUSED(place, value)                                              \
	do {                                                               \
		__typeof__(place) before = place;                          \
		place = value;                                             \
		CHECK(!sl_tables_new(&s, key, &error) && error == EINVAL); \
		place = before;                                            \
	} while (0)
	/* NOLINTEND(bugprone-macro-parentheses) */
	REFUSED(policy.stranger_bits_v4, 33);
	REFUSED(policy.stranger_bits_v6, 129);
	REFUSED(policy.lane[3].demote_lane, 8);
	REFUSED(policy.lane[3].limit.interval_ns, 1ULL << 62);
	REFUSED(ports[65535].service, SLUICE_MAX_SERVICES);
	REFUSED(ports[9].patterns, SLUICE_MAX_PATTERNS + 1);
	REFUSED(patterns[31].pattern[15].kind, SLUICE_MAX_KINDS);
	REFUSED(patterns[0].pattern[0].width, 3);
	REFUSED(patterns[0].pattern[0].width, 16);
	REFUSED(rules[4095].lane, 8);
	REFUSED(rules[4095].demote_lane, 8);
	REFUSED(rules[7].action, 5);
	REFUSED(rules[7].peer.burst_ns, ~0ULL);
	REFUSED(prefixes[499].prefixlen, 129);
	REFUSED(classes[499].class_id, SLUICE_MAX_CLASSES);
	REFUSED(s.prefix_count, SLUICE_MAX_PREFIXES + 1);
	REFUSED(s.known_count, SLUICE_MAX_KNOWN + 1);
#undef REFUSED
}

static void classify_random(struct sl_classifier *c)
{
	enum { N = 64 };
	uint32_t offset[N], length[N], peer[N];
	struct sluice_address address[N];
	uint8_t reason[N], lane[N], service[N], class_id[N], kind[N];
	uint16_t port[N];
	uint64_t now = 1, total = 0, sum = 0;
	const struct sluice_counters *counters = sl_classifier_counters(c);

	for (int round = 0; round < ROUNDS; round++) {
		/* Just as large as needed, so that reading beyond a payload is seen. */
		uint32_t size = draw() % 2000;
		uint8_t *area = malloc(size + 1);
		struct sl_datagrams d = { area, offset,  length,   address, port, reason,
					  lane, service, class_id, kind,    peer };

		for (uint32_t i = 0; i < size; i++)
			area[i] = draw() & draw() & draw();
		for (int i = 0; i < N; i++) {
			offset[i] = draw() % (size + 1);
			length[i] = size - offset[i];
			port[i] = draw();
			address[i] = draw() % 4 ? mapped(0x7f000000 | draw() % 512) :
						  (struct sluice_address){ { draw(), draw(), draw(),
									     draw() } };
		}
		now += draw() % 100000;
		sl_classify(c, &d, N, now);
		total += N;
		free(area);
		if (round % 500 == 499)
			CHECK(!sl_classifier_swap(c, random_tables(1, 0)));
	}
	for (int i = 0; i < SLUICE_VERDICTS_SIZE; i++)
		sum += counters->verdict[i].packets;
	CHECK(sum == total && counters->seen.packets == total);
}

static int bound(int family, struct sl_source *where)
{
	struct sockaddr_in6 name = { .sin6_family = family };
	socklen_t length = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(name);
	int fd = socket(family, SOCK_DGRAM, 0), size = 4 << 20;

	CHECK(fd >= 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	CHECK(!bind(fd, (struct sockaddr *)&name, length));
	CHECK(!getsockname(fd, (struct sockaddr *)&name, &length));
	*where = (struct sl_source){ .port = ntohs(name.sin6_port), .family = 4 };
	where->address[10] = where->address[11] = 0xff;
	where->address[12] = 127;
	where->address[15] = 1;
	return fd;
}

static void balance(struct sl_mmsg *m, struct sl_mmsg_statistics *s, uint32_t frames)
{
	uint64_t accounted;
	uint32_t places[4];

	sl_mmsg_read_statistics(m, s);
	accounted = s->delivered + s->replied + s->reply_failed + s->discarded + s->truncated +
		    s->no_large_frame;
	for (int i = 0; i < SLUICE_MAX_LANES; i++)
		accounted += s->queued[i] + s->lane_full[i];
	CHECK(accounted == s->received);
	sl_mmsg_census(m, places);
	CHECK(places[0] + places[1] + places[2] + places[3] == frames);
}

/*
 * Takes what has come for the sender; with a batch, each must be one of its payloads, in
 * their order (there is one socket).  Some may be missing: the sender's buffer was full.
 */
static uint32_t take(int sender, const struct sl_batch *b)
{
	static uint8_t answer[70000];
	uint32_t i = 0, taken = 0;
	ssize_t n;

	while ((n = recv(sender, answer, sizeof(answer), MSG_DONTWAIT)) >= 0) {
		taken++;
		if (!b)
			continue;
		while (i < b->count && ((uint32_t)n != b->lengths[i] ||
					memcmp(answer, b->data + b->offsets[i], n) != 0))
			i++;
		CHECK(i++ < b->count);
	}
	return taken;
}

#define PIECES 6 /* of one payload, at most */

/* The same payloads, each put together from some pieces that lie where it lay. */
static void in_pieces(struct sl_outgoing *out, struct sl_piece *piece, uint32_t *end)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < out->count; i++) {
		const uint8_t *at = out->base + out->offset[i];
		uint32_t left = out->length[i], pieces = draw() % PIECES;

		for (; pieces || left; n++) {
			piece[n].base = at;
			piece[n].length = pieces ? draw() % (left + 1) : left;
			at += piece[n].length;
			left -= piece[n].length;
			pieces -= pieces > 0;
		}
		end[i] = n;
	}
	out->offset = NULL;
	out->base = NULL;
	out->piece = piece;
	out->end = end;
	out->most = PIECES;
}

/* lane: as if the kernel had chosen it for all datagrams; NO_LANE: they are classified. */
static void sockets(int family, uint32_t large, int deliver, uint32_t gro, uint8_t lane)
{
	enum { HELD = 4 };
	static uint8_t payload[70000];
	struct sl_mmsg_options options = {
		.frame_size = FRAME, .large_frames = large, .gro = gro, .drain = 4
	};
	struct sl_source to, from;
	struct sl_batch *held[HELD] = { NULL };
	struct sl_mmsg_statistics statistics;
	uint32_t frames = (gro ? 2 : 1) * SL_MMSG_BURST + 8 * 50 + (large ? 8 * large + 1 : 0);
	int fd = bound(family, &to), sender = bound(AF_INET, &from), error;
	struct sl_classifier *c = sl_classifier_new(random_tables(to.port, deliver));
	struct sl_mmsg *m, *sends;
	uint64_t sent = 0;

	for (int i = 0; i < SLUICE_MAX_LANES; i++) {
		options.quota[i] = 50;
		options.share[i] = SL_MMSG_SHARE_ONE / 10;
	}
	for (unsigned int i = 0; i < sizeof(payload); i++)
		payload[i] = i * 7;
	CHECK(c);
	m = sl_mmsg_new(&options, c, &error);
	CHECK(m);
	CHECK(!sl_mmsg_add(m, fd, to.port));
	if (lane != SLUICE_NO_LANE) {
		CHECK(sl_mmsg_set_lane(m, sender, lane) == (gro ? -EINVAL : -ENOENT));
		CHECK(sl_mmsg_set_lane(m, fd, lane) == (gro ? -EINVAL : 0));
	}
	/* Knows of its socket that datagrams may share a message. */
	options.gro = 0;
	sends = sl_mmsg_new(&options, c, &error);
	CHECK(sends && !sl_mmsg_add(sends, sender, 1));
	CHECK(sl_mmsg_remove(m, sender) == -ENOENT);
	for (int i = 0; i < HELD; i++)
		held[i] = sl_batch_new(100);
	for (int round = 0; round < 400; round++) {
		uint32_t offset[80], length[80], failed[80], n = draw() % 81;
		uint32_t usual = draw() % 3 ? draw() % 600 : 0;
		struct sl_outgoing out = { .base = payload,
					   .offset = offset,
					   .length = length,
					   .destination = &to,
					   .count = n,
					   .destinations = 1 };
		struct sl_piece piece[80 * PIECES];
		uint32_t end[80];
		struct sl_send_result result = { 0 };
		int32_t errors[80];
		struct sl_batch *b = held[draw() % HELD];

		for (uint32_t i = 0; i < n; i++) {
			static const uint32_t edges[] = { 0,    1,     FRAME - 1, FRAME, FRAME + 1,
							  1472, 20000, 65507,     65508, 69000 };

			length[i] = draw() % 8 ? draw() % 600 : edges[draw() % 10];
			if (usual && draw() % 16)
				length[i] = usual;
			offset[i] = draw() % (sizeof(payload) - length[i] + 1);
		}
		if (draw() % 3 == 0)
			in_pieces(&out, piece, end);
		if (draw() % 4)
			sl_mmsg_send_from(sends, 0, &out, 1000, failed, errors, &result);
		else
			sl_mmsg_send(sender, &out, 1000, failed, errors, &result);
		CHECK(!result.stopped && result.next == n && result.sent + result.failed == n);
		for (uint32_t i = 0; i < result.failed; i++)
			CHECK(errors[i] == EMSGSIZE && length[failed[i]] > 65507);
		sent += result.sent;
		if (b->count)
			CHECK(sl_mmsg_release(m, b) > 0);
		error = sl_mmsg_receive(m, b, 1 + draw() % 100, 0, 0);
		CHECK(error >= 0 || error == -EAGAIN);
		for (uint32_t i = 0; i < b->count; i++) {
			const uint8_t *at = b->data + b->offsets[i];

			CHECK((uint64_t)b->offsets[i] + b->lengths[i] <= b->data_size);
			for (uint32_t k = 1; k < b->lengths[i]; k++)
				CHECK((uint8_t)(at[k] - at[k - 1]) == 7);
			CHECK(b->sources[i].port == from.port && b->sources[i].family == 4);
		}
		if (b->count && draw() % 2) {
			uint32_t order[100], back_failed[100];
			struct sl_send_result back = { 0 };
			int32_t back_errors[100];

			take(sender, NULL); /* heartbeats */
			sl_mmsg_send_back(m, b, order, 1000, back_failed, back_errors, &back);
			CHECK(!back.stopped && back.next == b->count);
			CHECK(back.sent == b->count && !back.failed);
			CHECK(take(sender, b) > 0);
		}
		balance(m, &statistics, frames);
	}
	for (int i = 0; i < HELD; i++)
		if (held[i]->count)
			sl_mmsg_release(m, held[i]);
	for (int empty = 0; empty < 3;) {
		error = sl_mmsg_receive(m, held[0], 100, 0, 1);
		empty += error == 0;
		if (error > 0)
			CHECK((int)sl_mmsg_release(m, held[0]) == error);
		CHECK(sl_mmsg_release(m, held[0]) == 0);
	}
	balance(m, &statistics, frames);
	CHECK(statistics.received + statistics.overflowed <= sent);
	CHECK(statistics.received > sent / 2);
	CHECK(!large || !deliver || statistics.truncated == 0);
	CHECK(!sl_mmsg_remove(m, fd));
	/* Some came together. */
	CHECK(!gro || statistics.shared > statistics.received / 10);
	sl_mmsg_free(sends);
	for (int i = 0; i < HELD; i++)
		sl_batch_free(held[i]);
	sl_mmsg_free(m);
	sl_classifier_free(c);
	close(fd);
	close(sender);
	printf("%s, %u large frames: %llu sent, %llu received, %llu of them together\n",
	       family == AF_INET ? "IPv4" : "IPv6", large, (unsigned long long)sent,
	       (unsigned long long)statistics.received, (unsigned long long)statistics.shared);
}

int main(int argc, char **argv)
{
	struct sl_classifier *c;

	CHECK(argc == 2);
	state = strtoull(argv[1], NULL, 10) * 2 + 1;
	c = sl_classifier_new(random_tables(1, 0));
	CHECK(c);
	classify_random(c);
	sl_classifier_free(c);
	refuse();
	for (uint32_t gro = 0; gro < 2; gro++) {
		sockets(AF_INET, 4, 1, gro, SLUICE_NO_LANE);
		sockets(AF_INET6, 4, 0, gro, SLUICE_NO_LANE);
		sockets(AF_INET6, 0, 1, gro, 3);
	}
	sockets(AF_INET, 4, 1, 0, SLUICE_MAX_LANES - 1);
	puts("all shown");
	return 0;
}
