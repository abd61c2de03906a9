/* The memory of one batch engine's worker: laid out once, nothing is allocated later.
 *
 * Words: a *packet* is one inner packet; a *train* is packets for one hop that leave as one
 * message (UDP_SEGMENT); the *arena* holds the packets of the trains that are being put together; an *iteration* is
 * one round of the loop. */
#ifndef TUNDP_BATCH_H
#define TUNDP_BATCH_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "coalesce.h"
#include "segment.h"
#include "single.h"
#include "socket_wait.h"

enum {
	TRAINS_MAX = 64,
	RECEIVE_SLOTS = 32,      /* datagrams of one receive */
	SUPER_RECEIVE_SLOTS = 8, /* with UDP_GRO each may be 64 KiB */
	HEADROOM = 16,           /* before a packet, for its vnet header */
	RECEIVE_BUFFER_LEN = HEADROOM + 65536,
	READ_BUFFER_LEN = HEADROOM + 65536,
	SEND_ARENA_LEN = 256 * 1024,
	READS_PER_ITERATION = 64,
	ARENA_PACKETS_MAX = SEND_ARENA_LEN / 20 + 1, /* none is shorter than an IPv4 header */
};

/* Packets for one destination, back to back in the arena, each `segment_len` long but the last.
 * It may wait longer than its FIB lives. */
struct train {
	struct destination to;
	uint32_t first; /* number of its first packet in the arena */
	uint32_t offset;
	uint32_t len;
	uint32_t segment_len;
	uint32_t count;
	uint32_t fragment_mtu; /* above 0: packets above it leave in fragments */
	uint64_t bytes_in;
	bool is_closed;      /* nothing may follow in it */
	bool is_one_by_one;  /* its packets take single_forward: to be fragmented, or refused */
	int refusal;         /* the errno the whole train was refused with */
	uint32_t sent_count; /* packets that left one by one */
};

/* How the packets of one read travel: all alike. */
struct lane {
	struct destination to;
	uint32_t fragment_mtu; /* above 0: packets above it leave in fragments */
	uint32_t count_max;    /* packets in a train */
};

/* A TUN read that is being taken apart; its bytes are in read_buffer. */
struct reading {
	struct segmenter segmenter;
	uint64_t packet_id;
	uint32_t left;   /* packets to come */
	bool is_decided; /* the first packet's verdict, which is everybody's, was to forward */
	struct lane lane;
};

/* One datagram's control messages, aligned as they must be. */
union receive_control {
	struct cmsghdr align;
	uint8_t bytes[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(uint32_t)) +
		      CMSG_SPACE(sizeof(struct socket_wait_stamps))];
};

struct batch {
	struct tundp_worker *worker;
	const struct tundp_fib *fib; /* of this iteration */
	const struct tundp_sums *sums;
	int tun_error; /* EBADFD once the device is gone */

	/* encap: read -> packets in the arena -> trains -> sendmmsg */
	struct train trains[TRAINS_MAX];
	uint32_t train_count;
	uint32_t arena_len;
	uint32_t arena_packets;
	uint32_t arena_ids[ARENA_PACKETS_MAX]; /* packet id of each, its lower half */
	struct reading reading;
	struct mmsghdr send_messages[TRAINS_MAX];
	struct iovec send_iovecs[TRAINS_MAX];
	struct sockaddr_in send_to[TRAINS_MAX];
	union send_control send_control[TRAINS_MAX];

	/* decap: recvmmsg -> decapsulate -> coalescer -> write */
	struct coalescer coalescer;
	struct origin heard;       /* the last sender, and which hop that is in ... */
	uint64_t heard_generation; /* ... this FIB */
	struct mmsghdr receive_messages[RECEIVE_SLOTS];
	struct iovec receive_iovecs[RECEIVE_SLOTS];
	struct sockaddr_in receive_from[RECEIVE_SLOTS];
	union receive_control receive_control[RECEIVE_SLOTS];

	uint8_t read_buffer[READ_BUFFER_LEN];
	uint8_t send_arena[SEND_ARENA_LEN];
	uint8_t receive_buffers[RECEIVE_SLOTS][RECEIVE_BUFFER_LEN];
	uint8_t item_buffers[COALESCE_BUFFERS][COALESCE_BUFFER_LEN];
};

/* One iteration of a direction (batch_encap.c, batch_decap.c): what one call may do is bounded.
 * True when there may be more to do at once, false when the descriptor had nothing left. */
bool batch_encap_iteration(struct batch *batch);
bool batch_decap_iteration(struct batch *batch);

void batch_encap_init(struct batch *batch);
void batch_decap_init(struct batch *batch);

#endif
