/* Events: what happened to a packet, for whoever looks on (taps), and for later (the flight
 * recorder). Called where packets are counted, and nowhere else. Python twin: engine/taps.py. */
#ifndef TUNDP_TAP_H
#define TUNDP_TAP_H

#include "count.h"

/* A packet, or several with one fate, has passed a stage. Call only while there are taps. */
void tap_passed(struct tundp_worker *worker, uint32_t stage, uint64_t packets,
		const struct subject *subject);

/* It was dropped instead of passing the second stage of its direction. */
void tap_dropped(struct tundp_worker *worker, bool is_encap, uint64_t packets, uint32_t reason,
		 const struct subject *subject);

#endif
