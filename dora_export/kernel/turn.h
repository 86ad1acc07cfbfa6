/* Matrices the other way round, as graphs hold weights: see turn.c. */
#ifndef DORA_EXPORT_TURN_H
#define DORA_EXPORT_TURN_H

#include <stddef.h>

struct turning {
  const char *matrix;   /* (rows, columns) */
  char *turned;         /* (columns, rows) */
  ptrdiff_t rows, columns;
  ptrdiff_t stride;        /* bytes from one row of the matrix to the next */
  ptrdiff_t turned_stride; /* the same of turned */
  int itemsize;            /* of an element of turned: 1, 2, 4 or 8 */
};

/* turned becomes the transpose of the matrix. */
void turn(const struct turning *t);

/* Whether turned is the transpose of the matrix, bit for bit; of one of bfloat16, where turned holds
 * floats. */
int is_turned(const struct turning *t, int is_bfloat16);

#endif
