/* Packets on their way out: the arena they lie in, and the trains they leave in. */
#ifndef TUNDP_TRAIN_H
#define TUNDP_TRAIN_H

#include "batch.h"

void train_init(struct batch *batch);

/* Sends all trains: the arena, empty then. */
uint8_t *train_empty_arena(struct batch *batch);

/* A place for one more packet of up to `len` bytes, behind the arena's end or in an empty one. */
static inline uint8_t *train_make_room(struct batch *batch, size_t len)
{
	if (batch->train_count < TRAINS_MAX && SEND_ARENA_LEN - batch->arena_len >= len)
		return batch->send_arena + batch->arena_len;
	return train_empty_arena(batch);
}

/* The packet of `len` bytes just written there joins the last train or begins a new one. It came in
 * with `bytes_in`. */
void train_append(struct batch *batch, const struct lane *lane, uint32_t len, uint64_t bytes_in);

/* Sends the trains that nothing can join any more. */
void train_send_full(struct batch *batch);

/* Sends all trains. */
void train_send_all(struct batch *batch);

#endif
