/* Matrices the other way round, as graphs hold weights: see turn.c. */
#ifndef DORA_EXPORT_TURN_H
#define DORA_EXPORT_TURN_H

#include <stddef.h>

/* out (columns, rows) becomes the transpose of in (rows, columns); itemsize 1, 2, 4 or 8. */
void turn(const void *in, void *out, ptrdiff_t rows, ptrdiff_t columns, int itemsize);

/* Whether turned (columns, rows) is the transpose of matrix (rows, columns), bit for bit. */
int is_turned(const void *matrix, const void *turned, ptrdiff_t rows, ptrdiff_t columns,
              int itemsize);

#endif
