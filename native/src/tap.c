/* Event records, into the rings of taps and the slots of the flight recorder. A ring has one
 * writer and one reader and no lock: each moves its own end of it. */
#include "tap.h"

#include <assert.h>
#include <string.h>

#include "clock.h"

static_assert(sizeof(struct tundp_event) == TUNDP_EVENT_LEN, "wire/event.py's header");
static_assert(TUNDP_TAP_LEN_MIN >= 2 * (TUNDP_EVENT_LEN + TUNDP_SNAP_MAX), "any record fits");

static uint32_t record_len(uint32_t captured)
{
	return (TUNDP_EVENT_LEN + captured + TUNDP_EVENT_ALIGN - 1) / TUNDP_EVENT_ALIGN *
	       TUNDP_EVENT_ALIGN;
}

/* Where a record of `size` bytes begins, counted as `head` is, or UINT64_MAX if it has no room. It lies in one
 * piece: what is left before the ring's end is filled. */
static uint64_t make_room(struct tundp_tap *tap, uint32_t size)
{
	const uint64_t tail = __atomic_load_n(&tap->tail, __ATOMIC_ACQUIRE);
	const uint32_t at = (uint32_t)(tap->head & (tap->size - 1));
	const uint32_t left = tap->size - at;
	const uint32_t filler = left < size ? left : 0;

	if (tap->head + filler + size - tail > tap->size)
		return UINT64_MAX;
	if (filler) {
		/* The reader needs no more of it than this. */
		const struct tundp_event end = { .size = filler };

		memcpy(tap->data + at, &end, TUNDP_EVENT_ALIGN);
	}
	return tap->head + filler;
}

static void put(struct tundp_tap *tap, struct tundp_event *event, const uint8_t *packet)
{
	uint8_t *to;
	uint64_t at;

	event->captured = (uint16_t)(event->length < tap->snap ? event->length : tap->snap);
	if (!packet)
		event->captured = 0;
	event->size = record_len(event->captured);
	at = make_room(tap, event->size);
	if (at == UINT64_MAX) {
		__atomic_store_n(&tap->lost, tap->lost + 1, __ATOMIC_RELAXED);
		return;
	}
	to = tap->data + (at & (tap->size - 1));
	memcpy(to, event, TUNDP_EVENT_LEN);
	if (event->captured)
		memcpy(to + TUNDP_EVENT_LEN, packet, event->captured);
	memset(to + TUNDP_EVENT_LEN + event->captured, 0,
	       event->size - TUNDP_EVENT_LEN - event->captured);
	__atomic_store_n(&tap->head, at + event->size, __ATOMIC_RELEASE);
}

/* The packet's facts are made once, and only if some tap's filter asks for them. */
static void put_in_all(struct tundp_worker *worker, struct tundp_event *event,
		       const uint8_t *packet)
{
	const uint32_t bit = event->is_dropped ? TUNDP_EVENT_DROPS : 1u << event->stage;
	const bool is_encap = event->stage <= TUNDP_STAGE_UDP_SEND;
	struct tundp_facts facts;
	bool has_facts = false;

	for (uint32_t i = 0; i < worker->taps->count; i++) {
		struct tundp_tap *tap = worker->taps->taps[i];

		if (!(tap->stages & bit))
			continue;
		if (tap->filter && !has_facts) {
			tundp_facts_of(packet, packet ? event->length : 0, event->length, &facts);
			tundp_facts_event(&facts, is_encap ? TUNDP_ENCAP : TUNDP_DECAP,
					  event->outer, event->is_dropped, event->reason);
			has_facts = true;
		}
		if (!tap->filter || tundp_filter_matches(tap->filter, &facts))
			put(tap, event, packet);
	}
}

static struct tundp_event event_of(const struct tundp_worker *worker, uint64_t packets,
				   const struct subject *subject)
{
	return (struct tundp_event){
		.time_ns = clock_now_ns(),
		.packet_id = subject->packet_id,
		.more_ids = subject->more_ids,
		.hop = subject->hop,
		.outer = subject->outer,
		.port = subject->port,
		.error = (uint16_t)subject->error,
		.length = (uint32_t)subject->len,
		.packets = (uint32_t)packets,
		.together = subject->together ? subject->together : (uint32_t)packets,
		.gso_size = subject->gso_size,
		.generation = (uint32_t)worker->shared.seen,
	};
}

/* One record, or one for each of several packets that lie back to back. */
static void put_each(struct tundp_worker *worker, struct tundp_event *event,
		     const struct subject *subject)
{
	const uint64_t newest = worker->counters.encap.reads;
	size_t at = 0;

	if (subject->span <= subject->len || !subject->len) {
		put_in_all(worker, event, subject->packet);
		return;
	}
	event->packets = 1;
	for (uint32_t number = 0; at < subject->span; number++) {
		const size_t left = subject->span - at;

		if (subject->ids)
			event->packet_id =
				newest - (uint32_t)((uint32_t)newest - subject->ids[number]);
		event->length = (uint32_t)(left < subject->len ? left : subject->len);
		put_in_all(worker, event, subject->packet + at);
		at += event->length;
	}
}

void tap_passed(struct tundp_worker *worker, uint32_t stage, uint64_t packets,
		const struct subject *subject)
{
	struct tundp_event event = event_of(worker, packets, subject);

	event.stage = (uint8_t)stage;
	if (stage == TUNDP_STAGE_UDP_RECEIVE)
		event.wait_ns = subject->wait_ns;
	put_each(worker, &event, subject);
}

/* Keeps the packet as an example of its reason, if the last one is old enough: a flood of drops
 * costs a look at the coarse clock each. */
static void note_example(struct tundp_examples *examples, struct tundp_event *event,
			 const struct subject *subject)
{
	struct tundp_example *slot = &examples->slots[examples->count % TUNDP_EXAMPLES];
	const size_t len = subject->packet ? subject->len : 0;

	event->captured = (uint16_t)(len < TUNDP_EXAMPLE_LEN ? len : TUNDP_EXAMPLE_LEN);
	__atomic_store_n(&slot->event.size, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	event->size = 0;
	slot->event = *event;
	if (event->captured)
		memcpy(slot->packet, subject->packet, event->captured);
	__atomic_store_n(&slot->event.size, record_len(event->captured), __ATOMIC_RELEASE);
	__atomic_store_n(&examples->count, examples->count + 1, __ATOMIC_RELEASE);
}

void tap_dropped(struct tundp_worker *worker, bool is_encap, uint64_t packets, uint32_t reason,
		 const struct subject *subject)
{
	struct tundp_examples *examples = worker->config.examples;
	struct tundp_event event;
	uint64_t now_ns = 0;

	if (examples) {
		examples += (is_encap ? 0 : TUNDP_DROP_COUNT) + reason;
		now_ns = clock_coarse_ns();
		if (now_ns - examples->noted_ns < TUNDP_EXAMPLE_NS)
			examples = NULL;
	}
	if (!examples && !worker->taps)
		return;
	event = event_of(worker, packets, subject);
	event.stage = is_encap ? TUNDP_STAGE_UDP_SEND : TUNDP_STAGE_TUN_WRITE;
	event.is_dropped = 1;
	event.reason = (uint8_t)reason;
	if (examples) {
		examples->noted_ns = now_ns;
		note_example(examples, &event, subject);
	}
	if (worker->taps)
		put_each(worker, &event, subject);
}

size_t tundp_tap_read(struct tundp_tap *tap, uint8_t *out, size_t out_len)
{
	const uint64_t head = __atomic_load_n(&tap->head, __ATOMIC_ACQUIRE);
	uint64_t tail = tap->tail;
	size_t taken = 0;

	while (tail < head) {
		const uint8_t *from = tap->data + (tail & (tap->size - 1));
		struct tundp_event event;

		memcpy(&event, from, TUNDP_EVENT_ALIGN);
		if (event.stage) {
			if (event.size > out_len - taken)
				break;
			memcpy(out + taken, from, event.size);
			taken += event.size;
		}
		tail += event.size;
	}
	__atomic_store_n(&tap->tail, tail, __ATOMIC_RELEASE);
	return taken;
}

uint64_t tundp_tap_lost(const struct tundp_tap *tap)
{
	return __atomic_load_n(&tap->lost, __ATOMIC_RELAXED);
}
