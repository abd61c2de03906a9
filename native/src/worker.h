/* What every engine's loop shares: counting, publication, sending with its decisions. */
#ifndef TUNDP_WORKER_H
#define TUNDP_WORKER_H

#include <stdbool.h>

#include "tundp.h"

/* The FIB to use until the next call; remembers its generation as seen. */
const struct tundp_fib *worker_fib(struct tundp_worker *worker);

bool worker_is_stopped(const struct tundp_worker *worker);

/* Takes one packet that was read from the TUN to its verdict and out. */
void worker_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, size_t len);

/* Takes one received datagram to its verdict and out. 0, or -EBADFD when the TUN is gone. */
int worker_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, size_t len,
		       uint32_t outer_source);

#endif
