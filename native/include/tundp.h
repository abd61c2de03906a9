/* The native half of tundp: one public header, read by C and, between the markers, by cffi.
 *
 * Integers are in host order unless a name ends in _be. Nothing here allocates, prints,
 * exits, calls back into Python or keeps state outside the structs it is given; the caller
 * owns every buffer, table and descriptor it passes. Errors are 0 or -errno.
 */
#ifndef TUNDP_H
#define TUNDP_H

#include <stddef.h>
#include <stdint.h>

/* cdef-begin */

/* Raised whenever a struct or a meaning below changes; Python refuses another number. */
#define TUNDP_ABI 2

#define TUNDP_FIB_LEVELS 3
#define TUNDP_REPLY_MAX 576
#define TUNDP_BUFFER_LEN 65536

/* wire/drop.py has the meanings; the numbers are the same. */
enum tundp_drop {
	TUNDP_DROP_TOO_SHORT = 0,
	TUNDP_DROP_NOT_IPV4 = 1,
	TUNDP_DROP_BAD_HEADER_LENGTH = 2,
	TUNDP_DROP_BAD_TOTAL_LENGTH = 3,
	TUNDP_DROP_BAD_HEADER_CHECKSUM = 4,
	TUNDP_DROP_NO_ROUTE = 5,
	TUNDP_DROP_OWN_SUBNET = 6,
	TUNDP_DROP_HOP_LIMIT_EXCEEDED = 7,
	TUNDP_DROP_TOO_BIG = 8,
	TUNDP_DROP_SOURCE_MISMATCH = 9,
	TUNDP_DROP_MARTIAN_SOURCE = 10,
	TUNDP_DROP_SEND_FORBIDDEN = 11,
	TUNDP_DROP_SEND_UNREACHABLE = 12,
	TUNDP_DROP_SEND_NO_BUFFER = 13,
	TUNDP_DROP_SEND_FAILED = 14,
	TUNDP_DROP_TUN_DOWN = 15,
	TUNDP_DROP_TUN_GONE = 16,
	TUNDP_DROP_TUN_REJECTED = 17,
	TUNDP_DROP_TUN_FAILED = 18,
};
#define TUNDP_DROP_COUNT 19

enum tundp_verdict_kind {
	TUNDP_FORWARD = 0, /* encap: send `len` bytes of the packet to hop `hop` */
	TUNDP_DELIVER = 1, /* decap: write `len` bytes of the packet to the TUN */
	TUNDP_REPLY = 2,   /* drop for `reason`, and send `reply` back */
	TUNDP_DROP = 3,    /* drop for `reason`, in silence */
};

enum tundp_source_check {
	TUNDP_SOURCE_OFF = 0,
	TUNDP_SOURCE_COUNT = 1,
	TUNDP_SOURCE_ENFORCE = 2,
};

#define TUNDP_HOP_LOCAL 1

/* lease/fib.py's HOP_DTYPE. */
struct tundp_hop {
	uint32_t address;
	uint16_t port;
	uint16_t flags;
};

/* A FIB as lease/fib.py lays it out. All memory is borrowed from numpy arrays that must
 * outlive every use; only `inner_mtu` is written, by the worker that learns a path MTU. */
struct tundp_fib {
	uint32_t base;                      /* first address the root covers */
	uint8_t base_len;                   /* prefix length of the root's range, 0..32 */
	uint8_t level_count;                /* 1..TUNDP_FIB_LEVELS */
	uint8_t stride[TUNDP_FIB_LEVELS];   /* address bits each level consumes */
	const uint32_t *table;
	uint64_t table_count;               /* slots in `table` */
	const struct tundp_hop *hops;
	uint32_t hop_count;                 /* entry 0 is "no route" */
	uint16_t *inner_mtu;                /* per hop: largest inner packet, 0xffff unlimited */
	const uint32_t *peers;              /* addresses of all peers, ascending */
	uint32_t peer_count;
	const uint32_t *own;                /* this node's other addresses, ascending */
	uint32_t own_count;
	uint64_t generation;
};

/* What a node knows of itself. */
struct tundp_rules {
	uint32_t tunnel_address; /* source of ICMP errors */
	uint32_t source_check;   /* enum tundp_source_check */
};

struct tundp_verdict {
	uint32_t kind;           /* enum tundp_verdict_kind */
	uint32_t reason;         /* enum tundp_drop */
	uint32_t hop;            /* index into the FIB's hops */
	uint32_t len;            /* bytes of packet to forward or deliver */
	uint32_t fragment_mtu;   /* forward: above 0, fragment to this size first */
	uint32_t source_matches; /* deliver: 0 when the source check only counts */
	uint32_t reply_len;
	uint8_t reply[TUNDP_REPLY_MAX];
};

struct tundp_direction {
	uint64_t packets_in;
	uint64_t bytes_in;
	uint64_t packets_out;
	uint64_t bytes_out;
	uint64_t drops[TUNDP_DROP_COUNT];
};

/* dataplane/base.py's Counters, field by field. */
struct tundp_counters {
	struct tundp_direction encap;
	struct tundp_direction decap;
	uint64_t fragments_out;
	uint64_t icmp_to_tun;
	uint64_t icmp_to_peers;
	uint64_t icmp_rate_limited;
	uint64_t icmp_undeliverable;
	uint64_t source_mismatches;
	uint64_t socket_overflows;
	uint64_t send_waits;
	uint64_t syscalls;
	uint64_t wakeups;
};

/* One thread's world. Python fills the first group in, before the thread starts, and keeps
 * the descriptors open until it has ended. */
struct tundp_worker {
	int tun_fd;
	int udp_fd;
	int control_fd; /* eventfd: written after `stop` or `fib` changed */
	uint32_t address; /* our end of the underlay, for learning path MTUs */
	struct tundp_rules rules;

	/* Written by Python through the functions below. */
	const struct tundp_fib *fib;
	int stop;

	/* Written by the worker. `seen` is the generation it looked at last: older FIBs are
	 * its no more. `sequence` is odd while the counters are being changed. */
	uint64_t seen;
	uint64_t sequence;
	struct tundp_counters counters;
	uint64_t icmp_credit_ns;
	uint64_t icmp_at_ns;
	struct tundp_verdict verdict;
	uint8_t tun_buffer[TUNDP_BUFFER_LEN];
	uint8_t udp_buffer[TUNDP_BUFFER_LEN];
	uint8_t fragment_buffer[TUNDP_BUFFER_LEN];
};

/* The 16-bit one's-complement sum of `len` bytes (RFC 1071), as a number: what
 * wire/checksum.py's ones_complement_sum gives. An odd last byte is padded with zero. */
uint16_t tundp_sum(const uint8_t *data, size_t len);

/* The header checksum after the TTL is one less (RFC 1624). */
uint16_t tundp_checksum_after_ttl_decrement(uint16_t header_checksum);

/* Whether every lookup stays inside the FIB's arrays: 0, or -EINVAL. Ask once, before
 * publishing. */
int tundp_fib_check(const struct tundp_fib *fib);

/* Index of the next hop for each of `count` addresses; 0 is "no route". The FIB must have
 * passed tundp_fib_check. */
void tundp_fib_lookup(const struct tundp_fib *fib, const uint32_t *addresses, size_t count,
		      uint32_t *indexes);

/* wire/encap.py's encapsulate and decapsulate: same verdict, same bytes. `packet` is
 * changed in place only on TUNDP_FORWARD and TUNDP_DELIVER. */
void tundp_encapsulate(const struct tundp_fib *fib, const struct tundp_rules *rules,
		       uint8_t *packet, size_t len, struct tundp_verdict *verdict);
void tundp_decapsulate(const struct tundp_fib *fib, const struct tundp_rules *rules,
		       uint8_t *datagram, size_t len, uint32_t outer_source,
		       struct tundp_verdict *verdict);

/* wire/fragment.py, one fragment at a time: writes the fragment that begins `taken` bytes
 * into the payload to `out` (room for `mtu` bytes), its length to `out_len`, and returns
 * how much payload it took; 0 when there is none left. `packet` is whole and checked. */
size_t tundp_fragment(const uint8_t *packet, size_t mtu, size_t taken, uint8_t *out,
		      size_t *out_len);

/* Token bucket of wire/ratelimit.py with the reference engine's rate: 1 may send, 0 not. */
int tundp_may_reply(struct tundp_worker *worker, uint64_t now_ns);

/* Zero the worker and give it a full bucket. */
void tundp_worker_init(struct tundp_worker *worker);

/* Publish a checked FIB to a worker, running or not. The one before stays its until
 * `seen` has reached this one's generation. */
void tundp_worker_install(struct tundp_worker *worker, const struct tundp_fib *fib);

/* Make the run below return soon. */
void tundp_worker_stop(struct tundp_worker *worker);

/* Generation of the newest FIB the worker has looked at. */
uint64_t tundp_worker_seen(const struct tundp_worker *worker);

/* The counters between two packets: conservation holds in what this copies. */
void tundp_worker_counters(const struct tundp_worker *worker, struct tundp_counters *counters);

/* The engine `simple`: one packet a system call, as flannel's own proxy. Returns 0 when
 * stopped, -EBADFD when the TUN was deleted. */
int tundp_simple_run(struct tundp_worker *worker);

/* cdef-end */

#endif
