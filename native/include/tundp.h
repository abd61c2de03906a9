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

#include "tundp_tables.h"

/* cdef-begin */

/* Raised whenever a struct or a meaning below changes; Python refuses another number. */
#define TUNDP_ABI 4

#define TUNDP_FIB_LEVELS 3
#define TUNDP_BUFFER_LEN 65536
#define TUNDP_SUMS_MAX 3
#define TUNDP_NAME_LEN 16

/* What a worker may use: bits, for `offloads` and `offloads_lost`. */
enum tundp_offload {
	TUNDP_OFFLOAD_VNET_HEADER = 0x01,  /* the TUN has vnet headers: super-packets from it */
	TUNDP_OFFLOAD_UDP_SEGMENT = 0x02,  /* UDP_SEGMENT: many datagrams in one send */
	TUNDP_OFFLOAD_TCP_COALESCE = 0x04, /* TCP super-packets to the TUN */
	TUNDP_OFFLOAD_UDP_COALESCE = 0x08, /* UDP super-packets to the TUN */
	TUNDP_OFFLOAD_UDP_GRO = 0x10,      /* UDP_GRO: many datagrams in one receive */
};

/* Which directions a worker carries. */
enum tundp_direction_bits {
	TUNDP_ENCAP = 1,
	TUNDP_DECAP = 2,
};

/* linux/virtio_net.h's struct virtio_net_hdr, host order. */
struct tundp_vnet {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
};
#define TUNDP_VNET_NEEDS_CSUM 1
#define TUNDP_VNET_NONE 0
#define TUNDP_VNET_TCPV4 1
#define TUNDP_VNET_TCPV6 4
#define TUNDP_VNET_UDP_L4 5
#define TUNDP_VNET_ECN 0x80

enum tundp_verdict_kind {
	TUNDP_FORWARD = 0, /* encap: send `len` bytes of the packet to hop `hop` */
	TUNDP_DELIVER = 1, /* decap: write `len` bytes of the packet to the TUN */
	TUNDP_REPLY = 2,   /* drop for `reason`, and send `reply` back */
	TUNDP_DROP = 3,    /* drop for `reason`, in silence */
};

#define TUNDP_HOP_LOCAL 1

/* lease/fib.py's HOP_DTYPE. */
struct tundp_hop {
	uint32_t address;
	uint16_t port;
	uint16_t flags;
};

/* A FIB as lease/fib.py lays it out. All memory is borrowed from numpy arrays that must
 * outlive every use; only `inner_mtu` and `single` are written, by workers that learn. */
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
	uint8_t *single;                    /* per hop: 1 where UDP_SEGMENT was refused */
	const uint32_t *peers;              /* addresses of all peers, ascending */
	uint32_t peer_count;
	const uint32_t *own;                /* this node's other addresses, ascending */
	uint32_t own_count;
	uint64_t generation;
};

/* What a node knows of itself. */
struct tundp_rules {
	uint32_t tunnel_address; /* source of ICMP errors */
	uint32_t source_check;   /* enum tundp_source_check; the destination, too */
};

struct tundp_verdict {
	uint32_t kind;           /* enum tundp_verdict_kind */
	uint32_t reason;         /* enum tundp_drop */
	uint32_t hop;            /* index into the FIB's hops */
	uint32_t len;            /* bytes of packet to forward or deliver */
	uint32_t fragment_mtu;   /* forward: above 0, fragment to this size first */
	uint32_t source_matches; /* deliver: 0 when the source check only counts */
	uint32_t destination_matches; /* likewise */
	uint32_t reply_len;
	uint8_t reply[TUNDP_REPLY_MAX];
};

struct tundp_batch;

/* One thread's world. Python fills the first group in, before the thread starts, and keeps
 * the descriptors open until it has ended. */
struct tundp_worker {
	int tun_fd;
	int udp_fd;
	int control_fd; /* eventfd: written after `stop` or `fib` changed */
	int notify_fd;  /* eventfd: written when something was learnt, or -1 */
	uint32_t address; /* our end of the underlay, for learning path MTUs */
	uint64_t overflows_before; /* socket_overflows of sockets before this one */
	struct tundp_rules rules;
	uint32_t directions;       /* enum tundp_direction_bits */
	uint32_t offloads;         /* enum tundp_offload: what there is */
	uint32_t max_segments;     /* datagrams in one send, 1..128 */
	uint32_t max_udp_segments; /* packets in one UDP super-packet to the TUN, 1..128 */
	uint32_t spin_ns;          /* poll so long before sleeping, 0 never */
	char name[TUNDP_NAME_LEN]; /* of the thread, for ps and perf */
	struct tundp_batch *batch; /* tundp_batch_len() bytes, 64-byte aligned; batch engine only */

	/* Written by Python through the functions below. */
	const struct tundp_fib *fib;
	int stop;

	/* Written by the worker. `seen` is the generation it looked at last: older FIBs are
	 * its no more. `beats` grows with each turn it makes. `sequence` is odd while the
	 * counters are being changed. */
	uint64_t seen;
	uint64_t beats;
	uint32_t offloads_lost;
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

/* The sum as the vector variant computes it; copies to `to` as well unless that is NULL.
 * Variant 0 is what engines use; behind the last one the name is NULL. */
const char *tundp_sums_name(size_t variant);
uint16_t tundp_sums_run(size_t variant, uint8_t *to, const uint8_t *from, size_t len);

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

/* wire/segment.py: the packets of one read, back to back in `out`, their lengths in `lens`;
 * with `lowers_ttl` their TTL is one less. The number of packets, -1 - reason when the read
 * is dropped, or INT64_MIN if there may not be room: len + 120 bytes per packet. */
int64_t tundp_segment(const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
		      int lowers_ttl, uint8_t *out, size_t out_len, uint32_t *lens,
		      size_t lens_count);

/* wire/coalesce.py: one batch of `count` packets, each with TUNDP_VNET_LEN bytes before it,
 * all of them checked IPv4 of exactly lens[i] bytes. `out` becomes records of a u32 packet
 * count, a u32 length, a vnet header and the packet. `scratch` has TUNDP_COALESCE_SCRATCH
 * bytes, `misses` TUNDP_MISS_COUNT numbers. Bytes used of `out`, or -1 if it is too small. */
#define TUNDP_COALESCE_SCRATCH 589914
int64_t tundp_coalesce(uint8_t *packets, const uint32_t *lens, size_t count, int is_tcp_on,
		       int is_udp_on, uint32_t max_udp_segments, uint8_t *scratch, uint8_t *out,
		       size_t out_len, uint64_t *misses);

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

/* Turns the worker has made, and has it make one more soon, however idle it is: one that does
 * not is stuck. */
uint64_t tundp_worker_beat(struct tundp_worker *worker);

/* The counters between two packets: conservation holds in what this copies. */
void tundp_worker_counters(const struct tundp_worker *worker, struct tundp_counters *counters);

/* The engine `simple`: one packet a system call, as flannel's own proxy. Returns 0 when
 * stopped, -EBADFD when the TUN was deleted. */
int tundp_simple_run(struct tundp_worker *worker);

/* Bytes `batch` must have. */
size_t tundp_batch_len(void);

/* The engines `mmsg` and `gso`: batches of packets, and with offloads super-packets, one
 * loop for all. Returns 0 when stopped, -EBADFD when the TUN was deleted, or -errno. */
int tundp_batch_run(struct tundp_worker *worker);

/* Offloads the worker has found to be refused, as bits of enum tundp_offload; and having
 * them tried again. */
uint32_t tundp_worker_lost(const struct tundp_worker *worker);
void tundp_worker_restore(struct tundp_worker *worker);

/* cdef-end */

#endif
