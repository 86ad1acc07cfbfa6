/* The merge of rows into float32: see merge_wide.c. */
#ifndef DORA_EXPORT_MERGE_WIDE_H
#define DORA_EXPORT_MERGE_WIDE_H

#include <stddef.h>
#include <stdint.h>

#include "merge_rows.h"

enum { WIDE_PANEL = 8 }; /* columns that lie together in a packed right factor of float64 */

struct wide_rows {
  const void *stored;      /* W, bfloat16 or float32, (count, columns) */
  float *out;              /* the result, (count, columns) */
  const double *left;      /* (count, rank), scaling included */
  const double *panels;    /* right factor, packed */
  const double *by_column; /* factor on each column, packed as a right factor of rank 1; or NULL */
  const double *magnitude; /* per row, or NULL */
  uint8_t *undefined;      /* out: 1 where ||V|| and eps are 0, magnitude not; NULL unless BY_NORM */
  ptrdiff_t count, columns, rank;
  double eps;
  int itemsize; /* of W: 2 is bfloat16, 4 is float32 */
  enum factor_mode mode;
};

/* Packs a right factor (rank, columns): (ceil(columns / WIDE_PANEL), rank, WIDE_PANEL) doubles. */
void pack_wide(const double *right, double *panels, ptrdiff_t rank, ptrdiff_t columns);

/* scratch: wide_scratch(columns) doubles. Returns whether any result is inf or NaN. */
size_t wide_scratch(ptrdiff_t columns);
int merge_wide(const struct wide_rows *rows, double *scratch);

#endif
