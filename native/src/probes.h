/* Static probes of user space (USDT), for perf, bpftrace, SystemTap and uprobes of the kernel: a nop, and
 * a note in .note.stapsdt that names its address and where the arguments are. Layout of the note:
 * SystemTap's UserSpaceProbeImplementation, version 3; no semaphore, so that nobody writes to us.
 *
 *     tundp:tun_read(packets)        a TUN read brought so many
 *     tundp:udp_send(packets)        a send took so many
 *     tundp:udp_receive(packets)     a receive brought so many
 *     tundp:tun_write(packets)       a TUN write took so many
 *     tundp:drop(direction, reason, hop, length, packets)
 *                                    direction 0 encap, 1 decap; reason as enum tundp_drop; length of the
 *                                    first packet, bytes
 *
 * On other processors there are none. Python has no twin of it: the reference engine has no probes. */
#ifndef TUNDP_PROBES_H
#define TUNDP_PROBES_H

#include <stdint.h>

#if defined(__GNUC__) && defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define PROBES_ARE_THERE 1

#define PROBE_NOTE(name, arguments)                                                                \
	"990: nop\n"                                                                               \
	".pushsection .note.stapsdt,\"?\",\"note\"\n"                                              \
	".balign 4\n"                                                                              \
	".4byte 992f-991f, 994f-993f, 3\n"                                                         \
	"991: .asciz \"stapsdt\"\n"                                                                \
	"992: .balign 4\n"                                                                         \
	"993: .8byte 990b\n"                                                                       \
	".8byte _.stapsdt.base\n"                                                                  \
	".8byte 0\n"                                                                               \
	".asciz \"tundp\"\n"                                                                       \
	".asciz \"" name "\"\n"                                                                    \
	".asciz \"" arguments "\"\n"                                                               \
	"994: .balign 4\n"                                                                         \
	".popsection\n"                                                                            \
	".ifndef _.stapsdt.base\n"                                                                 \
	".pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n"                    \
	".weak _.stapsdt.base\n"                                                                   \
	".hidden _.stapsdt.base\n"                                                                 \
	"_.stapsdt.base: .space 1\n"                                                               \
	".size _.stapsdt.base, 1\n"                                                                \
	".popsection\n"                                                                            \
	".endif\n"

#define PROBE_1(name, a)                                                                           \
	__asm__ volatile(PROBE_NOTE(#name, "8@%[a1]") : : [a1] "nor"((uint64_t)(a)))
#define PROBE_5(name, a, b, c, d, e)                                                               \
	__asm__ volatile(PROBE_NOTE(#name, "8@%[a1] 8@%[a2] 8@%[a3] 8@%[a4] 8@%[a5]")              \
			 :                                                                         \
			 : [a1] "nor"((uint64_t)(a)), [a2] "nor"((uint64_t)(b)),                   \
			   [a3] "nor"((uint64_t)(c)), [a4] "nor"((uint64_t)(d)),                   \
			   [a5] "nor"((uint64_t)(e)))
#else
#define PROBES_ARE_THERE 0
#define PROBE_1(name, a) ((void)(a))
#define PROBE_5(name, a, b, c, d, e) ((void)(a), (void)(b), (void)(c), (void)(d), (void)(e))
#endif

#endif
