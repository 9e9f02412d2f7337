/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * All that the kernel programs and user space share: sizes, verdicts and the
 * layout of every map's key and value.  Nothing here is written down a second
 * time.  Three readers take it from this file:
 *
 *   - the BPF programs include it;
 *   - the cffi modules are built from it (their build scripts feed the text
 *     below to cffi), so Python spells lib.SLUICE_MAX_LANES and
 *     ffi.new("struct sluice_rule[]", n);
 *   - tools that look at a loaded program learn the layout from the maps' BTF.
 *
 * Therefore only plain enums, structs of fixed-size integers and
 * "#define NAME number" are allowed in this file.
 *
 * Banks.  What a policy says lives twice, in bank 0 and bank 1.  The program
 * reads the generation once per packet and uses bank (generation & 1); user
 * space fills the other bank and then writes the next generation, one aligned
 * 64-bit store.  A bank is written again only after an RCU grace period, so no
 * packet sees half of one policy and half of another.
 *
 * Addresses are 16 bytes in network order; IPv4 is mapped (::ffff:a.b.c.d), and
 * a packet that carries such an address in an IPv6 header is never looked up
 * (SLUICE_PASS_SOURCE), so the two families cannot be confused.
 */
#ifndef SLUICE_ABI_H
#define SLUICE_ABI_H

#include <linux/types.h>

#define SLUICE_ABI_VERSION 1

/* What stands in compiled code for numbers that the loader draws; see constant.h. */
#define SLUICE_MARK_COOKIE 0x5c1de7c00c1e0001ULL
#define SLUICE_MARK_SALT 0x5c1de75a17000002ULL

#define SLUICE_BANKS 2
#define SLUICE_MAX_LANES 8     /* lane 0 has the highest priority */
#define SLUICE_MAX_SERVICES 32 /* service 0: not ours */
#define SLUICE_MAX_CLASSES 16  /* class 0: nobody's prefix */
#define SLUICE_MAX_KINDS 8     /* kind 0: no pattern matched */
#define SLUICE_MAX_PATTERNS 16 /* patterns of one service */
#define SLUICE_MAX_QUEUES 64
#define SLUICE_MAX_WORKERS 64       /* processes that share the ports of kernel sockets */
#define SLUICE_MAX_STRANGERS 65536  /* so many unknown remote addresses are remembered */
#define SLUICE_MAX_KNOWN 131072     /* configured peers; their numbers are 1 to this */
#define SLUICE_MAX_PREFIXES 262144  /* per bank, both families */
#define SLUICE_PREFIX_BUCKETS 16384 /* limits of stranger prefixes, a power of 2 */
#define SLUICE_PORTS 65536

/* 2^20 bits: with 10,000 configured peers one stranger in 100 is looked up in vain. */
#define SLUICE_FILTER_WORDS 16384

/* Configured peers whose marks share a cache line. */
#define SLUICE_HOLD_MARKS 64
#define SLUICE_HOLD_LINES 2048 /* SLUICE_MAX_KNOWN / SLUICE_HOLD_MARKS */

/* Twice as many entries as strangers, for their places are chosen by chance. */
#define SLUICE_STRANGER_SETS 8192 /* a power of 2 */
#define SLUICE_STRANGER_WAYS 16
#define SLUICE_STRANGER_ENTRIES 131072 /* SLUICE_STRANGER_SETS * SLUICE_STRANGER_WAYS */
#define SLUICE_STRANGER_INDEX_BITS 17  /* of that many entries */

#define SLUICE_FILTER_SIZE 32768 /* SLUICE_BANKS * SLUICE_FILTER_WORDS */
#define SLUICE_PORTS_SIZE 131072 /* SLUICE_BANKS * SLUICE_PORTS */
#define SLUICE_PATTERNS_SIZE 64  /* SLUICE_BANKS * SLUICE_MAX_SERVICES */
#define SLUICE_RULES_SIZE 8192   /* BANKS * SERVICES * CLASSES * KINDS */
#define SLUICE_XSKS_SIZE 512     /* SLUICE_MAX_QUEUES * SLUICE_MAX_LANES */

/*
 * Why a packet went where it went.  Every packet gets exactly one of these;
 * their sum is the number of packets seen.  The prefix (PASS, DROP, STEER,
 * REPLY) says what happened and is relied upon by everything that adds up.
 */
enum sluice_reason {
	SLUICE_PASS_TRUNCATED = 0,  /* ends before the header it announces */
	SLUICE_PASS_NOT_IP = 1,     /* ARP, LLDP, any other ethertype */
	SLUICE_PASS_VLAN_DEPTH = 2, /* more than two VLAN tags */
	SLUICE_PASS_IP_HEADER = 3,  /* version, IHL or length is wrong */
	SLUICE_PASS_EXTENSION = 4,  /* IPv6 extension headers not understood */
	SLUICE_PASS_FRAGMENT = 5,   /* any UDP fragment, policy says pass */
	SLUICE_PASS_NOT_UDP = 6,    /* TCP, ICMP, ND, ... and their fragments */
	SLUICE_PASS_UDP_LENGTH = 7, /* UDP length contradicts the IP length */
	SLUICE_PASS_NOT_OURS = 8,   /* no service on this port */
	SLUICE_PASS_SOURCE = 9,     /* source address no host may have */
	SLUICE_PASS_POLICY = 10,    /* the rule says pass, or no rule matches */
	SLUICE_PASS_LANE = 11,      /* the lane ends in the kernel */
	SLUICE_PASS_NO_SOCKET = 12, /* nobody has opened that lane here */
	SLUICE_DROP_FRAGMENT = 13,  /* UDP fragment, policy says drop */
	SLUICE_DROP_DENIED = 14,    /* the peer's class is denied */
	SLUICE_DROP_POLICY = 15,    /* the rule says drop */
	SLUICE_DROP_HELD = 16,      /* the peer is held at a rate, and over it */
	SLUICE_DROP_PEER_LIMIT = 17,
	SLUICE_DROP_PREFIX_LIMIT = 18,
	SLUICE_DROP_LANE_LIMIT = 19,
	SLUICE_STEER = 20,         /* given to the lane's socket */
	SLUICE_STEER_DEMOTED = 21, /* the same, in a lower lane */
	SLUICE_PASS_DEMOTED = 22,  /* lower lane, which ends in the kernel */
	SLUICE_REPLY = 23,         /* heartbeat answered here */
	SLUICE_REASONS = 24
};

/* One row per lane and one for packets that no lane was chosen for. */
#define SLUICE_COUNTER_ROWS 9    /* SLUICE_MAX_LANES + 1 */
#define SLUICE_NO_LANE 8         /* the last row */
#define SLUICE_VERDICTS_SIZE 216 /* SLUICE_COUNTER_ROWS * SLUICE_REASONS */

enum sluice_action {
	SLUICE_ACTION_PASS = 0, /* zero, so that no rule means pass */
	SLUICE_ACTION_LANE = 1,
	SLUICE_ACTION_DROP = 2,
	SLUICE_ACTION_DENY = 3, /* drop, before any limit is touched */
	SLUICE_ACTION_REPLY = 4 /* heartbeat; what is none goes to .lane */
};

/* What happens to a packet over its limit. */
enum sluice_over { SLUICE_OVER_DROP = 0, SLUICE_OVER_DEMOTE = 1 };

/* struct sluice_lane.end */
enum sluice_lane_end {
	SLUICE_END_SOCKET = 0, /* AF_XDP */
	SLUICE_END_KERNEL = 1  /* counted and limited, then XDP_PASS */
};

/* struct sluice_policy.flags */
#define SLUICE_POLICY_DROP_FRAGMENTS 1

/*
 * GCRA: a packet conforms while the theoretical arrival time is no more than
 * burst_ns ahead of now; each conforming packet moves it by interval_ns.
 * interval_ns 0: no limit.  A burst of n packets is burst_ns = (n - 1) *
 * interval_ns.
 */
struct sluice_limit {
	__u64 interval_ns;
	__u64 burst_ns;
};

struct sluice_address {
	__u32 word[4]; /* network order */
};

/* map "generation", array[1]: the only thing written to swap a policy */
struct sluice_generation {
	__u64 number;
};

struct sluice_lane {
	struct sluice_limit limit;
	__u8 end;  /* enum sluice_lane_end */
	__u8 over; /* enum sluice_over */
	__u8 demote_lane;
	__u8 timestamps; /* 1: frames carry the time of arrival */
	__u8 reserved[4];
};

/* map "policies", array[SLUICE_BANKS] */
struct sluice_policy {
	__u32 flags;
	__u8 stranger_bits_v4; /* width of a stranger's prefix bucket */
	__u8 stranger_bits_v6;
	__u8 reserved[2];
	struct sluice_lane lane[SLUICE_MAX_LANES];
};

/* map "ports", array[SLUICE_PORTS_SIZE]: bank * SLUICE_PORTS + port */
struct sluice_port {
	__u8 service;  /* 0: not ours */
	__u8 patterns; /* how many patterns the service has */
	__u8 reserved[2];
};

/*
 * width bytes (1, 2, 4 or 8) of the UDP payload at offset, read in network
 * order, masked and compared.  A payload too short does not match.
 */
struct sluice_pattern {
	__u64 mask;
	__u64 value;
	__u16 offset;
	__u8 width;
	__u8 kind;
	__u8 reserved[4];
};

/* map "patterns", array[SLUICE_PATTERNS_SIZE]: bank * MAX_SERVICES + service */
struct sluice_patterns {
	struct sluice_pattern pattern[SLUICE_MAX_PATTERNS];
};

/*
 * map "rules", array[SLUICE_RULES_SIZE]:
 * ((bank * MAX_SERVICES + service) * MAX_CLASSES + class) * MAX_KINDS + kind
 */
struct sluice_rule {
	__u8 action; /* enum sluice_action */
	__u8 lane;
	__u8 over; /* for the peer and prefix limits */
	__u8 demote_lane;
	__u8 reserved[4];
	struct sluice_limit peer;
	struct sluice_limit prefix; /* strangers only, shared by their prefix */
};

/* maps "prefixes_0" and "prefixes_1", LPM tries, one per bank; IPv4 is /96 and up */
struct sluice_prefix {
	__u32 prefixlen;
	struct sluice_address address;
};

struct sluice_prefix_class {
	__u32 class_id;
};

/*
 * What is known of a remote address, and asked or changed with each of its
 * packets: it fits into one cache line with the address or the number.
 *
 * generation, home and class_id are one aligned 64-bit word, written as one, so that
 * they can't be torn apart.  The class is that of this generation of the policy;
 * with another one the trie has to be asked again.
 */
struct sluice_peer {
	__u64 tat_ns;     /* GCRA, theoretical arrival time */
	__u32 generation; /* its lower 32 bits */
	__u16 home;       /* number of the CPU that saw the first packet, plus 1; 0: none did */
	__u8 class_id;
	__u8 shared;   /* strangers: the entry in "strangers_away" is this one's */
	__u64 packets; /* by the home CPU, which alone writes these three; see struct sluice_away */
	__u64 bytes;   /* of whole frames */
	__u64 drops;
	__u64 last_seen_ns; /* CLOCK_MONOTONIC */
};

/* Counted by all CPUs but the home, atomically.  A total is the sum of both. */
struct sluice_away {
	__u64 packets;
	__u64 bytes;
	__u64 drops;
};

/* map "known", hash by address: configured peers, never evicted */
struct sluice_known {
	struct sluice_peer peer;
	__u32 id; /* from 1 */
	__u32 reserved[3];
	struct sluice_away away;
	__u64 reserved_end[5]; /* two cache lines: in a hash map's element each is one of the CPU's */
};

/*
 * A configured peer held at a rate of its own, on top of what the policy says, until a
 * time: who set it may die and nobody is held for ever.
 *
 * map "peer_holds", array[SLUICE_MAX_KNOWN], can be mapped: number - 1.  Not in "known": user
 * space can only replace an element of a hash as a whole, and what the program counts in
 * between would be lost.  Here it stores into the mapped memory: interval_ns and burst are one
 * aligned 64-bit word, until_ns is another, and any old one goes with any new one.  The
 * rest is the program's.
 */
struct sluice_hold {
	__u32 interval_ns; /* 0: no limit */
	__u32 burst;       /* packets at once, beyond the first */
	__u64 until_ns;    /* CLOCK_MONOTONIC: in force before that */
	__u64 tat_ns;      /* GCRA, theoretical arrival time */
	__u64 drops;       /* over it, since the hold began */
};

/*
 * map "hold_marks", array[SLUICE_HOLD_LINES], can be mapped: a byte for each configured peer,
 * so that those who are not held need not be looked up in "peer_holds".
 */
struct sluice_hold_marks {
	__u8 held[SLUICE_HOLD_MARKS]; /* 0: not held; (number - 1) % SLUICE_HOLD_MARKS */
};

/*
 * maps "strangers", array[SLUICE_STRANGER_ENTRIES], and "strangers_away", the
 * same of struct sluice_away, both can be mapped, in the order in which places were
 * first needed.  An address of zeros: nobody is here.
 */
struct sluice_stranger {
	struct sluice_peer peer;
	struct sluice_address address;
};

/* map "stranger_sets", array[SLUICE_STRANGER_SETS], can be mapped: a cache line */
struct sluice_stranger_set {
	/* bits of the address's hash << SLUICE_STRANGER_INDEX_BITS | its entry; 0: empty */
	__u32 way[SLUICE_STRANGER_WAYS];
};

/* map "stranger_room", array[1] */
struct sluice_stranger_room {
	__u64 used; /* entries that belong to a way, for good */
};

/* map "stranger_turns", array[SLUICE_STRANGER_SETS] */
struct sluice_stranger_turn {
	__u64 word; /* changes so far << 1 | one is under way */
};

/*
 * map "known_filter", array[SLUICE_FILTER_SIZE]: bank * SLUICE_FILTER_WORDS + word.
 * A Bloom filter with one bit per configured peer (bpf/include/filter.h): most
 * strangers are found not to be in "known" without a look into it.
 */
struct sluice_filter {
	__u64 bits;
};

/* maps "lane_limits" array[SLUICE_MAX_LANES], "prefix_limits" array[SLUICE_PREFIX_BUCKETS] */
struct sluice_bucket {
	__u64 tat_ns;
};

struct sluice_count {
	__u64 packets;
	__u64 bytes; /* of whole frames, without FCS */
};

/*
 * map "counters", array[possible CPUs], can be mapped: each CPU writes its own
 * row only, readers add the rows up.  What adds up:
 *   seen = sum of all verdicts
 *   lane_seen[l] + demoted_to[l] - demoted_from[l] = sum of the verdicts of row l
 * The size is a multiple of a cache line (64), so that CPUs share none.
 */
struct sluice_counters {
	struct sluice_count seen;                        /* every packet, at entry */
	struct sluice_count lane_seen[SLUICE_MAX_LANES]; /* a rule chose the lane, before limits */
	struct sluice_count verdict[SLUICE_VERDICTS_SIZE]; /* row * SLUICE_REASONS + reason */
	__u64 demoted_from[SLUICE_MAX_LANES];
	__u64 demoted_to[SLUICE_MAX_LANES];
	__u64 strangers_created; /* minus those present: evicted */
	__u64 strangers_refused; /* another CPU was adding to the same set; counted, but for no peer */
	__u64 metadata_refused; /* driver without room for metadata */
	__u64 limit_contended;  /* compare-and-swap lost too often, treated as over */
	__u64 worker_gone;      /* select program: given to another worker of the lane */
	__u64 reserved[1];
};

/*
 * map "selection", array[1], of the select program (bpf/select.bpf.c).  Its sockets are
 * in a BPF_MAP_TYPE_REUSEPORT_SOCKARRAY of groups * (MAX_LANES * workers + 1) places:
 *   (group * SLUICE_MAX_LANES + lane) * workers + worker
 *   groups * SLUICE_MAX_LANES * workers + group: the group's drain
 */
struct sluice_selection {
	__u32 groups; /* sockets bound to one port and family, each an SO_REUSEPORT group */
	__u32 workers;
};

/* map "groups", array[SLUICE_PORTS]: the group that a port's datagrams find, plus 1; 0: none */
struct sluice_group {
	__u16 ipv4;
	__u16 ipv6;
};

/*
 * XDP metadata, directly below the packet in the frame.  cookie is drawn at
 * load time; a frame without it carries no metadata.
 */
struct sluice_meta {
	__u32 cookie;
	__u32 peer;           /* struct sluice_known.id, 0: stranger */
	__u64 time_ns;        /* CLOCK_MONOTONIC of arrival; 0: the lane has no timestamps */
	__u16 payload_offset; /* from the start of the frame */
	__u16 payload_length;
	__u8 lane;
	__u8 service;
	__u8 kind;
	__u8 class_id;
};

/*
 * Heartbeat: the whole UDP payload, network order where it matters to others
 * (magic); the rest is the sender's own and comes back unchanged.
 *
 * The kernel program answers type 1, and nothing else, with type 2.  Applications
 * answer type 3 with type 4 (userspace/connection/heartbeat.py), which tells a dead
 * host from a busy application.  An answer is as long as what it answers and is
 * never answered.
 */
#define SLUICE_HEARTBEAT_MAGIC 0x534c4842 /* "SLHB" */
#define SLUICE_HEARTBEAT_PROBE 1
#define SLUICE_HEARTBEAT_REPLY 2
#define SLUICE_HEARTBEAT_PING 3
#define SLUICE_HEARTBEAT_PONG 4

struct sluice_heartbeat {
	__u32 magic;
	__u8 type;
	__u8 reserved[3];
	__u64 sequence;
	__u64 time_ns;
	__u64 cookie; /* the sender's: makes blind replies useless */
};

/* Types 3 and 4, network order throughout; magic, type, sequence and cookie as above. */
struct sluice_ping {
	__u32 magic;
	__u8 type;
	__u8 held_us[3]; /* pong: for so long the application had the ping, at most all ones */
	__u64 sequence;
	__u64 boot; /* pong: another one after each start of the application; ping: 0 */
	__u64 cookie;
};

#endif /* SLUICE_ABI_H */
