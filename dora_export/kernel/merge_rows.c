/* The merge of bfloat16 rows, one pass over memory.
 *
 * V = W + left @ right in float32, the product summed first; the row's squares in float32 over 512
 * columns, then in float64; one rounding to bfloat16, to nearest, ties to even. Elements that come
 * out so small that float32's error may be half of their last place (W and the product cancel) are
 * computed again in float64. What one row gives depends on that row alone, not on its neighbours or
 * on how many rows one call takes.
 *
 * Written with the vector types of GCC and Clang, eight floats at a time. On x86-64 all of this file
 * is compiled for AVX2 and FMA, so the caller asks the processor before it comes here.
 */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of bfloat16 are taken apart as little-endian words"
#endif
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#endif

#include "merge_rows.h"

#include <math.h>
#include <string.h>

enum { LANES = 8, TOGETHER = 6, PANELS_PER_SUM = 32, FRACTION_BITS = 7, LOOK = 8 * PANEL };

typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef int16_t halves __attribute__((vector_size(32)));

/* Sixteen neighbouring columns: the even ones and the odd ones. A word of memory holds one of each,
 * so that bfloat16 widens by a shift or a mask, and nothing changes places. */
struct pair {
  floats even, odd;
};

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *from) {
  floats out;
  memcpy(&out, from, sizeof out);
  return out;
}

INLINE void store(float *to, floats value) { memcpy(to, &value, sizeof value); }

INLINE words load_words(const void *from) {
  words out;
  memcpy(&out, from, sizeof out);
  return out;
}

INLINE struct pair widen(words stored) {
  return (struct pair){(floats)(stored << 16), (floats)(stored & 0xFFFF0000u)};
}

INLINE words rounded(floats value) {
  const words bits = (words)value;
  return bits + 0x7FFF + ((bits >> 16) & 1);
}

INLINE words narrow(struct pair value) {
  return (rounded(value.even) >> 16) | (rounded(value.odd) & 0xFFFF0000u);
}

INLINE int any(halves flags) {
  uint64_t parts[4];
  memcpy(parts, &flags, sizeof parts);
  return (parts[0] | parts[1] | parts[2] | parts[3]) != 0;
}

/* Where a panel keeps its column `j`. */
INLINE ptrdiff_t place(ptrdiff_t j) { return j % 2 * LANES + j / 2; }

void pack_panels(const float *right, float *panels, ptrdiff_t rank, ptrdiff_t columns) {
  for (ptrdiff_t first = 0; first < columns; first += PANEL) {
    const ptrdiff_t width = columns - first < PANEL ? columns - first : PANEL;
    for (ptrdiff_t k = 0; k < rank; k++, panels += PANEL) {
      memset(panels, 0, PANEL * sizeof *panels);
      for (ptrdiff_t j = 0; j < width; j++) panels[place(j)] = right[k * columns + first + j];
    }
  }
}

size_t merge_scratch(ptrdiff_t columns) {
  return (size_t)(TOGETHER * ((columns + PANEL - 1) / PANEL) * PANEL);
}

/* V of `count` rows into `values`, panel by panel, and each row's sum of squares. */
INLINE void add_product(const struct rows *rows, ptrdiff_t first, const int count, float *values,
                        ptrdiff_t stride, double *squares) {
  const ptrdiff_t columns = rows->columns, rank = rows->rank;
  const float *panel = rows->panels, *left = rows->left + first * rank;
  const uint16_t *stored = rows->stored + first * columns;
  struct pair sums[TOGETHER], totals[TOGETHER];
  doubles wide[TOGETHER];
  for (int i = 0; i < count; i++) wide[i] = (doubles){0}, sums[i] = (struct pair){{0}, {0}};
  int summed = 0;
  for (ptrdiff_t at = 0; at < columns; at += PANEL, panel += rank * PANEL) {
    for (int i = 0; i < count; i++) totals[i] = (struct pair){{0}, {0}};
    for (ptrdiff_t k = 0; k < rank; k++) {
      const floats even = load(panel + k * PANEL), odd = load(panel + k * PANEL + LANES);
#pragma GCC unroll 6
      for (int i = 0; i < count; i++) {
        const float factor = left[i * rank + k];
        totals[i].even += factor * even;
        totals[i].odd += factor * odd;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      uint16_t padded[PANEL] = {0};
      const uint16_t *from = stored + i * columns + at;
      if (__builtin_expect(at + PANEL > columns, 0)) {
        memcpy(padded, from, (size_t)(columns - at) * sizeof *from);
        from = padded;
      }
      const struct pair base = widen(load_words(from));
      const floats even = totals[i].even + base.even, odd = totals[i].odd + base.odd;
      store(values + i * stride + at, even);
      store(values + i * stride + at + LANES, odd);
      sums[i].even += even * even;
      sums[i].odd += odd * odd;
    }
    if (++summed == PANELS_PER_SUM || at + PANEL >= columns) {
      for (int i = 0; i < count; i++) {
        wide[i] += __builtin_convertvector(sums[i].even, doubles);
        wide[i] += __builtin_convertvector(sums[i].odd, doubles);
        sums[i] = (struct pair){{0}, {0}};
      }
      summed = 0;
    }
  }
  for (int i = 0; i < count; i++) {
    squares[i] = 0;
    for (int lane = 0; lane < LANES; lane++) squares[i] += wide[i][lane];
  }
}

/* Bit pattern below which `error` is more than half a unit in the last place; 0: there is none. */
static uint16_t limit_bits(double error) {
  double limit = error * (1 << (FRACTION_BITS + 2));
  if (!(limit > 0)) return 0;
  float single = (float)(limit < 3e38 ? limit : 3e38);
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  return (uint16_t)((bits >> 16) + 1);
}

/* Rounds once to nearest, ties to even, by way of a float whose last bit says "inexact". */
static uint16_t narrow_double(double value) {
  float single = (float)value;
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  if (isfinite(single) && (double)single != value && (bits & 1) == 0)
    bits += fabs(value) > fabs((double)single) ? 1 : -1; /* of two neighbours one is odd */
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static uint16_t again(const struct rows *rows, ptrdiff_t row, ptrdiff_t j, double factor) {
  const ptrdiff_t columns = rows->columns, rank = rows->rank;
  const uint32_t bits = (uint32_t)rows->stored[row * columns + j] << 16;
  const float *packed = rows->panels + j / PANEL * rank * PANEL + place(j % PANEL);
  float base;
  memcpy(&base, &bits, sizeof base);
  double value = 0;
  for (ptrdiff_t k = 0; k < rank; k++)
    value += rows->exact_left[row * rank + k] *
             (rows->exact_right ? rows->exact_right[k * columns + j] : packed[k * PANEL]);
  value = (value + base) * factor;
  if (rows->exact_by_column) value *= rows->exact_by_column[j];
  return narrow_double(value);
}

/* Looks at elements of which one at least is not finite or smaller than `limit`. */
static void inspect(const struct rows *rows, ptrdiff_t row, ptrdiff_t first, ptrdiff_t last,
                    uint16_t limit, double factor, struct outcome *outcome) {
  uint16_t *out = rows->out + row * rows->columns;
  for (ptrdiff_t j = first; j < last; j++) {
    if ((out[j] & 0x7FFF) >= 0x7F80) outcome->nonfinite = 1;
    if ((out[j] & 0x7FFF) < limit) {
      out[j] = again(rows, row, j, factor);
      outcome->again++;
    }
  }
}

/* Scales, rounds and looks at one row. */
INLINE void finish(const struct rows *rows, ptrdiff_t row, const float *values, double factor,
                   const int by_row, const int by_column, struct outcome *outcome) {
  const ptrdiff_t columns = rows->columns;
  uint16_t *out = rows->out + row * columns;
  const double error = rows->error[row];
  const uint16_t limit = limit_bits((by_row ? error * fabs(factor) : error) * rows->column_bound);
  const float scale = (float)factor;
  const int16_t limits = (int16_t)limit;
  halves flags = {0};
  for (ptrdiff_t j = 0, looked = 0; j < columns; j += PANEL) {
    const ptrdiff_t width = columns - j < PANEL ? columns - j : PANEL;
    struct pair value = {load(values + j), load(values + j + LANES)};
    if (by_row) value.even *= scale, value.odd *= scale;
    if (by_column) {
      value.even *= load(rows->by_column + j);
      value.odd *= load(rows->by_column + j + LANES);
    }
    const words bits = narrow(value);
    if (__builtin_expect(width == PANEL, 1)) memcpy(out + j, &bits, sizeof bits);
    else memcpy(out + j, &bits, (size_t)width * sizeof *out);
    const halves sizes = (halves)(bits & 0x7FFF7FFFu);
    flags |= (sizes < limits) | (sizes >= 0x7F80);
    if (j + PANEL - looked == LOOK || j + PANEL >= columns) {
      if (__builtin_expect(any(flags), 0))
        inspect(rows, row, looked, j + width, limit, factor, outcome);
      looked = j + PANEL, flags = (halves){0};
    }
  }
}

/* Whether float32 has not the range for a row's squares or its factor; as row_factor.py has it. */
static int is_coarse(const float *values, ptrdiff_t columns, double squares, double factor) {
  const double size = fabs(factor);
  if (squares == 0) {
    for (ptrdiff_t j = 0; j < columns; j++)
      if (values[j] != 0) return 1;
    return 0;
  }
  return squares > 1e300 || squares < columns * 0x1p-129 || (size > 0 && size < 0x1p-126);
}

INLINE void merge_some(const struct rows *rows, ptrdiff_t first, const int count, float *scratch,
                       struct outcome *outcome) {
  const ptrdiff_t stride = (rows->columns + PANEL - 1) / PANEL * PANEL;
  double squares[TOGETHER];
  add_product(rows, first, count, scratch, stride, squares);
  for (int i = 0; i < count; i++) {
    const ptrdiff_t row = first + i;
    const float *values = scratch + i * stride;
    double factor = 1;
    if (rows->mode == GIVEN) factor = rows->magnitude[row];
    if (rows->mode == BY_NORM) {
      const double norm = sqrt(squares[i]);
      factor = norm == 0 ? 0 : rows->magnitude[row] / (norm + rows->eps);
      rows->undefined[row] = norm == 0 && rows->magnitude[row] != 0 && rows->eps == 0;
      if (is_coarse(values, rows->columns, squares[i], factor)) rows->undefined[row] = 2;
    }
    if (rows->mode == NO_FACTOR && !rows->by_column) finish(rows, row, values, 1, 0, 0, outcome);
    else if (!rows->by_column) finish(rows, row, values, factor, 1, 0, outcome);
    else finish(rows, row, values, factor, rows->mode != NO_FACTOR, 1, outcome);
  }
}

struct outcome merge_rows(const struct rows *rows, float *scratch) {
  struct outcome outcome = {0, 0};
  ptrdiff_t row = 0;
  for (; row + TOGETHER <= rows->count; row += TOGETHER)
    merge_some(rows, row, TOGETHER, scratch, &outcome);
  for (; row < rows->count; row++) merge_some(rows, row, 1, scratch, &outcome);
  return outcome;
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
