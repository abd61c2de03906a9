/* Which hop has a send socket of its own, and when another hop gets it: decisions without I/O.
 * Python twin: tundp/engine/hop_slots.py. */
#include "tundp_twins.h"

void tundp_slot_look(struct tundp_hop_slot *slot, uint64_t queued, uint64_t now_ns)
{
	if (queued < slot->floor)
		slot->drained_ns = now_ns;
	slot->floor = queued;
}

void tundp_slot_use(struct tundp_hop_slot *slot, uint64_t now_ns, int is_taken)
{
	slot->used_ns = now_ns;
	slot->floor += is_taken ? 1 : 0;
}

int tundp_slot_may_return(const struct tundp_hop_slot *slot, uint64_t queued, uint64_t now_ns)
{
	return queued == 0 && now_ns - slot->since_ns >= TUNDP_HOP_HOLD_NS;
}

int tundp_slot_pick(const struct tundp_hop_socket *sockets, uint32_t count, uint64_t now_ns)
{
	int stuck = -1, idle = -1;

	for (uint32_t i = 0; i < count; i++) {
		const struct tundp_hop_slot *slot = &sockets[i].slot;

		if (slot->floor && now_ns - slot->drained_ns >= TUNDP_HOP_STUCK_NS) {
			if (stuck < 0 || slot->drained_ns < sockets[stuck].slot.drained_ns)
				stuck = (int)i;
		} else if (!slot->floor &&
			   (idle < 0 || slot->used_ns < sockets[idle].slot.used_ns)) {
			idle = (int)i;
		}
	}
	return stuck >= 0 ? stuck | TUNDP_SLOT_STUCK : idle;
}
