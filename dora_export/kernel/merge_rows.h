/* The merge of bfloat16 rows, one pass over memory: see merge_rows.c. */
#ifndef DORA_EXPORT_MERGE_ROWS_H
#define DORA_EXPORT_MERGE_ROWS_H

#include <stddef.h>
#include <stdint.h>

enum { PANEL = 16 }; /* columns that lie together in a packed right factor */

/* What becomes of a row of V = W + left @ right. */
enum factor_mode {
  NO_FACTOR = 0, /* V */
  BY_NORM = 1,   /* magnitude / (||V|| + eps) * V */
  GIVEN = 2      /* magnitude * V */
};

struct rows {
  const uint16_t *stored; /* W, bfloat16, (count, columns) */
  uint16_t *out;          /* the result, bfloat16, (count, columns) */
  const float *left;      /* (count, rank), scaling included */
  const float *panels;    /* right factor, packed */
  const float *by_column;  /* factor on each column, packed as a right factor of rank 1; or NULL */
  const double *magnitude; /* per row, or NULL */
  const double *error;     /* most that an element of V is off in float32, per row */
  const double *exact_left;  /* (count, rank), as exactly as it is stored, scaling included */
  const double *exact_right; /* (rank, columns); NULL: panels are exact */
  const double *exact_by_column; /* as by_column, not packed; or NULL */
  uint8_t *undefined;      /* out: 1 where ||V|| and eps are 0, magnitude not; 2 where float32
                              has not the range for ||V||; NULL unless BY_NORM */
  ptrdiff_t count, columns, rank;
  double eps, column_bound; /* column_bound: largest |by_column|, 1 without */
  enum factor_mode mode;
};

struct outcome {
  ptrdiff_t again; /* elements computed again in float64 */
  int nonfinite;   /* whether any result is inf or NaN */
};

/* Packs a right factor (rank, columns) for merge_rows: (ceil(columns / PANEL), rank, PANEL) floats. */
void pack_panels(const float *right, float *panels, ptrdiff_t rank, ptrdiff_t columns);

/* scratch: merge_scratch(columns) floats. */
size_t merge_scratch(ptrdiff_t columns);
struct outcome merge_rows(const struct rows *rows, float *scratch);

#endif
