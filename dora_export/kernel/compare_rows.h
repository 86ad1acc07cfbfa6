/* Stored rows against the exact result in float64: see compare_rows.c. */
#ifndef DORA_EXPORT_COMPARE_ROWS_H
#define DORA_EXPORT_COMPARE_ROWS_H

#include <stddef.h>

enum { STRIP = 8 }; /* columns that lie together in a packed right factor */

enum stored_type { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2 };

/* What the exact result multiplies a row of V = W + left @ right by. */
enum row_rule {
  AS_IT_IS = 0,     /* 1 */
  OVER_LENGTH = 1,  /* magnitude / (||V|| + eps) */
  BY_MAGNITUDE = 2  /* magnitude */
};

/* What is found out about a row, in this order. */
enum figure {
  ORDINARY,   /* 1; 0: a case for numpy, and nothing else is said */
  EXCESS,     /* most that an element is off beyond one rounding, in units of its terms' size */
  MISROUNDED, /* elements further off than half a step */
  WORST,      /* largest distance over the exact value's power of two */
  ERROR,      /* sums of squares: of the distances, */
  UNITS,      /* of the exact values' powers of two, */
  SIZE,       /* of the exact values, */
  UPDATE,     /* of what they differ from the base by, */
  LENGTH,     /* of the base */
  FIGURES
};

/* Arrays per column are as long as the columns in whole strips; so are those of a packed factor. */
struct comparison {
  const void *base, *merged; /* (count, columns), as stored */
  enum stored_type base_type, merged_type;
  ptrdiff_t count, columns, rank;
  const double *left;        /* (count, rank), scaling included */
  const double *right;       /* (strips, rank, STRIP) */
  const double *right_sizes; /* ||A_j||, per column */
  const double *magnitude;   /* per row, or NULL */
  const double *by_column;   /* factor on each column, or NULL */
  double eps;
  double least;  /* smallest power of two that the stored type's steps shrink with */
  double half;   /* of a power of two: the distance of what is correctly rounded, at most */
  double step;   /* of a power of two: half a step */
  double floor;  /* size of terms below which their error shrinks no further */
  enum row_rule rule;
  double *figures;        /* out: (count, FIGURES) */
  double *column_excess;  /* in and out: EXCESS per column instead of per row; or NULL */
  double *column_lengths; /* in and out: LENGTH per column, with column_excess */
};

/* scratch: comparison_scratch(columns) doubles. */
size_t comparison_scratch(ptrdiff_t columns);
void compare_rows(const struct comparison *rows, double *scratch);

/* Adds the squares of V to `squares`, one sum per column; of `rows` only what makes V is read. */
void add_column_squares(const struct comparison *rows, double *squares, double *scratch);

#endif
