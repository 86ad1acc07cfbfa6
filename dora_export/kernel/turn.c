/* Matrices turned, or held against turned ones, in panels that stay in the cache.
 *
 * Rows of weights are pages apart, mostly a power of two of them, so that lines of the cache which
 * follow each other in a column push each other out. So each line is taken once and whole: a panel is
 * one line of the matrix wide and turned into memory of its own, whose rows then go into place, or are
 * compared, a kilobyte at a time.
 */
#include "turn.h"

#include <stdint.h>
#include <string.h>

enum { SQUARE = 16, FOUR = 4, LINE = 64, RUN = 1024 };

#define INLINE static inline __attribute__((always_inline))
/* Of a panel: columns, rows, and elements from one turned row to the next, of which the last line is
 * there to keep them from being a power of two apart. */
#define WIDTH(stored) (LINE / (ptrdiff_t)sizeof(stored))
#define HEIGHT(type) (RUN / (ptrdiff_t)sizeof(type))
#define PITCH(type) ((RUN + LINE) / (ptrdiff_t)sizeof(type))

typedef uint32_t words __attribute__((vector_size(16)));

#if defined(__clang__)
#define MIXED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIXED(a, b, i, j, k, l) __builtin_shuffle(a, b, (words){i, j, k, l})
#endif

INLINE words load(const uint32_t *from) {
  words out;
  memcpy(&out, from, sizeof out);
  return out;
}

/* out[j * PITCH + i] becomes in[i][j], four by four at a time. */
INLINE void flip(uint32_t in[SQUARE][SQUARE], uint32_t *out) {
  for (int j = 0; j < SQUARE; j += FOUR) {
    for (int i = 0; i < SQUARE; i += FOUR) {
      const words a = load(&in[i][j]), b = load(&in[i + 1][j]);
      const words c = load(&in[i + 2][j]), d = load(&in[i + 3][j]);
      const words ab_low = MIXED(a, b, 0, 4, 1, 5), ab_high = MIXED(a, b, 2, 6, 3, 7);
      const words cd_low = MIXED(c, d, 0, 4, 1, 5), cd_high = MIXED(c, d, 2, 6, 3, 7);
      const words flipped[FOUR] = {MIXED(ab_low, cd_low, 0, 1, 4, 5),
                                   MIXED(ab_low, cd_low, 2, 3, 6, 7),
                                   MIXED(ab_high, cd_high, 0, 1, 4, 5),
                                   MIXED(ab_high, cd_high, 2, 3, 6, 7)};
      for (int k = 0; k < FOUR; k++)
        memcpy(out + (j + k) * PITCH(uint32_t) + i, &flipped[k], sizeof flipped[k]);
    }
  }
}

/* Turns what it can of a panel in squares; returns how many rows. */
#define IN_SQUARES(stored, widen)                                                                   \
  INLINE ptrdiff_t squares_##stored(const char *from, ptrdiff_t stride, ptrdiff_t height,           \
                                    ptrdiff_t width, uint32_t *panel) {                             \
    ptrdiff_t row = 0;                                                                              \
    if (width < WIDTH(stored)) return 0;                                                            \
    for (; row + SQUARE <= height; row += SQUARE) {                                                 \
      for (ptrdiff_t column = 0; column < WIDTH(stored); column += SQUARE) {                        \
        uint32_t square[SQUARE][SQUARE];                                                            \
        for (int i = 0; i < SQUARE; i++) {                                                          \
          stored one[SQUARE];                                                                       \
          memcpy(one, from + (row + i) * stride + column * (ptrdiff_t)sizeof *one, sizeof one);     \
          for (int j = 0; j < SQUARE; j++) square[i][j] = widen(one[j]);                            \
        }                                                                                           \
        flip(square, panel + column * PITCH(uint32_t) + row);                                       \
      }                                                                                             \
    }                                                                                               \
    return row;                                                                                     \
  }

#define AS_IT_IS(x) (x)
#define UPPER_HALF(x) ((uint32_t)(x) << 16) /* bfloat16 as a float */

typedef uint16_t bfloat16;
IN_SQUARES(uint32_t, AS_IT_IS)
IN_SQUARES(bfloat16, UPPER_HALF)
#define squares_uint8_t(from, stride, height, width, panel) 0
#define squares_uint16_t(from, stride, height, width, panel) 0
#define squares_uint64_t(from, stride, height, width, panel) 0

/* Goes over a matrix in panels; `then` says what becomes of each turned row. */
#define PANELS(name, stored, type, widen, then)                                                     \
  static int name##_##stored(const struct turning *t) {                                             \
    type panel[WIDTH(stored) * PITCH(type)];                                                        \
    for (ptrdiff_t row = 0; row < t->rows; row += HEIGHT(type)) {                                   \
      const ptrdiff_t height = t->rows - row < HEIGHT(type) ? t->rows - row : HEIGHT(type);         \
      const size_t nbytes = (size_t)height * sizeof(type);                                          \
      for (ptrdiff_t column = 0; column < t->columns; column += WIDTH(stored)) {                    \
        const ptrdiff_t left = t->columns - column;                                                 \
        const ptrdiff_t width = left < WIDTH(stored) ? left : WIDTH(stored);                        \
        const char *from = t->matrix + row * t->stride + column * (ptrdiff_t)sizeof(stored);        \
        for (ptrdiff_t i = squares_##stored(from, t->stride, height, width, panel); i < height;     \
             i++) {                                                                                 \
          stored one[WIDTH(stored)];                                                                \
          memcpy(one, from + i * t->stride, (size_t)width * sizeof *one);                           \
          for (ptrdiff_t j = 0; j < width; j++) panel[j * PITCH(type) + i] = widen(one[j]);         \
        }                                                                                           \
        for (ptrdiff_t j = 0; j < width; j++) {                                                     \
          char *place = t->turned + (column + j) * t->turned_stride + row * (ptrdiff_t)sizeof(type); \
          then(place, panel + j * PITCH(type), nbytes);                                             \
        }                                                                                           \
      }                                                                                             \
    }                                                                                               \
    return 1;                                                                                       \
  }

#define PUT(place, turned, nbytes) memcpy(place, turned, nbytes)
#define COMPARE(place, turned, nbytes) \
  if (memcmp(place, turned, nbytes)) return 0

PANELS(put, uint8_t, uint8_t, AS_IT_IS, PUT)
PANELS(put, uint16_t, uint16_t, AS_IT_IS, PUT)
PANELS(put, uint32_t, uint32_t, AS_IT_IS, PUT)
PANELS(put, uint64_t, uint64_t, AS_IT_IS, PUT)
PANELS(same, uint8_t, uint8_t, AS_IT_IS, COMPARE)
PANELS(same, uint16_t, uint16_t, AS_IT_IS, COMPARE)
PANELS(same, uint32_t, uint32_t, AS_IT_IS, COMPARE)
PANELS(same, uint64_t, uint64_t, AS_IT_IS, COMPARE)
PANELS(same, bfloat16, uint32_t, UPPER_HALF, COMPARE)

void turn(const struct turning *t) {
  if (t->itemsize == 1) put_uint8_t(t);
  else if (t->itemsize == 2) put_uint16_t(t);
  else if (t->itemsize == 4) put_uint32_t(t);
  else put_uint64_t(t);
}

int is_turned(const struct turning *t, int is_bfloat16) {
  if (is_bfloat16) return same_bfloat16(t);
  if (t->itemsize == 1) return same_uint8_t(t);
  if (t->itemsize == 2) return same_uint16_t(t);
  if (t->itemsize == 4) return same_uint32_t(t);
  return same_uint64_t(t);
}
