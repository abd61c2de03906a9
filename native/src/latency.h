/* The time packets are in an engine, by batch. Python twin: engine/latency.py. */
#ifndef TUNDP_LATENCY_H
#define TUNDP_LATENCY_H

#include "clock.h"
#include "tundp.h"

static inline uint32_t latency_bucket(uint64_t elapsed_ns)
{
	const uint64_t us = elapsed_ns / 1000 + (elapsed_ns % 1000 > 0);
	const uint32_t bits = us > 1 ? 64 - (uint32_t)__builtin_clzll(us - 1) : 0;

	return bits < TUNDP_LATENCY_FINITE ? bits : TUNDP_LATENCY_FINITE;
}

/* When a batch began, for latency_end; 0: it is not measured. */
static inline uint64_t latency_begin(uint32_t *batches)
{
	return (*batches)++ % TUNDP_LATENCY_EVERY ? 0 : clock_now_ns();
}

/* A batch has ended, all of whose packets are counted. before: packets_in when it began. */
static inline void latency_end(struct tundp_direction *direction, uint64_t before,
			       uint64_t began_ns)
{
	const uint64_t packets = direction->packets_in - before;
	uint64_t elapsed_ns;

	if (!began_ns)
		return;
	elapsed_ns = clock_now_ns() - began_ns;
	direction->latency[latency_bucket(elapsed_ns)] += packets;
	direction->latency_ns += packets * elapsed_ns;
}

#endif
