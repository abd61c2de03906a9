/* Traffic generators of `tundp bench` and the labs: one thread each, started from Python with the GIL
 * released, counting into memory that Python reads while they run. Every payload byte is
 * checked at the far end, so a path that drops or corrupts cannot look fast.
 *
 * Not part of the dataplane: a module of its own, tundp._traffic. */
#ifndef TUNDP_TRAFFIC_H
#define TUNDP_TRAFFIC_H

#include <stddef.h>
#include <stdint.h>

/* cdef-begin */

#define TRAFFIC_ABI 5

/* Payload byte `o` of stream or datagram `n` is pattern[(n + o) % TRAFFIC_PERIOD]; the
 * pattern is stored twice over and more, so that any piece of it is contiguous. */
#define TRAFFIC_PERIOD 65521
#define TRAFFIC_PIECE 131072

/* Counted by one thread, read by others; each field changes by itself. */
struct traffic {
	uint64_t bytes;
	uint64_t messages;   /* sends, datagrams or transactions */
	uint64_t corrupt;    /* pieces or datagrams with a wrong byte */
	uint64_t reordered;  /* datagrams that came after a later one */
	uint64_t duplicates;
	uint64_t stale;      /* datagrams of an earlier run, late */
	uint64_t lost;       /* transactions without an answer in time */
	uint64_t refused;    /* sends the kernel had no room for */
	uint64_t samples;    /* latencies, or arrivals, stored */
	uint64_t late_ns;    /* the most a sender of numbered datagrams was behind its schedule */
	uint64_t stall_ns;   /* the longest time a receiver of a stream had nothing */
	uint64_t stall_at_ns; /* when that began, CLOCK_MONOTONIC */
	int error;           /* errno that ended it, 0 if it was told to stop */
	int stop;            /* written by Python */
};

/* Fills pattern[TRAFFIC_PERIOD + TRAFFIC_PIECE]. */
void traffic_pattern(uint8_t *pattern);

/* Sends the pattern over a connected stream until told to stop. */
void traffic_stream_send(int fd, const uint8_t *pattern, struct traffic *traffic);

/* Receives and checks it until the stream ends. */
void traffic_stream_receive(int fd, const uint8_t *pattern, struct traffic *traffic);

/* Sends datagrams of `size` >= 16 bytes over a connected socket: a sequence number, the
 * number of the run, then the pattern from the sequence number on. `per_ms` > 0 paces to so
 * many a millisecond, 0 sends as fast as it goes. */
void traffic_datagram_send(int fd, const uint8_t *pattern, uint32_t size, uint32_t per_ms,
			   uint64_t run, struct traffic *traffic);

/* Receives and checks those of `run`, which must have `size` bytes; `seen` is a zeroed
 * bitmap of `seen_bits` (a power of two). */
void traffic_datagram_receive(int fd, const uint8_t *pattern, uint32_t size, uint64_t run,
			      uint8_t *seen, uint64_t seen_bits, struct traffic *traffic);

/* Sends numbered datagrams of `size` bytes to `address` (host order): number n is due n / `rate`
 * seconds after the first, and is sent in the millisecond it is due. A sender that got no
 * processor catches up in bursts of at most four times its rate. When each was sent goes to
 * `sent_ns` (CLOCK_MONOTONIC), also of those the kernel refused; ENOSPC once `capacity` are. */
void traffic_numbered_send(int fd, const uint8_t *pattern, uint32_t size, uint32_t rate,
			   uint64_t run, uint32_t address, uint16_t port, uint64_t *sent_ns,
			   uint64_t capacity, struct traffic *traffic);

/* Receives and checks them: the number of each and when it was received, in the order they came,
 * copies too; ENOSPC once `capacity` are stored. */
void traffic_numbered_receive(int fd, const uint8_t *pattern, uint32_t size, uint64_t run,
			      uint64_t *numbers, uint64_t *received_ns, uint64_t capacity,
			      struct traffic *traffic);

/* Ping-pong of `size` bytes over a connected socket; nanoseconds of each round trip go to
 * `samples_ns`, a ring of `capacity`. Answers later than the socket's timeout are lost. */
void traffic_request(int fd, int is_stream, uint32_t size, uint32_t *samples_ns,
		     uint64_t capacity, struct traffic *traffic);

/* Answers each message with itself: a connected stream, or datagrams from anybody. */
void traffic_answer(int fd, int is_stream, uint32_t size, struct traffic *traffic);

/* Connects, asks for one byte, closes; again and again. `address` in host order. */
void traffic_connect(uint32_t address, uint16_t port, struct traffic *traffic);

/* The other side of it: accepts, answers, closes. */
void traffic_accept(int fd, struct traffic *traffic);

/* The least a forwarder does, between a TUN with vnet headers (struct virtio_net_hdr, 10 bytes) and a
 * connected UDP socket with UDP_GRO, neither blocking, until told to stop. has_uso: the TUN takes UDP
 * super-packets. `refused` counts what the kernel refused. The other end must be another of these:
 * checksums are left to be completed. */
void bare_forward(int tun, int udp, int has_uso, struct traffic *traffic);

/* Burns CPU for `ns` nanoseconds of this thread's CPU time; returns what it burnt. */
uint64_t traffic_burn(uint64_t ns);

/* cdef-end */

#endif
