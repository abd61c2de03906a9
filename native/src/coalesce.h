/* Coalescing: packets from the wire to as few TUN writes as possible. Python twin:
 * tundp/wire/coalesce.py, which is the specification. */
#ifndef TUNDP_COALESCE_H
#define TUNDP_COALESCE_H

#include "transport.h"
#include "tundp_twins.h"

enum {
	COALESCE_BUFFERS = TUNDP_COALESCE_ITEMS + 1,
	COALESCE_BUFFER_LEN = TUNDP_VNET_LEN + IP_MAX_LEN + 1,
};

/* Where the packets of a message came from: the sender's address, the hop it is, its port, and
 * the number of the receive. */
struct origin {
	uint32_t outer;
	uint32_t hop;
	uint16_t port;
	uint64_t packet_id;
};

/* One write to the TUN. `packet` has TUNDP_VNET_LEN bytes before it for the writer to use;
 * both are the writer's until it returns. */
struct coalesced {
	struct tundp_vnet vnet;
	uint8_t *packet;
	size_t len;
	uint32_t count;       /* packets in it */
	uint64_t bytes_in;    /* what they came in with */
	struct origin origin; /* of the first one */
	uint64_t last_id;     /* packet id of the last one */
};

typedef void (*coalesce_write)(void *context, const struct coalesced *coalesced);

struct coalesce_item {
	uint8_t *buffer; /* COALESCE_BUFFER_LEN; the packet begins behind the vnet header */
	uint32_t len;    /* of the packet so far */
	uint32_t gso_size;
	uint32_t next_seq;
	uint32_t count;
	uint64_t bytes_in;
	struct origin origin;
	uint64_t last_id;
	uint16_t next_id;
	uint16_t header_len; /* both headers */
	uint8_t ip_proto;
};

struct coalescer {
	const struct tundp_sums *sums;
	coalesce_write write;
	void *context;
	uint64_t *misses; /* TUNDP_MISS_COUNT */
	bool is_tcp_on;
	bool is_udp_on;
	uint32_t max_udp_segments;
	struct origin origin; /* of the packets that are added now */
	uint32_t item_count;
	/* Oldest first; what is behind item_count holds the free buffers, at least one. */
	struct coalesce_item items[COALESCE_BUFFERS];
};

/* Takes one packet whose IPv4 header ip_parse accepted, `len` its total length, with
 * TUNDP_VNET_LEN bytes before it that may be written. It is copied or written at once. */
void coalesce_add(struct coalescer *coalescer, uint8_t *packet, size_t len, uint64_t bytes_in);

/* Ends a batch: writes every item, oldest first. */
void coalesce_flush(struct coalescer *coalescer);

#endif
