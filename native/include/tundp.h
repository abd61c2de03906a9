/* The C engines of tundp: one public header, read by C and, between the markers, by cffi.
 * tundp_tables.h has what both languages count and name, tundp_twins.h the packet rules.
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
#define TUNDP_ABI 12

#define TUNDP_FIB_LEVELS 3
#define TUNDP_BUFFER_LEN 65536
#define TUNDP_NAME_LEN 16
/* Hop ids are below; what per-hop arrays reserve room for. */
#define TUNDP_HOPS_MAX 1048576

/* What a worker may use: bits. Python finds them by name, so a bit belongs to the Offload of
 * that name, but VNET_HEADER, which the TUN has or has not. */
enum tundp_offload {
	TUNDP_OFFLOAD_VNET_HEADER = 0x01,  /* the TUN has vnet headers: super-packets from it */
	TUNDP_OFFLOAD_UDP_SEGMENT = 0x02,  /* UDP_SEGMENT: many datagrams in one send */
	TUNDP_OFFLOAD_TCP_COALESCE = 0x04, /* TCP super-packets to the TUN */
	TUNDP_OFFLOAD_UDP_COALESCE = 0x08, /* UDP super-packets to the TUN */
	TUNDP_OFFLOAD_UDP_GRO = 0x10,      /* UDP_GRO: many datagrams in one receive */
};

/* Which directions a worker carries: bits. */
enum tundp_direction_bits {
	TUNDP_ENCAP = 1,
	TUNDP_DECAP = 2,
};

#define TUNDP_HOP_LOCAL 1

/* The endpoint of a next hop; lease/fib.py's HOP_DTYPE. */
struct tundp_hop {
	uint32_t address;
	uint16_t port;
	uint16_t flags;
};

/* Path state of a hop; all zero is "nothing known". Shared by the workers of a node and Python, all
 * of whom write it: access is atomic. The smaller of two limits holds. */
struct tundp_path {
	uint16_t inner_mtu; /* largest inner packet, bytes, the device takes: learnt by workers from
			     * refused sends; 0 unlimited */
	uint16_t limit;     /* largest inner packet, bytes, the path takes: written by Python, from
			     * routes and measurements; 0 unlimited */
	uint32_t no_gso;    /* 1: UDP_SEGMENT was refused, datagrams go one by one */
};

/* What one worker has counted of one hop. Only the worker writes it, Python reads each field by
 * itself. Times are CLOCK_MONOTONIC_COARSE, 0 never. */
struct tundp_hop_counters {
	uint64_t packets_out; /* sent to it: of encap.packets_out */
	uint64_t bytes_out;
	uint64_t packets_in; /* received from it: of decap.packets_in */
	uint64_t bytes_in;
	uint64_t drops;           /* of both, for whatever reason */
	uint64_t last_heard_ns;   /* the last datagram from it */
	uint64_t last_refused_ns; /* the last send to it that the kernel refused, ... */
	uint32_t last_errno;      /* ... and the errno of that */
	uint32_t unused;
};

/* What one worker keeps of one hop whose packets wait in the kernel. Only the worker writes it,
 * Python reads `full` by itself. All zero until the shared socket was full. */
struct tundp_hop_queue {
	uint64_t full;         /* packets dropped as HOP_QUEUE_FULL: of the hop's drops */
	uint64_t closed_until; /* CLOCK_MONOTONIC_COARSE: dropped at once before that */
	uint32_t socket;       /* number of the hop's own socket, from 1; 0 none */
	uint32_t unused;
};

/* engine/hop_slots.py: what is remembered of one hop's socket. */
struct tundp_hop_slot {
	uint64_t since_ns;
	uint64_t used_ns;
	uint64_t drained_ns;
	uint64_t floor;
};

/* A send socket that one hop has to itself. */
struct tundp_hop_socket {
	struct tundp_hop_slot slot;
	struct tundp_hop way; /* of hop id `hop` when it got the socket */
	uint32_t hop;
	int fd;
};

/* The send sockets of one worker. Only the worker uses them, only while it runs. */
struct tundp_hop_sockets {
	uint32_t address; /* what datagrams are sent from: that of the shared socket ... */
	uint16_t port;    /* ... and its port, which all of these are bound to */
	uint16_t unused;
	uint32_t fd_max;     /* higher descriptors are left to the rest of the process */
	uint64_t looked_ns;  /* when they were all asked last, and none could be spared */
	uint64_t swept_ns;   /* when those that are not needed were last looked for */
	struct tundp_hop_socket sockets[TUNDP_HOP_SOCKETS_MAX];
};

/* A FIB as lease/fib.py lays it out. All memory is borrowed from arrays that must outlive every
 * use; only `paths` is written, by workers. Hops are counted by hop id: one id means one
 * endpoint for as long as a route leads there, in every FIB. */
struct tundp_fib {
	uint32_t base;                    /* first address the root covers */
	uint8_t base_len;                 /* prefix length of the root's range, 0..32 */
	uint8_t level_count;              /* 1..TUNDP_FIB_LEVELS */
	uint8_t stride[TUNDP_FIB_LEVELS]; /* address bits each level consumes */
	const uint32_t *table;
	uint64_t table_count; /* slots in `table` */
	const struct tundp_hop *hops;
	const struct tundp_hop *ways; /* where datagrams for each hop are sent: `hops` itself, but
				       * while some are diverted (Dataplane.divert) */
	uint32_t hop_count;           /* at most TUNDP_HOPS_MAX; entry 0 is "no route" */
	struct tundp_path *paths;  /* per hop */
	const uint32_t *peers;     /* addresses of all peers, ascending */
	const uint32_t *peer_hops; /* hop id of each */
	uint32_t peer_count;
	const uint32_t *own; /* this node's other addresses, ascending */
	uint32_t own_count;
	const uint32_t *broadcasts; /* broadcast addresses of its networks, ascending */
	uint32_t broadcast_count;
	uint64_t generation; /* growing with each that is published; lower half: lease/fib.py's */
};

/* The packet rules' settings; wire/policy.py. */
struct tundp_prefix {
	uint32_t address;
	uint32_t mask;
};
struct tundp_policy {
	uint32_t tun_address;  /* source of ICMP errors */
	uint32_t source_check; /* enum tundp_source_check; the destination, too */
	uint16_t port;         /* of the overlay */
	uint16_t admitted_count;
	uint32_t echo_id; /* ICMP identifier of what measures paths; above 0xffff none */
	struct tundp_prefix admitted[TUNDP_ADMITTED_MAX]; /* sources in no lease that may be */
};

/* A packet filter as wire/filter.py makes it: a postfix program over a packet's facts, which lets
 * every packet through if it has no instructions. */
struct tundp_filter_op {
	uint16_t kind;  /* enum tundp_op_kind; what follows is of a TEST: */
	uint16_t field; /* enum tundp_field */
	uint32_t low;   /* low <= value & mask <= high */
	uint32_t high;
	uint32_t mask;
};
struct tundp_filter {
	uint32_t count;
	struct tundp_filter_op ops[TUNDP_FILTER_OPS_MAX];
};

/* wire/event.py: the header of an event record, which the first bytes of a packet follow. */
struct tundp_event {
	uint32_t size; /* of the record, a multiple of TUNDP_EVENT_ALIGN */
	uint8_t stage; /* enum tundp_stage; 0 fills the end of a ring */
	uint8_t is_dropped;
	uint8_t reason; /* enum tundp_drop */
	uint8_t unused;
	uint64_t time_ns;   /* CLOCK_MONOTONIC */
	uint64_t packet_id; /* number of the read that brought it */
	uint32_t more_ids;  /* and of so many after that */
	uint32_t hop;
	uint32_t outer; /* the peer's address */
	uint16_t port;  /* the peer's port */
	uint16_t error;
	uint32_t length;   /* of the packet */
	uint32_t packets;  /* wire-size ones it stands for */
	uint32_t together; /* datagrams of its send or receive, packets of its read or write */
	uint16_t captured; /* bytes of the packet that follow */
	uint16_t gso_size;
	uint32_t generation; /* of the FIB, modulo 2^32 */
	uint32_t wait_ns;    /* in the UDP socket, of a receive; 0 not known */
};

/* One reader's ring of event records of one worker: bytes. The worker writes whole records behind
 * `head`, the reader takes them from `tail` on (tundp_tap_read). What has no room is lost, and counted.
 * Nobody waits. */
struct tundp_tap {
	uint8_t *data;    /* the reader's, `size` bytes */
	uint32_t size;    /* a power of two, at least TUNDP_TAP_LEN_MIN */
	uint32_t snap;    /* bytes of a packet that are kept, at most TUNDP_SNAP_MAX */
	uint32_t stages;  /* bits 1 << enum tundp_stage, and TUNDP_EVENT_DROPS */
	uint32_t unused;
	const struct tundp_filter *filter; /* which packets, NULL all; passed tundp_filter_check */
	uint64_t line_before_head[4];
	uint64_t head; /* bytes ever written; the worker's */
	uint64_t lost; /* records that had no room; the worker's */
	uint64_t line_before_tail[6];
	uint64_t tail; /* bytes ever read; the reader's */
};

/* The taps of one worker, as published together. Not changed while a worker may use it. */
struct tundp_taps {
	uint64_t generation; /* above 0, growing */
	uint32_t count;
	uint32_t asked; /* how often timestamps were asked for: by each first tap */
	struct tundp_tap *taps[TUNDP_TAPS_MAX];
};

/* The last packets a worker dropped in one direction for one reason: the flight recorder. Only the worker
 * writes it; a reader takes a slot only if its event has a size, before and after copying. */
struct tundp_example {
	struct tundp_event event;
	uint8_t packet[TUNDP_EXAMPLE_LEN];
};
struct tundp_examples {
	uint64_t count;    /* ever noted; the next one's slot is this modulo TUNDP_EXAMPLES */
	uint64_t noted_ns; /* CLOCK_MONOTONIC_COARSE, of the last one */
	struct tundp_example slots[TUNDP_EXAMPLES];
};

/* What a worker is given. Descriptors and memory stay open and valid until it has ended. */
struct tundp_worker_config {
	int tun_fd;
	int udp_fd;
	int control_fd; /* eventfd: written after `stop` or `fib` changed */
	int notify_fd; /* eventfd: written when path state changed or an offload was refused; or -1 */
	int echo_fd;   /* datagram socket: takes the heads of echo replies that measure paths; or -1 */
	int peer_fd;   /* datagram socket: takes the messages of other nodes; or -1 */
	int unused;
	uint32_t address;          /* our end of the underlay, for asking path MTUs */
	uint32_t directions;       /* enum tundp_direction_bits */
	uint32_t offloads;         /* enum tundp_offload: what there is */
	uint32_t max_segments;     /* datagrams in one send, at least 1 */
	uint32_t max_udp_segments; /* packets in one UDP super-packet to the TUN */
	uint32_t spin_ns;          /* poll so long before sleeping, 0 never */
	struct tundp_policy policy;
	char name[TUNDP_NAME_LEN]; /* of the thread, for ps and perf */
	void *memory;              /* the engine's, 64-byte aligned: tundp_*_len() bytes */
	struct tundp_hop_counters *hop_counters; /* this worker's: TUNDP_HOPS_MAX, zero at first */
	struct tundp_hop_queue *hop_queues;      /* likewise */
	/* The ICMP budgets of the node, one set for all its workers: wire/ratelimit.py's
	 * TUNDP_ICMP_LOCAL_BUCKETS for its own pods, then TUNDP_ICMP_WIRE_BUCKETS for the wire. */
	uint64_t *icmp_full_at_ns;
	/* The flight recorder, or NULL: TUNDP_DROP_COUNT of encap, then of decap. */
	struct tundp_examples *examples;
};

/* wire/socket_wait.py: two clocks read together. */
struct tundp_clocks {
	uint64_t real_ns;
	uint64_t monotonic_ns;
};

/* wire/socket_wait.py: the waits of one socket's datagrams, while there are taps. */
struct tundp_socket_waits {
	struct tundp_clocks before; /* after the receive before */
	struct tundp_clocks now;    /* after the last one */
	uint64_t called_ns;         /* CLOCK_REALTIME, when that began */
	uint32_t is_stamping;       /* 1: datagrams have the time they came for a stamp */
	uint32_t asked;             /* tundp_taps's, when that began */
};

/* What the controlling thread (Python) writes while the worker runs. */
struct tundp_worker_control {
	const struct tundp_fib *fib;
	const struct tundp_taps *taps; /* NULL before there was any */
	int stop;
};

/* What the worker writes and the controlling thread reads. */
struct tundp_worker_shared {
	uint64_t seen;              /* generation of the FIB in use; it holds none before */
	uint64_t taps_seen;         /* likewise of the taps */
	uint64_t heartbeats;        /* iterations of its loop */
	uint32_t offloads_disabled; /* enum tundp_offload: refused; Python clears them */
	uint32_t overflows;         /* SO_RXQ_OVFL's last value, modulo 2^32 */
	uint32_t hop_sockets;       /* hops that have a send socket of their own now */
	uint32_t unused;
	uint64_t sequence;          /* odd while the counters are being changed */
};

/* One thread's world: groups by who writes them, a cache line between two. */
struct tundp_worker {
	struct tundp_worker_config config;
	uint64_t line_before_control[8];
	struct tundp_worker_control control;
	uint64_t line_before_shared[8];
	struct tundp_worker_shared shared;
	const struct tundp_taps *taps; /* of this iteration, NULL if there is none */
	struct tundp_socket_waits waits;
	uint32_t encap_batches; /* that brought something: engine/latency.py */
	uint32_t decap_batches;
	struct tundp_counters counters;
	struct tundp_hop_sockets hop_sockets;
	/* Room for one fragment, or one packet of a super-packet that is written again: valid
	 * until the next call that sends or writes. */
	uint8_t piece[TUNDP_BUFFER_LEN];
};

/* Whether every lookup stays inside the FIB's arrays: 0, or -EINVAL. Ask once, before
 * publishing. */
int tundp_fib_check(const struct tundp_fib *fib);

/* Whether a program can be run: known instructions and fields, no more values taken than pushed, one
 * left: 0, or -EINVAL. Ask once, before a worker is given it. */
int tundp_filter_check(const struct tundp_filter *filter);

/* Zero the worker: not configured, no FIB, nothing counted. */
void tundp_worker_init(struct tundp_worker *worker);

/* Configure a worker that does not run, and let it run (again). Counters go on. 0, or -EINVAL
 * if a value is out of range. */
int tundp_worker_configure(struct tundp_worker *worker, const struct tundp_worker_config *config);

/* The descriptor of a worker that does not run leads to a new socket, whose overflows the kernel
 * counts from zero. */
void tundp_worker_rebound(struct tundp_worker *worker);

/* Publish a checked FIB to a worker, running or not. The one before stays in use until `seen` has
 * reached this one's generation. */
void tundp_worker_install(struct tundp_worker *worker, const struct tundp_fib *fib);

/* Publish taps to a worker, running or not. Those before stay in use until `taps_seen` has reached
 * this generation. */
void tundp_worker_tap(struct tundp_worker *worker, const struct tundp_taps *taps);

/* Generation of the newest taps the worker uses. */
uint64_t tundp_worker_taps_seen(const struct tundp_worker *worker);

/* Take records out of a ring: copies as many whole ones as there are and fit, returns their bytes. One
 * reader at a time. */
size_t tundp_tap_read(struct tundp_tap *tap, uint8_t *out, size_t out_len);

/* Records that were lost so far. */
uint64_t tundp_tap_lost(const struct tundp_tap *tap);

/* Make the worker's loop (tundp_*_run) return soon. */
void tundp_worker_stop(struct tundp_worker *worker);

/* Generation of the newest FIB the worker uses. */
uint64_t tundp_worker_seen(const struct tundp_worker *worker);

/* Heartbeat: iterations the worker has made. Asking wakes it for one more, so an unchanged count
 * a second later means that it is stuck. */
uint64_t tundp_worker_heartbeat(struct tundp_worker *worker);

/* The counters between two packets: conservation holds in what this copies. */
void tundp_worker_counters(const struct tundp_worker *worker, struct tundp_counters *counters);

/* How many hops have a send socket of their own now. */
uint32_t tundp_worker_hop_sockets(const struct tundp_worker *worker);

/* Offloads the worker has found to be refused, as bits of enum tundp_offload; and having them
 * tried again. */
uint32_t tundp_worker_disabled(const struct tundp_worker *worker);
void tundp_worker_restore(struct tundp_worker *worker);

/* Whether the module has USDT probes (native/src/probes.h): 1 or 0. */
int tundp_has_probes(void);

/* The engine `simple`: one packet a system call, as flannel's own proxy. Returns 0 when stopped,
 * -EBADFD when the TUN was deleted, or -errno. tundp_simple_len: bytes `memory` must have. */
size_t tundp_simple_len(void);
int tundp_simple_run(struct tundp_worker *worker);

/* The engines `mmsg` and `gso`: batches of packets, and with offloads super-packets, one loop
 * for all. Likewise. */
size_t tundp_batch_len(void);
int tundp_batch_run(struct tundp_worker *worker);

/* cdef-end */

#endif
