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
  const double *error;     /* most that an element of V is off, per row, or NULL */
  double *factor;          /* out: what each row was multiplied by; NULL with NO_FACTOR */
  uint8_t *undefined;      /* out: 1 where ||V|| is 0 and magnitude is not; NULL unless BY_NORM */
  int32_t *found;          /* out: positions of elements that may be off by half an ulp */
  size_t capacity;         /* of found */
  ptrdiff_t count, columns, rank;
  double eps, column_bound; /* column_bound: largest |by_column|, 1 without */
  enum factor_mode mode;
};

struct outcome {
  size_t found;  /* elements that may be off; only the first `capacity` are listed */
  int nonfinite; /* whether any result is inf or NaN */
};

/* Packs a right factor (rank, columns) for merge_rows: (ceil(columns / PANEL), rank, PANEL) floats. */
void pack_panels(const float *right, float *panels, ptrdiff_t rank, ptrdiff_t columns);

/* scratch: merge_scratch(columns) floats. */
size_t merge_scratch(ptrdiff_t columns);
struct outcome merge_rows(const struct rows *rows, float *scratch);

#endif
