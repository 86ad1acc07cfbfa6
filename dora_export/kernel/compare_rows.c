/* Stored rows against the exact result, every element in float64, one pass over memory.
 *
 * verification/tally.py says in numpy what is computed here; the two add in another order. It has
 * nothing of the merge's own loops. A row with anything out of the ordinary (inf, NaN, a norm of
 * zero, squares beyond float64) is left to numpy.
 *
 * Written with the vector types of GCC and Clang, four doubles at a time. On x86-64 all of this file
 * is compiled for AVX2 and FMA, so the caller asks the processor before it comes here.
 */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#endif

#include "compare_rows.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { QUAD = 4, GROUP = 6 }; /* lanes; rows that share what is loaded of the right factor */

typedef double quad __attribute__((vector_size(32)));
typedef int64_t quad_bits __attribute__((vector_size(32)));
typedef float quad_float __attribute__((vector_size(16)));
typedef uint32_t quad_word __attribute__((vector_size(16)));
typedef uint16_t quad_half __attribute__((vector_size(8)));

#define ALWAYS static inline __attribute__((always_inline))
#define EXPONENT_BITS 0x7FF0000000000000
#define SIGN_BITS (-0x7FFFFFFFFFFFFFFF - 1)

ALWAYS quad at(const double *from) {
  quad out;
  memcpy(&out, from, sizeof out);
  return out;
}

ALWAYS quad absolute(quad value) { return (quad)((quad_bits)value & ~SIGN_BITS); }

ALWAYS quad larger(quad a, quad b) {
  const quad_bits first = a > b;
  return (quad)((first & (quad_bits)a) | (~first & (quad_bits)b));
}

ALWAYS double added(quad sum) { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }

ALWAYS double largest(quad of) {
  const double one = of[0] > of[1] ? of[0] : of[1], other = of[2] > of[3] ? of[2] : of[3];
  return one > other ? one : other;
}

ALWAYS int bytes_of(const enum stored_type type) { return type == FLOAT32 ? 4 : 2; }

/* Four neighbouring stored values, exactly. */
ALWAYS quad value_of(const char *from, const enum stored_type type) {
  quad_float single;
  if (type == FLOAT32) {
    memcpy(&single, from, sizeof single);
    return __builtin_convertvector(single, quad);
  }
  quad_half half;
  memcpy(&half, from, sizeof half);
  const quad_word word = __builtin_convertvector(half, quad_word);
  if (type == BFLOAT16) return __builtin_convertvector((quad_float)(word << 16), quad);
  /* the exponent of float16 begins 112 lower than that of float32; 31 is inf or NaN */
  single = (quad_float)((word & 0x7FFF) << 13) * 0x1p112f;
  const quad_word special = (quad_word)((word & 0x7C00) == 0x7C00) & 0x7F800000;
  single = (quad_float)((quad_word)single | special | (word & 0x8000) << 16);
  return __builtin_convertvector(single, quad);
}

/* The same from column `j` on, zeros behind the last one. */
ALWAYS quad row_value(const char *row, ptrdiff_t j, ptrdiff_t columns, const enum stored_type type) {
  const char *from = row + j * bytes_of(type);
  if (__builtin_expect(j + QUAD <= columns, 1)) return value_of(from, type);
  char padded[QUAD * sizeof(float)] = {0};
  if (j < columns) memcpy(padded, from, (size_t)((columns - j) * bytes_of(type)));
  return value_of(padded, type);
}

ALWAYS ptrdiff_t in_strips(ptrdiff_t columns) { return (columns + STRIP - 1) / STRIP * STRIP; }

size_t comparison_scratch(ptrdiff_t columns) { return (size_t)(GROUP * in_strips(columns)); }

/* V of `count` rows into `directions`, and the sum of squares of each. */
ALWAYS void make_directions(const struct comparison *rows, ptrdiff_t first, const int count,
                            const enum stored_type type, double *directions, double *squares) {
  const ptrdiff_t columns = rows->columns, rank = rows->rank, wide = in_strips(columns);
  const char *base = (const char *)rows->base + first * columns * bytes_of(type);
  const double *left = rows->left + first * rank, *strip = rows->right;
  quad sums[GROUP], low[GROUP], high[GROUP];
  for (int i = 0; i < count; i++) sums[i] = (quad){0};
  for (ptrdiff_t j = 0; j < columns; j += STRIP) {
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) low[i] = high[i] = (quad){0};
    for (ptrdiff_t k = 0; k < rank; k++, strip += STRIP) {
      const quad right_low = at(strip), right_high = at(strip + QUAD);
#pragma GCC unroll 6
      for (int i = 0; i < count; i++) {
        low[i] += left[i * rank + k] * right_low;
        high[i] += left[i * rank + k] * right_high;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      const char *row = base + i * columns * bytes_of(type);
      const quad one = low[i] + row_value(row, j, columns, type);
      const quad other = high[i] + row_value(row, j + QUAD, columns, type);
      memcpy(directions + i * wide + j, &one, sizeof one);
      memcpy(directions + i * wide + j + QUAD, &other, sizeof other);
      sums[i] += one * one;
      sums[i] += other * other;
    }
  }
  for (int i = 0; i < count; i++) squares[i] = added(sums[i]);
}

/* Writes EXCESS of a row, or of its columns; returns whether float64 holds the size of its terms. */
ALWAYS int find_excess(const struct comparison *rows, ptrdiff_t row, const char *base,
                       const char *merged, const double *directions, double factor,
                       const enum stored_type base_type, const enum stored_type merged_type,
                       const int by_column, const int keep, double *found) {
  const ptrdiff_t columns = rows->columns;
  double left_size = 0;
  for (ptrdiff_t k = 0; k < rows->rank; k++) {
    const double left = rows->left[row * rows->rank + k];
    left_size += left * left;
  }
  left_size = sqrt(left_size);
  const quad least = (quad){0} + rows->least, floor = (quad){0} + rows->floor;
  quad excess = {0}, most = {0};
  for (ptrdiff_t j = 0; j < columns; j += QUAD) {
    quad exact = at(directions + j) * factor, scale = (quad){0} + factor;
    if (by_column) exact *= at(rows->by_column + j), scale *= at(rows->by_column + j);
    const quad W = row_value(base, j, columns, base_type);
    const quad gap = absolute(row_value(merged, j, columns, merged_type) - exact);
    const quad unit = larger((quad)((quad_bits)exact & EXPONENT_BITS), least);
    quad terms = (absolute(W) + left_size * at(rows->right_sizes + j)) * absolute(scale);
    terms = larger(terms + absolute(exact), floor);
    most = larger(most, terms);
    quad over = larger(gap - unit * rows->step, (quad){0}) / terms;
    if (keep) {
      over = larger(over, at(rows->column_excess + j));
      memcpy(rows->column_excess + j, &over, sizeof over);
    }
    excess = larger(excess, over);
  }
  *found = largest(excess);
  return largest(most) <= DBL_MAX;
}

ALWAYS void compare_row(const struct comparison *rows, ptrdiff_t row, const double *directions,
                        double squares, const enum stored_type base_type,
                        const enum stored_type merged_type, const int by_column) {
  const ptrdiff_t columns = rows->columns;
  const char *base = (const char *)rows->base + row * columns * bytes_of(base_type);
  const char *merged = (const char *)rows->merged + row * columns * bytes_of(merged_type);
  double *figures = rows->figures + row * FIGURES;
  figures[ORDINARY] = 0;
  double factor = 1;
  if (rows->rule == BY_MAGNITUDE) factor = rows->magnitude[row];
  if (rows->rule == OVER_LENGTH) {
    if (!(squares > 0 && squares <= DBL_MAX)) return;
    factor = rows->magnitude[row] / (sqrt(squares) + rows->eps);
  }
  const quad least = (quad){0} + rows->least, half = (quad){0} + rows->half;
  quad worst = {0}, error = {0}, units = {0}, size = {0}, update = {0}, length = {0};
  quad_bits misrounded = {0};
  for (ptrdiff_t j = 0; j < columns; j += QUAD) {
    quad exact = at(directions + j) * factor;
    if (by_column) exact *= at(rows->by_column + j);
    const quad W = row_value(base, j, columns, base_type);
    const quad gap = row_value(merged, j, columns, merged_type) - exact;
    const quad unit = larger((quad)((quad_bits)exact & EXPONENT_BITS), least);
    /* one over a power of two; both factors are exact */
    const quad distance = absolute(gap) * (quad)(0x7FE0000000000000 - (quad_bits)unit);
    misrounded -= distance > half;
    worst = larger(distance, worst);
    error += gap * gap;
    units += unit * unit;
    size += exact * exact;
    update += (exact - W) * (exact - W);
    length += W * W;
  }
  figures[ERROR] = added(error);
  figures[SIZE] = added(size);
  figures[UPDATE] = added(update);
  figures[LENGTH] = added(length);
  figures[WORST] = largest(worst);
  const ptrdiff_t padded = -columns & (QUAD - 1);
  figures[UNITS] = added(units) - (double)padded * rows->least * rows->least;
  figures[MISROUNDED] =
      (double)((misrounded[0] + misrounded[1]) + (misrounded[2] + misrounded[3]));
  figures[EXCESS] = 0;
  /* not so if any element of either is inf or NaN, or the exact one's square is beyond float64 */
  if (!(figures[ERROR] <= DBL_MAX)) return;
  if (figures[MISROUNDED] > 0) {
    if (!find_excess(rows, row, base, merged, directions, factor, base_type, merged_type, by_column,
                     0, figures + EXCESS))
      return;
    if (rows->column_excess)
      find_excess(rows, row, base, merged, directions, factor, base_type, merged_type, by_column, 1,
                  figures + EXCESS);
  }
  if (rows->column_lengths)
    for (ptrdiff_t j = 0; j < columns; j += QUAD) {
      const quad W = row_value(base, j, columns, base_type);
      const quad sum = at(rows->column_lengths + j) + W * W;
      memcpy(rows->column_lengths + j, &sum, sizeof sum);
    }
  figures[ORDINARY] = 1;
}

ALWAYS void compare_typed(const struct comparison *rows, double *scratch,
                          const enum stored_type base, const enum stored_type merged) {
  const ptrdiff_t wide = in_strips(rows->columns);
  double squares[GROUP];
  for (ptrdiff_t row = 0; row < rows->count;) {
    const int count = rows->count - row >= GROUP ? GROUP : 1;
    if (count == GROUP) make_directions(rows, row, GROUP, base, scratch, squares);
    else make_directions(rows, row, 1, base, scratch, squares);
    for (int i = 0; i < count; i++, row++) {
      const double *directions = scratch + i * wide;
      if (rows->by_column) compare_row(rows, row, directions, squares[i], base, merged, 1);
      else compare_row(rows, row, directions, squares[i], base, merged, 0);
    }
  }
}

/* A loop of its own for every pair of types. */
#define PAIR(base, merged) \
  if (rows->base_type == base && rows->merged_type == merged) \
  return compare_typed(rows, scratch, base, merged)

void compare_rows(const struct comparison *rows, double *scratch) {
  PAIR(BFLOAT16, BFLOAT16);
  PAIR(BFLOAT16, FLOAT16);
  PAIR(BFLOAT16, FLOAT32);
  PAIR(FLOAT16, BFLOAT16);
  PAIR(FLOAT16, FLOAT16);
  PAIR(FLOAT16, FLOAT32);
  PAIR(FLOAT32, BFLOAT16);
  PAIR(FLOAT32, FLOAT16);
  PAIR(FLOAT32, FLOAT32);
}

ALWAYS void add_typed(const struct comparison *rows, double *sums, double *scratch,
                      const enum stored_type type) {
  const ptrdiff_t wide = in_strips(rows->columns);
  double squares[GROUP];
  for (ptrdiff_t row = 0; row < rows->count;) {
    const int count = rows->count - row >= GROUP ? GROUP : 1;
    if (count == GROUP) make_directions(rows, row, GROUP, type, scratch, squares);
    else make_directions(rows, row, 1, type, scratch, squares);
    for (int i = 0; i < count; i++, row++)
      for (ptrdiff_t j = 0; j < wide; j++) sums[j] += scratch[i * wide + j] * scratch[i * wide + j];
  }
}

void add_column_squares(const struct comparison *rows, double *squares, double *scratch) {
  if (rows->base_type == BFLOAT16) add_typed(rows, squares, scratch, BFLOAT16);
  else if (rows->base_type == FLOAT16) add_typed(rows, squares, scratch, FLOAT16);
  else add_typed(rows, squares, scratch, FLOAT32);
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
