/* One worker under ThreadSanitizer: packets through a socket pair for a TUN and a loopback
 * UDP socket, while another thread publishes FIBs, reads counters, and stops it. Prints what
 * failed; exit code 1 then. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tundp.h"

enum { PACKETS = 3000, FIBS = 300, ROUNDS = 20 };

static const struct tundp_hop hops[2] = { { 0 }, { .address = 0x7f000001, .port = 9 } };
static uint16_t inner_mtu[2] = { 0xffff, 0xffff };
static uint8_t single[2];
static const uint32_t table[1] = { 1 };
static struct tundp_fib fibs[2];

static void *run(void *worker)
{
	return (void *)(intptr_t)tundp_simple_run(worker);
}

static void fill(uint8_t packet[28])
{
	uint16_t sum;

	memset(packet, 0, 28);
	packet[0] = 0x45;
	packet[3] = 28;
	packet[8] = 9;
	packet[9] = 253;
	memcpy(packet + 12, (uint8_t[]){ 10, 5, 1, 2, 10, 5, 0, 7 }, 8);
	sum = (uint16_t)~tundp_sum(packet, 20);
	packet[10] = (uint8_t)(sum >> 8);
	packet[11] = (uint8_t)sum;
}

static uint64_t dropped(const struct tundp_direction *direction)
{
	uint64_t sum = 0;

	for (int i = 0; i < TUNDP_DROP_COUNT; i++)
		sum += direction->drops[i];
	return sum;
}

static int conserved(const struct tundp_direction *direction)
{
	return direction->packets_in == direction->packets_out + dropped(direction);
}

static int round_trip(struct tundp_worker *worker, int tun)
{
	struct tundp_counters counters;
	uint64_t before, generation = 1;
	uint8_t packet[28];
	pthread_t thread;
	int failures = 0;
	void *code;

	tundp_worker_counters(worker, &counters);
	before = counters.encap.packets_in;
	worker->stop = 0;
	pthread_create(&thread, NULL, run, worker);
	for (int i = 0; i < PACKETS; i++) {
		fill(packet);
		if (write(tun, packet, sizeof(packet)) != sizeof(packet))
			failures++;
		if (i % (PACKETS / FIBS) == 0) {
			/* The other FIB may be written once the worker was seen with this one. */
			const struct tundp_fib *now = &fibs[generation & 1];
			struct tundp_fib *next = &fibs[(generation + 1) & 1];

			while (tundp_worker_seen(worker) != now->generation)
				sched_yield();
			*next = *now;
			next->generation = now->generation + 1;
			tundp_worker_install(worker, next);
			generation++;
		}
		tundp_worker_counters(worker, &counters);
		if (!conserved(&counters.encap) || !conserved(&counters.decap)) {
			printf("not conserved\n");
			failures++;
		}
	}
	while (counters.encap.packets_in < before + PACKETS)
		tundp_worker_counters(worker, &counters);
	tundp_worker_stop(worker);
	pthread_join(thread, &code);
	if (code) {
		printf("ended with %ld\n", (long)(intptr_t)code);
		failures++;
	}
	/* For the next round: the newest FIB where it looks for it. */
	fibs[1] = fibs[generation & 1];
	fibs[1].generation++;
	tundp_worker_install(worker, &fibs[1]);
	return failures;
}

int main(void)
{
	struct tundp_worker *worker = malloc(sizeof(*worker));
	struct sockaddr_in any = { .sin_family = AF_INET };
	int pair[2], failures = 0;

	any.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	fibs[1] = (struct tundp_fib){
		.base_len = 1, .level_count = 1, .table = table, .table_count = 1, .hops = hops,
		.hop_count = 2, .inner_mtu = inner_mtu, .single = single, .generation = 1,
	};
	if (tundp_fib_check(&fibs[1])) {
		printf("FIB refused\n");
		return 1;
	}
	tundp_worker_init(worker);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		return 1;
	worker->tun_fd = pair[0];
	worker->udp_fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	worker->control_fd = eventfd(0, EFD_NONBLOCK);
	if (bind(worker->udp_fd, (struct sockaddr *)&any, sizeof(any)))
		return 1;
	/* The TUN's end does not block, ours does. */
	if (fcntl(pair[0], F_SETFL, O_NONBLOCK))
		return 1;
	tundp_worker_install(worker, &fibs[1]);
	for (int i = 0; i < ROUNDS; i++)
		failures += round_trip(worker, pair[1]);
	free(worker);
	return failures ? 1 : 0;
}
