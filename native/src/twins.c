/* The packet rules as Python calls them to compare: thin wrappers, no engine uses them. */
#include <arpa/inet.h>
#include <assert.h>

#include "coalesce.h"
#include "fib.h"
#include "latency.h"
#include "segment.h"
#include "socket_wait.h"
#include "tundp_twins.h"

static_assert(sizeof(struct tundp_vnet) == TUNDP_VNET_LEN, "linux/virtio_net.h");
static_assert(COALESCE_BUFFERS * COALESCE_BUFFER_LEN == TUNDP_COALESCE_SCRATCH, "tundp_twins.h");

uint16_t tundp_sum(const uint8_t *data, size_t len)
{
	return ntohs(sums_fold(sums_portable(data, len)));
}

const char *tundp_sums_name(size_t variant)
{
	const struct tundp_sums *sums = sums_variant(variant);

	return sums ? sums->name : NULL;
}

uint16_t tundp_sums_run(size_t variant, uint8_t *to, const uint8_t *from, size_t len)
{
	const struct tundp_sums *sums = sums_variant(variant);

	if (!sums)
		return 0;
	return ntohs(sums_fold(to ? sums->copy(to, from, len) : sums->sum(from, len)));
}

uint16_t tundp_checksum_after_ttl_decrement(uint16_t header_checksum)
{
	return ip_checksum_after_ttl_decrement(header_checksum);
}

uint16_t tundp_checksum_before_ttl_decrement(uint16_t header_checksum)
{
	return ip_checksum_before_ttl_decrement(header_checksum);
}

uint32_t tundp_wait_ns(uint64_t stamp_ns, const struct tundp_clocks *now,
		       const struct tundp_clocks *before)
{
	return socket_wait_ns(stamp_ns, now, before);
}

uint32_t tundp_latency_bucket(uint64_t elapsed_ns)
{
	return latency_bucket(elapsed_ns);
}

void tundp_fib_lookup(const struct tundp_fib *fib, const uint32_t *addresses, size_t count,
		      uint32_t *hops)
{
	for (size_t i = 0; i < count; i++)
		hops[i] = fib_lookup(fib, addresses[i]);
}

size_t tundp_filter_count(const struct tundp_filter *filter, const uint8_t *packets, size_t len,
			  size_t count)
{
	struct tundp_facts facts;
	size_t found = 0;

	for (size_t i = 0; i < count; i++) {
		tundp_facts_of(packets + i * len, len, (uint32_t)len, &facts);
		tundp_facts_event(&facts, TUNDP_ENCAP, 0, 0, 0);
		if (filter && tundp_filter_matches(filter, &facts))
			found++;
	}
	return found;
}

int64_t tundp_segment(const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
		      int lowers_ttl, uint8_t *out, size_t out_len, uint32_t *lens,
		      size_t lens_count)
{
	struct segmenter segmenter;
	uint32_t reason;
	size_t used = 0;

	if (!segment_begin(&segmenter, sums_best(), vnet, packet, len, &reason))
		return -1 - (int64_t)reason;
	if (segmenter.count > lens_count ||
	    len + (size_t)segmenter.count * TUNDP_HEADERS_MAX > out_len)
		return INT64_MIN;
	if (lowers_ttl)
		segment_lower_ttl(&segmenter);
	for (uint32_t i = 0; i < segmenter.count; i++) {
		lens[i] = (uint32_t)segment_next(&segmenter, out + used);
		used += lens[i];
	}
	return segmenter.count;
}

struct recorder {
	uint8_t *out;
	size_t room;
	int64_t used; /* -1: out of room */
};

/* A record: u32 count, u32 length, vnet header, packet. */
static void record(void *context, const struct coalesced *coalesced)
{
	struct recorder *recorder = context;
	const uint32_t head[2] = { coalesced->count, (uint32_t)coalesced->len };
	const size_t need = sizeof(head) + TUNDP_VNET_LEN + coalesced->len;
	uint8_t *at;

	if (recorder->used < 0 || recorder->room - (size_t)recorder->used < need) {
		recorder->used = -1;
		return;
	}
	at = recorder->out + recorder->used;
	memcpy(at, head, sizeof(head));
	memcpy(at + sizeof(head), &coalesced->vnet, TUNDP_VNET_LEN);
	memcpy(at + sizeof(head) + TUNDP_VNET_LEN, coalesced->packet, coalesced->len);
	recorder->used += (int64_t)need;
}

int64_t tundp_coalesce(const struct tundp_coalesce_input *input, uint8_t *scratch, uint8_t *out,
		       size_t out_len, uint64_t *misses)
{
	struct recorder recorder = { .out = out, .room = out_len };
	struct coalescer coalescer = {
		.sums = sums_best(),
		.write = record,
		.context = &recorder,
		.misses = misses,
		.is_tcp_on = input->is_tcp_on,
		.is_udp_on = input->is_udp_on,
		.max_udp_segments = input->max_udp_segments,
	};
	uint8_t *packet = input->packets;

	for (size_t i = 0; i < COALESCE_BUFFERS; i++)
		coalescer.items[i].buffer = scratch + i * COALESCE_BUFFER_LEN;
	for (size_t i = 0; i < input->count; i++) {
		packet += TUNDP_VNET_LEN;
		coalesce_add(&coalescer, packet, input->lens[i], input->lens[i]);
		packet += input->lens[i];
	}
	coalesce_flush(&coalescer);
	return recorder.used;
}
