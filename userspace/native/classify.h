/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The policy half of the steer program, for datagrams that came through a
 * kernel socket.  Parsing is done by then; what remains is the same:
 *
 *   service -> source -> peer -> class -> kind -> rule -> limits -> reason, lane
 *
 * It reads the same compiled tables (bpf/include/abi.h), so a datagram gets the
 * same reason, class, kind and lane here and in the kernel program.  The state
 * is its own: peers and limits seen through kernel sockets are not those of the
 * program, which has already limited what it passed.
 *
 * Differences from the program, all of them:
 *   - a loopback source is legal: a martian from outside never gets past the
 *     kernel's own routing, so only a real local sender has one;
 *   - bytes are payload bytes, a socket never sees headers;
 *   - a lane that ends in the kernel ends here: such a datagram has the reason
 *     SLUICE_PASS_LANE and a lane, and is delivered;
 *   - SLUICE_PASS_NOT_OURS, _SOURCE and _POLICY have no lane; nobody else can
 *     read them from our socket, so the backends count and discard them.
 *
 * A classifier belongs to one thread; nothing here locks.
 */
#ifndef SL_CLASSIFY_H
#define SL_CLASSIFY_H

#include <stdint.h>

#include "abi.h"
#include "tables.h"

/* cffi: begin */

/*
 * Columns of n datagrams.  In: area + offset[i] is the payload, length[i] its
 * length in bytes, address[i] the source in network order (IPv4 mapped, all
 * zero: unknown), port[i] the destination port in host order.  Out: the rest;
 * lane is SLUICE_NO_LANE where no lane was chosen, peer 0 for strangers.
 */
struct sl_datagrams {
	const uint8_t *area;
	const uint32_t *offset;
	const uint32_t *length;
	const struct sluice_address *address;
	const uint16_t *port;
	uint8_t *reason;
	uint8_t *lane;
	uint8_t *service;
	uint8_t *class_id;
	uint8_t *kind;
	uint32_t *peer;
};

/* What is known of a remote address; times are CLOCK_MONOTONIC in nanoseconds. */
struct sl_peer {
	__u64 tat_ns; /* GCRA, theoretical arrival time */
	uint64_t packets;
	uint64_t bytes; /* of payload */
	uint64_t drops;
	uint64_t first_seen_ns;
	uint64_t last_seen_ns;
	uint64_t generation; /* of the policy that class_id belongs to */
	uint32_t id;         /* configured peer's number, 0: stranger */
	uint32_t class_id;
};

struct sl_classifier;

/* Takes over the tables.  NULL: no memory, the tables are still the caller's. */
struct sl_classifier *sl_classifier_new(struct sl_tables *tables);
void sl_classifier_free(struct sl_classifier *classifier);
/*
 * A new policy: takes over the tables and frees the old ones.  Peers keep their
 * timestamps and counters, also those that become known or cease to be.
 * 0 or -ENOMEM; then the old policy stays and the tables are the caller's.
 */
int sl_classifier_swap(struct sl_classifier *classifier, struct sl_tables *tables);

/* Classifies and counts n datagrams at now_ns (CLOCK_MONOTONIC, nanoseconds). */
void sl_classify(struct sl_classifier *classifier, const struct sl_datagrams *datagrams, uint32_t n,
		 uint64_t now_ns);

/*
 * For datagrams that the kernel program has decided about (bpf/select.bpf.c), all in lane:
 * fills the columns, with the reason SLUICE_REPLY for a probe to be answered and SLUICE_STEER
 * for the rest.  Limits were applied and verdicts counted there, so neither is done here;
 * peers are counted, without what was dropped.
 *
 * What the policy leads into no such lane is classified as by sl_classify: the kernel has cut
 * it out of a message (UDP_SEGMENT) of which the program saw the beginning, or the policy has
 * changed in between.
 */
void sl_describe(struct sl_classifier *classifier, const struct sl_datagrams *datagrams, uint32_t n,
		 uint8_t lane, uint64_t now_ns);

/*
 * Holds a configured peer as abi.h says of struct sluice_hold; interval_ns, burst and until_ns
 * count, until_ns 0 ends it.  A hold that is in force at now_ns goes on with what it has let
 * through.  0, or -ENOENT: no configured peer.
 */
int sl_classifier_hold(struct sl_classifier *classifier, const struct sluice_address *address,
		       const struct sluice_hold *hold, uint64_t now_ns);
/* Live, for reading only; rows and reasons as in abi.h. */
const struct sluice_counters *sl_classifier_counters(const struct sl_classifier *classifier);
/* The peer's entry or NULL; valid until the next call that takes the classifier. */
const struct sl_peer *sl_classifier_peer(struct sl_classifier *classifier,
					 const struct sluice_address *address);
uint32_t sl_classifier_strangers(const struct sl_classifier *classifier);
/*
 * Turns the probe in payload into its reply (both are 32 bytes).  Only for
 * datagrams whose reason is SLUICE_REPLY.
 */
void sl_heartbeat_reply(uint8_t *payload);

/* cffi: end */

#endif /* SL_CLASSIFY_H */
