/* The memory of one batch engine's worker: laid out once, nothing is allocated later. */
#ifndef TUNDP_BATCH_H
#define TUNDP_BATCH_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "coalesce.h"
#include "segment.h"
#include "worker.h"

enum {
	MAX_RUNS = 64,
	RECEIVE_SLOTS = 32,      /* datagrams of one receive */
	SUPER_RECEIVE_SLOTS = 8, /* with UDP_GRO each may be 64 KiB */
	HEADROOM = 16,           /* before a packet, for its vnet header */
	RECEIVE_BUFFER_LEN = HEADROOM + 65536,
	READ_BUFFER_LEN = HEADROOM + 65536,
	SEND_ARENA_LEN = 256 * 1024,
	READS_PER_TURN = 64,
};

/* Datagrams for one hop, back to back in the arena, each `segment_len` long but the last. It
 * may wait longer than its FIB lives. */
struct run {
	struct tundp_hop to;
	uint32_t hop;
	uint64_t generation; /* of the FIB that `hop` is an index into */
	uint32_t offset;
	uint32_t len;
	uint32_t segment_len;
	uint32_t count;
	bool is_closed; /* nothing may follow in it */
	uint64_t bytes_in;
};

/* One datagram's control messages, aligned as they must be. */
union segment_control {
	struct cmsghdr align;
	uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
};
union receive_control {
	struct cmsghdr align;
	uint8_t bytes[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(uint32_t))];
};

struct tundp_batch {
	struct tundp_worker *worker;
	const struct tundp_fib *fib; /* of this turn of the loop */
	const struct tundp_sums *sums;
	int tun_error;               /* EBADFD once the device is gone */

	/* encap: read -> segments in the arena -> runs -> sendmmsg */
	struct run runs[MAX_RUNS];
	uint32_t run_count;
	uint32_t arena_len;
	bool is_blocked;  /* the socket was full: the runs wait, the TUN is not read */
	uint32_t refusals; /* EAGAINs in a row */
	struct segmenter segmenter;
	struct mmsghdr send_messages[MAX_RUNS];
	struct iovec send_iovecs[MAX_RUNS];
	struct sockaddr_in send_to[MAX_RUNS];
	union segment_control send_control[MAX_RUNS];

	/* decap: recvmmsg -> decapsulate -> coalescer -> write */
	struct coalescer coalescer;
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
bool batch_encap_turn(struct tundp_batch *batch);
bool batch_decap_turn(struct tundp_batch *batch);

/* Tries again to send what waits; `is_blocked` says how it went. */
void batch_encap_resume(struct tundp_batch *batch);

/* Counts what still waits as dropped: the worker ends. */
void batch_encap_abandon(struct tundp_batch *batch);

void batch_encap_init(struct tundp_batch *batch);
void batch_decap_init(struct tundp_batch *batch);

/* Switches an offload off for good and tells Python. */
void batch_lose(struct tundp_batch *batch, uint32_t offload);

static inline bool batch_has(const struct tundp_batch *batch, uint32_t offload)
{
	const struct tundp_worker *worker = batch->worker;

	return worker->offloads & ~__atomic_load_n(&worker->offloads_lost, __ATOMIC_RELAXED) &
	       offload;
}

#endif
