/* SHA-256 (FIPS 180-4) of two messages side by side, with the instructions that x86-64 has for it.
 *
 * Each round waits for the one before, and the processor could do two in that time: another message's.
 * So two files take hardly longer than one.
 */
#include "sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

enum { BIT_SSSE3 = 1 << 9, BIT_SSE41 = 1 << 19, BIT_SHA = 1 << 29 };

/* For any processor, as all that follows is not. */
int sha256_usable(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & BIT_SSSE3) || !(c & BIT_SSE41)) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & BIT_SHA) != 0;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha,sse4.1,ssse3"))), apply_to = function)
#else
#pragma GCC target("sha,sse4.1,ssse3")
#endif

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 64, LANES = 2 };

static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* A message in work: the state as the instructions want it, and the four latest groups of words. */
struct lane {
  __m128i abef, cdgh, words[4];
};

INLINE struct lane begun(const uint32_t state[8]) {
  const __m128i abcd = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
  struct lane lane;
  lane.abef = _mm_alignr_epi8(abcd, efgh, 8);
  lane.cdgh = _mm_blend_epi16(efgh, abcd, 0xF0);
  return lane;
}

INLINE void end(const struct lane *lane, uint32_t state[8]) {
  const __m128i feba = _mm_shuffle_epi32(lane->abef, 0x1B);
  const __m128i dchg = _mm_shuffle_epi32(lane->cdgh, 0xB1);
  _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

/* Rounds 4 * group to 4 * group + 3 of all lanes. */
INLINE void rounds(struct lane *lanes, const int count, const int group, const uint8_t *const *data) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i key = _mm_load_si128((const __m128i *)(K + 4 * group));
  __m128i sums[LANES];
  for (int i = 0; i < count; i++) {
    __m128i *w = lanes[i].words, *now = &w[group & 3];
    if (group < 4) {
      *now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data[i] + 16 * group)), swap);
    } else {
      const __m128i before = w[(group + 3) & 3];
      const __m128i middle = _mm_alignr_epi8(before, w[(group + 2) & 3], 4);
      *now = _mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(group + 1) & 3]), middle);
      *now = _mm_sha256msg2_epu32(*now, before);
    }
    sums[i] = _mm_add_epi32(*now, key);
  }
  for (int i = 0; i < count; i++)
    lanes[i].cdgh = _mm_sha256rnds2_epu32(lanes[i].cdgh, lanes[i].abef, sums[i]);
  for (int i = 0; i < count; i++)
    lanes[i].abef = _mm_sha256rnds2_epu32(lanes[i].abef, lanes[i].cdgh,
                                          _mm_shuffle_epi32(sums[i], 0x0E));
}

INLINE void blocks(uint32_t *const *states, const uint8_t **data, const int count, ptrdiff_t left) {
  struct lane lanes[LANES];
  for (int i = 0; i < count; i++) lanes[i] = begun(states[i]);
  for (; left > 0; left--) {
    __m128i abef[LANES], cdgh[LANES];
    for (int i = 0; i < count; i++) abef[i] = lanes[i].abef, cdgh[i] = lanes[i].cdgh;
#pragma GCC unroll 16
    for (int group = 0; group < 16; group++) rounds(lanes, count, group, data);
    for (int i = 0; i < count; i++) {
      lanes[i].abef = _mm_add_epi32(lanes[i].abef, abef[i]);
      lanes[i].cdgh = _mm_add_epi32(lanes[i].cdgh, cdgh[i]);
      data[i] += BLOCK;
    }
  }
  for (int i = 0; i < count; i++) end(&lanes[i], states[i]);
}

void sha256_two(uint32_t *states[2], const uint8_t *data[2], const ptrdiff_t counts[2]) {
  const ptrdiff_t both = counts[0] < counts[1] ? counts[0] : counts[1];
  const uint8_t *at[2] = {data[0], data[1]};
  if (both) blocks(states, at, 2, both);
  for (int i = 0; i < 2; i++) blocks(&states[i], &at[i], 1, counts[i] - both);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

void sha256_two(uint32_t *states[2], const uint8_t *data[2], const ptrdiff_t counts[2]) {
  (void)states, (void)data, (void)counts;
}

int sha256_usable(void) { return 0; }

#endif
