/* Matrices turned, or held against turned ones, in squares whose lines all stay in the first cache. */
#include "turn.h"

#include <stdint.h>
#include <string.h>

enum { SQUARE = 16 };

#define SQUARES(type)                                                                          \
  static void turn_##type(const type *in, type *out, ptrdiff_t rows, ptrdiff_t columns) {      \
    for (ptrdiff_t row = 0; row < rows; row += SQUARE) {                                       \
      const ptrdiff_t height = rows - row < SQUARE ? rows - row : SQUARE;                      \
      for (ptrdiff_t column = 0; column < columns; column += SQUARE) {                         \
        const ptrdiff_t width = columns - column < SQUARE ? columns - column : SQUARE;         \
        type block[SQUARE][SQUARE];                                                            \
        if (height == SQUARE && width == SQUARE) {                                             \
          for (int i = 0; i < SQUARE; i++)                                                     \
            memcpy(block[i], in + (row + i) * columns + column, sizeof block[i]);              \
          for (int j = 0; j < SQUARE; j++) {                                                   \
            type *to = out + (column + j) * rows + row;                                        \
            for (int i = 0; i < SQUARE; i++) to[i] = block[i][j];                              \
          }                                                                                    \
          continue;                                                                            \
        }                                                                                      \
        for (ptrdiff_t j = column; j < column + width; j++)                                    \
          for (ptrdiff_t i = row; i < row + height; i++) out[j * rows + i] = in[i * columns + j]; \
      }                                                                                        \
    }                                                                                          \
  }                                                                                            \
                                                                                               \
  static int is_turned_##type(const type *matrix, const type *turned, ptrdiff_t rows,          \
                              ptrdiff_t columns) {                                             \
    for (ptrdiff_t row = 0; row < rows; row += SQUARE) {                                       \
      const ptrdiff_t height = rows - row < SQUARE ? rows - row : SQUARE;                      \
      for (ptrdiff_t column = 0; column < columns; column += SQUARE) {                         \
        const ptrdiff_t width = columns - column < SQUARE ? columns - column : SQUARE;         \
        type block[SQUARE][SQUARE], differing = 0;                                             \
        if (height == SQUARE && width == SQUARE) {                                             \
          for (int i = 0; i < SQUARE; i++)                                                     \
            memcpy(block[i], matrix + (row + i) * columns + column, sizeof block[i]);          \
          for (int j = 0; j < SQUARE; j++) {                                                   \
            const type *at = turned + (column + j) * rows + row;                               \
            for (int i = 0; i < SQUARE; i++) differing |= (type)(at[i] ^ block[i][j]);         \
          }                                                                                    \
        } else {                                                                               \
          for (ptrdiff_t j = column; j < column + width; j++)                                  \
            for (ptrdiff_t i = row; i < row + height; i++)                                     \
              differing |= (type)(turned[j * rows + i] ^ matrix[i * columns + j]);             \
        }                                                                                      \
        if (differing) return 0;                                                               \
      }                                                                                        \
    }                                                                                          \
    return 1;                                                                                  \
  }

SQUARES(uint8_t)
SQUARES(uint16_t)
SQUARES(uint32_t)
SQUARES(uint64_t)

void turn(const void *in, void *out, ptrdiff_t rows, ptrdiff_t columns, int itemsize) {
  if (itemsize == 1) turn_uint8_t(in, out, rows, columns);
  else if (itemsize == 2) turn_uint16_t(in, out, rows, columns);
  else if (itemsize == 4) turn_uint32_t(in, out, rows, columns);
  else turn_uint64_t(in, out, rows, columns);
}

int is_turned(const void *matrix, const void *turned, ptrdiff_t rows, ptrdiff_t columns,
              int itemsize) {
  if (itemsize == 1) return is_turned_uint8_t(matrix, turned, rows, columns);
  if (itemsize == 2) return is_turned_uint16_t(matrix, turned, rows, columns);
  if (itemsize == 4) return is_turned_uint32_t(matrix, turned, rows, columns);
  return is_turned_uint64_t(matrix, turned, rows, columns);
}
