/* Publication, seen from the worker: FIBs and stop come in, heartbeat and news go out. */
#ifndef TUNDP_PUBLISH_H
#define TUNDP_PUBLISH_H

#include <stdbool.h>

#include "tundp.h"

/* Names the calling thread, which is the worker's from now on. */
void publish_name_thread(const struct tundp_worker *worker);

/* Loads the published FIB and taps, announces their generations as seen (an RCU-like quiescent
 * point: no older ones are used from now on), and beats the heart. Call once per loop iteration. */
const struct tundp_fib *publish_next_fib(struct tundp_worker *worker);

bool publish_is_stopped(const struct tundp_worker *worker);

/* Wakes Python: path state was written, or an offload disabled. */
void publish_news(struct tundp_worker *worker);

/* Empties the control eventfd, which was readable. The next iteration loads `stop` and `fib`. */
void publish_drain_control(struct tundp_worker *worker);

/* Disables an offload the kernel has refused, until Python restores it. */
void publish_disable(struct tundp_worker *worker, uint32_t offload);

/* Whether an offload is there and not disabled. */
static inline bool publish_has(const struct tundp_worker *worker, uint32_t offload)
{
	return worker->config.offloads &
	       ~__atomic_load_n(&worker->shared.offloads_disabled, __ATOMIC_RELAXED) & offload;
}

#endif
