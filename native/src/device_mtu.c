/* The MTU of a device, as the socket layer applies it. Python twin: tundp/linux/udp.py, device_mtu.
 *
 * IP_MTU of a connected socket is the MTU of the path, with what ICMP errors, which anybody can
 * forge, said of it. A datagram that no device takes is refused before a byte of it is copied, and
 * the error queue (IP_RECVERR) names the limit that applies to the socket: with
 * IP_PMTUDISC_INTERFACE that is the device's. */
#include "device_mtu.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Needs struct timespec. */
#include <linux/errqueue.h>

#include "tundp_twins.h"

enum { IPV4_MTU_MAX = 65535 };

/* The limit a refused send left in the error queue, or 0. */
static int read_limit(int probe)
{
	union {
		struct cmsghdr align;
		uint8_t space[CMSG_SPACE(sizeof(struct sock_extended_err) +
					 sizeof(struct sockaddr_in))];
	} control;
	struct msghdr message = { .msg_control = &control, .msg_controllen = sizeof(control) };
	struct sock_extended_err error;

	if (recvmsg(probe, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
		return 0;
	for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part;
	     part = CMSG_NXTHDR(&message, part)) {
		if (part->cmsg_level != IPPROTO_IP || part->cmsg_type != IP_RECVERR)
			continue;
		memcpy(&error, CMSG_DATA(part), sizeof(error));
		if (error.ee_origin == SO_EE_ORIGIN_LOCAL && error.ee_errno == EMSGSIZE)
			return error.ee_info > IPV4_MTU_MAX ? IPV4_MTU_MAX : (int)error.ee_info;
	}
	return 0;
}

/* MSG_MORE: what the device does take waits for the rest of it, and is discarded by close. */
static int ask(int probe, const uint8_t *scratch)
{
	if (send(probe, scratch, TUNDP_MAX_DATAGRAM_LEN, MSG_MORE | MSG_DONTWAIT) >= 0)
		return IPV4_MTU_MAX;
	return errno == EMSGSIZE ? read_limit(probe) : 0;
}

int device_mtu(uint32_t source, const struct tundp_hop *endpoint, const uint8_t *scratch)
{
	const int on = 1, discovery = IP_PMTUDISC_INTERFACE;
	const struct sockaddr_in from = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(source),
	};
	const struct sockaddr_in to = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(endpoint->address),
		.sin_port = htons(endpoint->port),
	};
	const int probe = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int mtu = 0;

	if (probe < 0)
		return 0;
	if (!setsockopt(probe, IPPROTO_IP, IP_MTU_DISCOVER, &discovery, sizeof(discovery)) &&
	    !setsockopt(probe, IPPROTO_IP, IP_RECVERR, &on, sizeof(on)) &&
	    !bind(probe, (const struct sockaddr *)&from, sizeof(from)) &&
	    !connect(probe, (const struct sockaddr *)&to, sizeof(to)))
		mtu = ask(probe, scratch);
	(void)close(probe);
	return mtu;
}
