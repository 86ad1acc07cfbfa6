/* The merge of bfloat16 or float32 rows into float32, in float64, one pass over memory.
 *
 * V = W + left @ right in float64, the product summed first; the row's squares in float64; one
 * rounding to float32. What one row gives depends on that row alone, not on its neighbours or on how
 * many rows one call takes.
 *
 * Written as merge_rows.c is, which see.
 */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 is taken for the upper half of a little-endian float"
#endif
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#endif

#include "merge_wide.h"

#include <math.h>
#include <string.h>

enum { LANES = 4, TOGETHER = 6 };

typedef double doubles __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(8)));

struct pair {
  doubles low, high;
};

#define INLINE static inline __attribute__((always_inline))

INLINE doubles load(const double *from) {
  doubles out;
  memcpy(&out, from, sizeof out);
  return out;
}

INLINE doubles widened(const void *from, const int itemsize) {
  floats single;
  if (itemsize == 2) {
    halves stored;
    memcpy(&stored, from, sizeof stored);
    single = (floats)(__builtin_convertvector(stored, words) << 16);
  } else {
    memcpy(&single, from, sizeof single);
  }
  return __builtin_convertvector(single, doubles);
}

void pack_wide(const double *right, double *panels, ptrdiff_t rank, ptrdiff_t columns) {
  for (ptrdiff_t first = 0; first < columns; first += WIDE_PANEL) {
    const ptrdiff_t width = columns - first < WIDE_PANEL ? columns - first : WIDE_PANEL;
    for (ptrdiff_t k = 0; k < rank; k++, panels += WIDE_PANEL) {
      memset(panels, 0, WIDE_PANEL * sizeof *panels);
      memcpy(panels, right + k * columns + first, (size_t)width * sizeof *panels);
    }
  }
}

size_t wide_scratch(ptrdiff_t columns) {
  return (size_t)(TOGETHER * ((columns + WIDE_PANEL - 1) / WIDE_PANEL) * WIDE_PANEL);
}

/* V of `count` rows into `values`, and each row's sum of squares. */
INLINE void add_product(const struct wide_rows *rows, ptrdiff_t first, const int count,
                        const int itemsize, double *values, ptrdiff_t stride, double *squares) {
  const ptrdiff_t columns = rows->columns, rank = rows->rank;
  const double *panel = rows->panels, *left = rows->left + first * rank;
  const char *stored = (const char *)rows->stored + first * columns * itemsize;
  struct pair sums[TOGETHER], totals[TOGETHER];
  for (int i = 0; i < count; i++) sums[i] = (struct pair){{0}, {0}};
  for (ptrdiff_t at = 0; at < columns; at += WIDE_PANEL, panel += rank * WIDE_PANEL) {
    for (int i = 0; i < count; i++) totals[i] = (struct pair){{0}, {0}};
    for (ptrdiff_t k = 0; k < rank; k++) {
      const doubles low = load(panel + k * WIDE_PANEL), high = load(panel + k * WIDE_PANEL + LANES);
#pragma GCC unroll 6
      for (int i = 0; i < count; i++) {
        const double factor = left[i * rank + k];
        totals[i].low += factor * low;
        totals[i].high += factor * high;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      char padded[WIDE_PANEL * sizeof(float)] = {0};
      const char *from = stored + (i * columns + at) * itemsize;
      if (__builtin_expect(at + WIDE_PANEL > columns, 0)) {
        memcpy(padded, from, (size_t)(columns - at) * (size_t)itemsize);
        from = padded;
      }
      const doubles low = totals[i].low + widened(from, itemsize);
      const doubles high = totals[i].high + widened(from + LANES * itemsize, itemsize);
      memcpy(values + i * stride + at, &low, sizeof low);
      memcpy(values + i * stride + at + LANES, &high, sizeof high);
      sums[i].low += low * low;
      sums[i].high += high * high;
    }
  }
  for (int i = 0; i < count; i++) {
    const doubles both = sums[i].low + sums[i].high;
    squares[i] = (both[0] + both[1]) + (both[2] + both[3]);
  }
}

/* Scales and rounds one row; returns whether it has inf or NaN. */
INLINE int finish(const struct wide_rows *rows, ptrdiff_t row, const double *values, double factor,
                  const int by_row, const int by_column) {
  const ptrdiff_t columns = rows->columns;
  float *out = rows->out + row * columns;
  words wrong = {0};
  for (ptrdiff_t j = 0; j < columns; j += LANES) {
    doubles value = load(values + j);
    if (by_row) value *= factor;
    if (by_column) value *= load(rows->by_column + j);
    const floats single = __builtin_convertvector(value, floats);
    const words bits = (words)single & 0x7F800000u;
    wrong |= (words)(bits == 0x7F800000u);
    const ptrdiff_t width = columns - j < LANES ? columns - j : LANES;
    if (__builtin_expect(width == LANES, 1)) memcpy(out + j, &single, sizeof single);
    else memcpy(out + j, &single, (size_t)width * sizeof *out);
  }
  return (wrong[0] | wrong[1] | wrong[2] | wrong[3]) != 0;
}

INLINE int merge_some(const struct wide_rows *rows, ptrdiff_t first, const int count,
                      const int itemsize, double *scratch) {
  const ptrdiff_t stride = (rows->columns + WIDE_PANEL - 1) / WIDE_PANEL * WIDE_PANEL;
  double squares[TOGETHER];
  int wrong = 0;
  add_product(rows, first, count, itemsize, scratch, stride, squares);
  for (int i = 0; i < count; i++) {
    const ptrdiff_t row = first + i;
    double factor = 1;
    if (rows->mode == GIVEN) factor = rows->magnitude[row];
    if (rows->mode == BY_NORM) {
      const double norm = sqrt(squares[i]);
      factor = norm == 0 ? 0 : rows->magnitude[row] / (norm + rows->eps);
      rows->undefined[row] = norm == 0 && rows->magnitude[row] != 0 && rows->eps == 0;
    }
    const double *values = scratch + i * stride;
    if (rows->by_column) wrong |= finish(rows, row, values, factor, rows->mode != NO_FACTOR, 1);
    else if (rows->mode != NO_FACTOR) wrong |= finish(rows, row, values, factor, 1, 0);
    else wrong |= finish(rows, row, values, factor, 0, 0);
  }
  return wrong;
}

int merge_wide(const struct wide_rows *rows, double *scratch) {
  int wrong = 0;
  ptrdiff_t row = 0;
  if (rows->itemsize == 2) {
    for (; row + TOGETHER <= rows->count; row += TOGETHER)
      wrong |= merge_some(rows, row, TOGETHER, 2, scratch);
    for (; row < rows->count; row++) wrong |= merge_some(rows, row, 1, 2, scratch);
  } else {
    for (; row + TOGETHER <= rows->count; row += TOGETHER)
      wrong |= merge_some(rows, row, TOGETHER, 4, scratch);
    for (; row < rows->count; row++) wrong |= merge_some(rows, row, 1, 4, scratch);
  }
  return wrong;
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
