/* The Internet checksum. Python twin: tundp/wire/checksum.py, which is the specification.
 *
 * The sum is neutral to byte order (RFC 1071 section 2 B): words are added as the machine
 * loads them, and only the folded result is put into network order. Loads go through
 * memcpy, since packets are aligned to nothing. Vector variants add 32-bit words in 64-bit
 * lanes, where no carry can be lost; all of them end with the portable tail. */
#include <string.h>

#include "sums.h"
#include "tundp_twins.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

static uint64_t tail_sum(const uint8_t *data, size_t len)
{
	uint64_t sum = 0;

	for (; len >= 4; data += 4, len -= 4)
		sum += sums_load32(data);
	if (len >= 2) {
		sum += sums_load(data);
		data += 2;
		len -= 2;
	}
	if (len) {
		/* The odd byte is the first of a pair whose second is zero. */
		const uint8_t pair[2] = { *data, 0 };

		sum += sums_load(pair);
	}
	return sum;
}

uint64_t sums_portable(const uint8_t *data, size_t len)
{
	uint64_t first = 0, second = 0;

	for (; len >= 16; data += 16, len -= 16) {
		first += sums_load32(data) + sums_load32(data + 4);
		second += sums_load32(data + 8) + sums_load32(data + 12);
	}
	return first + second + tail_sum(data, len);
}

static uint64_t copy_portable(uint8_t *to, const uint8_t *from, size_t len)
{
	memcpy(to, from, len);
	return sums_portable(to, len);
}

static const struct tundp_sums portable = { "portable", sums_portable, copy_portable };

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

/* Both halves of each 64-bit lane, added to the lane's 64-bit accumulator. */
#define ADD_256(accumulator, vector)                                                               \
	((accumulator) = _mm256_add_epi64((accumulator),                                           \
					  _mm256_add_epi64(_mm256_and_si256((vector), low_halves), \
							   _mm256_srli_epi64((vector), 32))))

AVX2 static inline uint64_t reduce_256(__m256i vector)
{
	const __m128i half =
		_mm_add_epi64(_mm256_castsi256_si128(vector), _mm256_extracti128_si256(vector, 1));

	return (uint64_t)_mm_cvtsi128_si64(half) + (uint64_t)_mm_extract_epi64(half, 1);
}

AVX2 static inline uint64_t walk_avx2(uint8_t *to, const uint8_t *from, size_t len, int is_copy)
{
	const __m256i low_halves = _mm256_set1_epi64x(0xffffffff);
	__m256i first = _mm256_setzero_si256(), second = first, third = first, fourth = first;

	for (; len >= 128; from += 128, to = is_copy ? to + 128 : to, len -= 128) {
		const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)from);
		const __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(from + 32));
		const __m256i c = _mm256_loadu_si256((const __m256i *)(const void *)(from + 64));
		const __m256i d = _mm256_loadu_si256((const __m256i *)(const void *)(from + 96));

		if (is_copy) {
			_mm256_storeu_si256((__m256i *)(void *)to, a);
			_mm256_storeu_si256((__m256i *)(void *)(to + 32), b);
			_mm256_storeu_si256((__m256i *)(void *)(to + 64), c);
			_mm256_storeu_si256((__m256i *)(void *)(to + 96), d);
		}
		ADD_256(first, a);
		ADD_256(second, b);
		ADD_256(third, c);
		ADD_256(fourth, d);
	}
	for (; len >= 32; from += 32, to = is_copy ? to + 32 : to, len -= 32) {
		const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)from);

		if (is_copy)
			_mm256_storeu_si256((__m256i *)(void *)to, a);
		ADD_256(first, a);
	}
	if (is_copy)
		memcpy(to, from, len);
	first = _mm256_add_epi64(_mm256_add_epi64(first, second), _mm256_add_epi64(third, fourth));
	return reduce_256(first) + tail_sum(from, len);
}

AVX2 static uint64_t sum_avx2(const uint8_t *data, size_t len)
{
	return walk_avx2(NULL, data, len, 0);
}

AVX2 static uint64_t copy_avx2(uint8_t *to, const uint8_t *from, size_t len)
{
	return walk_avx2(to, from, len, 1);
}

static const struct tundp_sums avx2 = { "avx2", sum_avx2, copy_avx2 };

#define ADD_512(accumulator, vector)                                                               \
	((accumulator) = _mm512_add_epi64((accumulator),                                           \
					  _mm512_add_epi64(_mm512_and_si512((vector), low_halves), \
							   _mm512_srli_epi64((vector), 32))))

AVX512 static inline uint64_t walk_avx512(uint8_t *to, const uint8_t *from, size_t len, int is_copy)
{
	const __m512i low_halves = _mm512_set1_epi64(0xffffffff);
	__m512i first = _mm512_setzero_si512(), second = first;

	for (; len >= 128; from += 128, to = is_copy ? to + 128 : to, len -= 128) {
		const __m512i a = _mm512_loadu_si512(from);
		const __m512i b = _mm512_loadu_si512(from + 64);

		if (is_copy) {
			_mm512_storeu_si512(to, a);
			_mm512_storeu_si512(to + 64, b);
		}
		ADD_512(first, a);
		ADD_512(second, b);
	}
	/* A masked load reads zeros for what lies behind: the tail, odd byte and all. */
	for (; len; from += 64, to = is_copy ? to + 64 : to) {
		const size_t piece = len < 64 ? len : 64;
		const __mmask64 mask = ~(__mmask64)0 >> (64 - piece);
		const __m512i a = _mm512_maskz_loadu_epi8(mask, from);

		if (is_copy)
			_mm512_mask_storeu_epi8(to, mask, a);
		ADD_512(first, a);
		len -= piece;
	}
	return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(first, second));
}

AVX512 static uint64_t sum_avx512(const uint8_t *data, size_t len)
{
	return walk_avx512(NULL, data, len, 0);
}

AVX512 static uint64_t copy_avx512(uint8_t *to, const uint8_t *from, size_t len)
{
	return walk_avx512(to, from, len, 1);
}

static const struct tundp_sums avx512 = { "avx512", sum_avx512, copy_avx512 };

#elif defined(__aarch64__)

static inline uint64_t walk_neon(uint8_t *to, const uint8_t *from, size_t len, int is_copy)
{
	uint64x2_t first = vdupq_n_u64(0), second = first, third = first, fourth = first;

	for (; len >= 64; from += 64, to = is_copy ? to + 64 : to, len -= 64) {
		const uint8x16_t a = vld1q_u8(from), b = vld1q_u8(from + 16);
		const uint8x16_t c = vld1q_u8(from + 32), d = vld1q_u8(from + 48);

		if (is_copy) {
			vst1q_u8(to, a);
			vst1q_u8(to + 16, b);
			vst1q_u8(to + 32, c);
			vst1q_u8(to + 48, d);
		}
		first = vpadalq_u32(first, vreinterpretq_u32_u8(a));
		second = vpadalq_u32(second, vreinterpretq_u32_u8(b));
		third = vpadalq_u32(third, vreinterpretq_u32_u8(c));
		fourth = vpadalq_u32(fourth, vreinterpretq_u32_u8(d));
	}
	if (is_copy)
		memcpy(to, from, len);
	first = vaddq_u64(vaddq_u64(first, second), vaddq_u64(third, fourth));
	return vgetq_lane_u64(first, 0) + vgetq_lane_u64(first, 1) + tail_sum(from, len);
}

static uint64_t sum_neon(const uint8_t *data, size_t len)
{
	return walk_neon(NULL, data, len, 0);
}

static uint64_t copy_neon(uint8_t *to, const uint8_t *from, size_t len)
{
	return walk_neon(to, from, len, 1);
}

static const struct tundp_sums neon = { "neon", sum_neon, copy_neon };

#endif

/* The variants this CPU can run, fastest first, portable last. */
static size_t usable(const struct tundp_sums *found[TUNDP_SUMS_MAX])
{
	size_t count = 0;

#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512vl"))
		found[count++] = &avx512;
	if (__builtin_cpu_supports("avx2"))
		found[count++] = &avx2;
#elif defined(__aarch64__)
	found[count++] = &neon;
#endif
	found[count++] = &portable;
	return count;
}

const struct tundp_sums *sums_variant(size_t number)
{
	const struct tundp_sums *found[TUNDP_SUMS_MAX];

	return number < usable(found) ? found[number] : NULL;
}

const struct tundp_sums *sums_best(void)
{
	return sums_variant(0);
}
