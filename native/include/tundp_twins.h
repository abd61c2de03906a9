/* The packet rules: pure functions, twins of wire/ and lease/fib.py, which are the specification.
 * The engines call the verdicts and `tundp_fragment`; the rest is for tests, the self-test and
 * benchmarks, which compare it with Python. No engine is needed to call any of them. */
#ifndef TUNDP_TWINS_H
#define TUNDP_TWINS_H

#include "tundp.h"

/* cdef-begin */

#define TUNDP_SUMS_MAX 3

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

/* Only what `kind` names is set, but `hop`. */
struct tundp_verdict {
	uint32_t kind;                /* enum tundp_verdict_kind */
	uint32_t reason;              /* enum tundp_drop */
	uint32_t hop;                 /* encap: hop id a route leads to, of a drop, too; or 0 */
	uint32_t len;                 /* bytes of packet to forward or deliver */
	uint32_t fragment_mtu;        /* forward: above 0, fragment to this size first */
	uint32_t source_matches;      /* deliver: 0 when the source check only counts */
	uint32_t destination_matches; /* likewise */
	uint32_t echo_len;            /* deliver: bytes for echo_fd, above 0 if it measures a path */
	uint32_t peer_len;            /* deliver: bytes for peer_fd, above 0 if nodes talk by it */
	uint32_t reply_len;
	uint8_t reply[TUNDP_REPLY_MAX];
};

/* wire/socket_wait.py: the time since a receive timestamp, ns: 1 to TUNDP_WAIT_MAX, 0 not known. */
uint32_t tundp_wait_ns(uint64_t stamp_ns, const struct tundp_clocks *now,
		       const struct tundp_clocks *before);

/* engine/latency.py: the number of the bucket of a time. */
uint32_t tundp_latency_bucket(uint64_t elapsed_ns);

/* wire/encap.py's encapsulate and decapsulate: same verdict, same bytes. `packet` is changed in
 * place only on TUNDP_FORWARD and TUNDP_DELIVER. */
void tundp_encapsulate(const struct tundp_fib *fib, const struct tundp_policy *policy,
		       uint8_t *packet, size_t len, struct tundp_verdict *verdict);
void tundp_decapsulate(const struct tundp_fib *fib, const struct tundp_policy *policy,
		       uint8_t *datagram, size_t len, uint32_t outer_source, uint16_t outer_port,
		       struct tundp_verdict *verdict);

/* wire/encap.py's narrow: the verdict on a packet that tundp_encapsulate forwarded, its TTL
 * lowered, when the path turns out to take `mtu` bytes only (0 unlimited). */
void tundp_narrow(const struct tundp_policy *policy, const uint8_t *packet, uint32_t hop,
		  uint16_t mtu, struct tundp_verdict *verdict);

/* wire/fragment.py, one fragment at a time: writes the fragment that begins `taken` bytes into
 * the payload to `out` (room for `mtu` bytes), its length to `out_len`, and returns how much
 * payload it took; 0 when there is none left. `packet` is whole and checked. */
size_t tundp_fragment(const uint8_t *packet, size_t mtu, size_t taken, uint8_t *out,
		      size_t *out_len);

/* The 16-bit one's-complement sum of `len` bytes (RFC 1071), as a number: what
 * wire/checksum.py's ones_complement_sum gives. An odd last byte is padded with zero. */
uint16_t tundp_sum(const uint8_t *data, size_t len);

/* The sum as the vector variant computes it; copies to `to` as well unless that is NULL.
 * Variant 0 is what engines use; behind the last one the name is NULL. */
const char *tundp_sums_name(size_t variant);
uint16_t tundp_sums_run(size_t variant, uint8_t *to, const uint8_t *from, size_t len);

/* The header checksum after the TTL is one less, and one more again (RFC 1624). */
uint16_t tundp_checksum_after_ttl_decrement(uint16_t header_checksum);
uint16_t tundp_checksum_before_ttl_decrement(uint16_t header_checksum);

/* Hop id for each of `count` addresses; 0 is "no route". The FIB must have passed
 * tundp_fib_check. */
void tundp_fib_lookup(const struct tundp_fib *fib, const uint32_t *addresses, size_t count,
		      uint32_t *hops);

/* wire/segment.py: the packets of one read, back to back in `out`, their lengths in `lens`; with
 * `lowers_ttl` their TTL is one less. The number of packets, -1 - reason when the read is
 * dropped, or INT64_MIN if there may not be room: len + TUNDP_HEADERS_MAX bytes per packet. */
int64_t tundp_segment(const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
		      int lowers_ttl, uint8_t *out, size_t out_len, uint32_t *lens,
		      size_t lens_count);

/* One batch of `count` packets, each with TUNDP_VNET_LEN bytes before it in `packets`, all of
 * them checked IPv4 of exactly lens[i] bytes; and how to merge it. */
struct tundp_coalesce_input {
	uint8_t *packets;
	const uint32_t *lens;
	size_t count;
	int is_tcp_on;
	int is_udp_on;
	uint32_t max_udp_segments;
};

/* wire/coalesce.py. `out` becomes records of a u32 packet count, a u32 length, a vnet header and
 * the packet. `scratch` has TUNDP_COALESCE_SCRATCH bytes, `misses` TUNDP_MISS_COUNT numbers.
 * Bytes used of `out`, or -1 if it is too small. */
#define TUNDP_COALESCE_SCRATCH 589914
int64_t tundp_coalesce(const struct tundp_coalesce_input *input, uint8_t *scratch, uint8_t *out,
		       size_t out_len, uint64_t *misses);

/* engine/hop_slots.py: what is noted of a send socket's queue, and who may have the socket.
 * tundp_slot_pick: index of the slot to take, or -1; with TUNDP_SLOT_STUCK its queue was stuck. */
#define TUNDP_SLOT_STUCK 0x10000
void tundp_slot_look(struct tundp_hop_slot *slot, uint64_t queued, uint64_t now_ns);
void tundp_slot_use(struct tundp_hop_slot *slot, uint64_t now_ns, int is_taken);
int tundp_slot_may_return(const struct tundp_hop_slot *slot, uint64_t queued, uint64_t now_ns);
int tundp_slot_pick(const struct tundp_hop_socket *sockets, uint32_t count, uint64_t now_ns);

/* wire/facts.py: the fields a packet has, by enum tundp_field. `present` is a bit a field; the value
 * of one that is absent is 0. */
struct tundp_facts {
	uint32_t present;
	uint32_t values[TUNDP_FIELD_COUNT];
};

/* The facts of `length` bytes that begin with an IPv4 header, the first `captured` of them at
 * `packet` (NULL if 0): once a packet. Then what became of it: once an event. `direction` is
 * TUNDP_ENCAP or TUNDP_DECAP; `outer` the other node's address, 0 unknown; `reason` counts if
 * `is_dropped`. */
void tundp_facts_of(const uint8_t *packet, size_t captured, uint32_t length,
		    struct tundp_facts *facts);
void tundp_facts_event(struct tundp_facts *facts, uint32_t direction, uint32_t outer,
		       int is_dropped, uint32_t reason);

/* wire/filter_program.py: 1 if a filter that passed tundp_filter_check lets the packet through. */
int tundp_filter_matches(const struct tundp_filter *filter, const struct tundp_facts *facts);

/* How many of `count` packets of `len` bytes each, back to back, a filter lets through; NULL: none,
 * but their facts are made. What it costs is measured by it. */
size_t tundp_filter_count(const struct tundp_filter *filter, const uint8_t *packets, size_t len,
			  size_t count);

/* wire/ratelimit.py's token bucket of TUNDP_ICMP_BURST: 1 may send, 0 not. `full_at_ns` is its
 * whole state, 0 at first; any number of threads may share it. */
int tundp_may_reply(uint64_t *full_at_ns, uint32_t rate_per_s, uint64_t now_ns);

/* cdef-end */

#endif
