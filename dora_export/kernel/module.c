/* dora_export._kernel: merge_rows.c, merge_wide.c, turn.c, sha256.c for Python; buffers checked here. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "merge_rows.h"
#include "merge_wide.h"
#include "sha256.h"
#include "turn.h"

static int usable(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

/* Whether a buffer holds exactly this many items; an empty one may stand for "none". */
static int holds(const Py_buffer *buffer, Py_ssize_t items, Py_ssize_t itemsize, int optional) {
  return buffer->len == items * itemsize || (optional && buffer->len == 0);
}

PyDoc_STRVAR(pack_doc, "pack(right, panels, rank, columns)\n\nPack a float32 right factor.");

static PyObject *pack(PyObject *Py_UNUSED(module), PyObject *args) {
  Py_buffer right, panels;
  Py_ssize_t rank, columns;
  if (!PyArg_ParseTuple(args, "y*w*nn", &right, &panels, &rank, &columns)) return NULL;
  const Py_ssize_t packed = (columns + PANEL - 1) / PANEL * PANEL;
  const int fits = rank >= 0 && columns > 0 && holds(&right, rank * columns, sizeof(float), 0) &&
                   holds(&panels, rank * packed, sizeof(float), 0);
  if (fits) pack_panels(right.buf, panels.buf, rank, columns);
  PyBuffer_Release(&right);
  PyBuffer_Release(&panels);
  if (!fits) return PyErr_Format(PyExc_ValueError, "pack: buffers do not fit the shape");
  Py_RETURN_NONE;
}

PyDoc_STRVAR(merge_doc,
             "merge(mode, columns, rank, eps, column_bound, stored, out, left, panels, by_column,\n"
             "      magnitude, error, exact_left, exact_right, exact_by_column, undefined)\n"
             "-> (again, nonfinite)\n\n"
             "Merge bfloat16 rows; see merge_rows.h. Empty buffers stand for none.");

static PyObject *merge(PyObject *Py_UNUSED(module), PyObject *args) {
  enum { STORED, OUT, LEFT, PANELS, BY_COLUMN, MAGNITUDE, ERRORS, EXACT_LEFT, EXACT_RIGHT,
         EXACT_BY_COLUMN, UNDEFINED, BUFFERS };
  Py_buffer b[BUFFERS] = {{0}};
  int mode;
  Py_ssize_t columns, rank;
  double eps, bound;
  if (!PyArg_ParseTuple(args, "inndd" "y*w*y*y*y*y*y*y*y*y*w*", &mode, &columns, &rank, &eps, &bound,
                        &b[STORED], &b[OUT], &b[LEFT], &b[PANELS], &b[BY_COLUMN], &b[MAGNITUDE],
                        &b[ERRORS], &b[EXACT_LEFT], &b[EXACT_RIGHT], &b[EXACT_BY_COLUMN],
                        &b[UNDEFINED]))
    return NULL;
  PyObject *result = NULL;
  const Py_ssize_t row_bytes = columns * (Py_ssize_t)sizeof(uint16_t);
  const Py_ssize_t count = columns > 0 ? b[STORED].len / row_bytes : 0;
  const Py_ssize_t packed = (columns + PANEL - 1) / PANEL * PANEL;
  const int scaled = mode != NO_FACTOR;
  if (columns <= 0 || rank < 0 || mode < NO_FACTOR || mode > GIVEN ||
      !holds(&b[STORED], count, row_bytes, 0) || !holds(&b[OUT], count, row_bytes, 0) ||
      !holds(&b[LEFT], count * rank, sizeof(float), 0) ||
      !holds(&b[PANELS], packed * rank, sizeof(float), 0) ||
      !holds(&b[BY_COLUMN], packed, sizeof(float), 1) ||
      !holds(&b[MAGNITUDE], scaled ? count : 0, sizeof(double), 0) ||
      !holds(&b[ERRORS], count, sizeof(double), 0) ||
      !holds(&b[EXACT_LEFT], count * rank, sizeof(double), 0) ||
      !holds(&b[EXACT_RIGHT], rank * columns, sizeof(double), 1) ||
      !holds(&b[EXACT_BY_COLUMN], b[BY_COLUMN].len ? columns : 0, sizeof(double), 0) ||
      !holds(&b[UNDEFINED], mode == BY_NORM ? count : 0, 1, 0)) {
    PyErr_Format(PyExc_ValueError, "merge: buffers do not fit %zd rows of %zd columns", count,
                 columns);
    goto done;
  }
  float *scratch = PyMem_RawMalloc(merge_scratch(columns) * sizeof *scratch);
  if (scratch == NULL) {
    PyErr_NoMemory();
    goto done;
  }
  const struct rows rows = {
      .stored = b[STORED].buf,
      .out = b[OUT].buf,
      .left = b[LEFT].buf,
      .panels = b[PANELS].buf,
      .by_column = b[BY_COLUMN].len ? b[BY_COLUMN].buf : NULL,
      .magnitude = b[MAGNITUDE].buf,
      .error = b[ERRORS].buf,
      .exact_left = b[EXACT_LEFT].buf,
      .exact_right = b[EXACT_RIGHT].len ? b[EXACT_RIGHT].buf : NULL,
      .exact_by_column = b[EXACT_BY_COLUMN].len ? b[EXACT_BY_COLUMN].buf : NULL,
      .undefined = b[UNDEFINED].buf,
      .count = count,
      .columns = columns,
      .rank = rank,
      .eps = eps,
      .column_bound = bound,
      .mode = (enum factor_mode)mode,
  };
  struct outcome outcome;
  Py_BEGIN_ALLOW_THREADS
  outcome = merge_rows(&rows, scratch);
  Py_END_ALLOW_THREADS
  PyMem_RawFree(scratch);
  result = Py_BuildValue("nO", (Py_ssize_t)outcome.again, outcome.nonfinite ? Py_True : Py_False);
done:
  for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(&b[i]);
  return result;
}

PyDoc_STRVAR(pack_wide_doc, "pack_wide(right, panels, rank, columns)\n\nPack a float64 right factor.");

static PyObject *pack_wide_factor(PyObject *Py_UNUSED(module), PyObject *args) {
  Py_buffer right, panels;
  Py_ssize_t rank, columns;
  if (!PyArg_ParseTuple(args, "y*w*nn", &right, &panels, &rank, &columns)) return NULL;
  const Py_ssize_t packed = (columns + WIDE_PANEL - 1) / WIDE_PANEL * WIDE_PANEL;
  const int fits = rank >= 0 && columns > 0 && holds(&right, rank * columns, sizeof(double), 0) &&
                   holds(&panels, rank * packed, sizeof(double), 0);
  if (fits) pack_wide(right.buf, panels.buf, rank, columns);
  PyBuffer_Release(&right);
  PyBuffer_Release(&panels);
  if (!fits) return PyErr_Format(PyExc_ValueError, "pack_wide: buffers do not fit the shape");
  Py_RETURN_NONE;
}

PyDoc_STRVAR(wide_doc,
             "merge_wide(mode, columns, rank, eps, itemsize, stored, out, left, panels, by_column,\n"
             "           magnitude, undefined) -> nonfinite\n\n"
             "Merge rows into float32; see merge_wide.h. Empty buffers stand for none.");

static PyObject *wide(PyObject *Py_UNUSED(module), PyObject *args) {
  enum { STORED, OUT, LEFT, PANELS, BY_COLUMN, MAGNITUDE, UNDEFINED, BUFFERS };
  Py_buffer b[BUFFERS] = {{0}};
  int mode, itemsize;
  Py_ssize_t columns, rank;
  double eps;
  if (!PyArg_ParseTuple(args, "inndi" "y*w*y*y*y*y*w*", &mode, &columns, &rank, &eps, &itemsize,
                        &b[STORED], &b[OUT], &b[LEFT], &b[PANELS], &b[BY_COLUMN], &b[MAGNITUDE],
                        &b[UNDEFINED]))
    return NULL;
  PyObject *result = NULL;
  const int known = columns > 0 && (itemsize == 2 || itemsize == 4);
  const Py_ssize_t count = known ? b[STORED].len / (columns * itemsize) : 0;
  const Py_ssize_t packed = (columns + WIDE_PANEL - 1) / WIDE_PANEL * WIDE_PANEL;
  if (!known || rank < 0 || mode < NO_FACTOR || mode > GIVEN ||
      !holds(&b[STORED], count * columns, itemsize, 0) ||
      !holds(&b[OUT], count * columns, sizeof(float), 0) ||
      !holds(&b[LEFT], count * rank, sizeof(double), 0) ||
      !holds(&b[PANELS], packed * rank, sizeof(double), 0) ||
      !holds(&b[BY_COLUMN], packed, sizeof(double), 1) ||
      !holds(&b[MAGNITUDE], mode != NO_FACTOR ? count : 0, sizeof(double), 0) ||
      !holds(&b[UNDEFINED], mode == BY_NORM ? count : 0, 1, 0)) {
    PyErr_Format(PyExc_ValueError, "merge_wide: buffers do not fit %zd rows of %zd columns", count,
                 columns);
    goto done;
  }
  double *scratch = PyMem_RawMalloc(wide_scratch(columns) * sizeof *scratch);
  if (scratch == NULL) {
    PyErr_NoMemory();
    goto done;
  }
  const struct wide_rows rows = {
      .stored = b[STORED].buf,
      .out = b[OUT].buf,
      .left = b[LEFT].buf,
      .panels = b[PANELS].buf,
      .by_column = b[BY_COLUMN].len ? b[BY_COLUMN].buf : NULL,
      .magnitude = b[MAGNITUDE].buf,
      .undefined = b[UNDEFINED].buf,
      .count = count,
      .columns = columns,
      .rank = rank,
      .eps = eps,
      .itemsize = itemsize,
      .mode = (enum factor_mode)mode,
  };
  int nonfinite;
  Py_BEGIN_ALLOW_THREADS
  nonfinite = merge_wide(&rows, scratch);
  Py_END_ALLOW_THREADS
  PyMem_RawFree(scratch);
  result = PyBool_FromLong(nonfinite);
done:
  for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(&b[i]);
  return result;
}

PyDoc_STRVAR(turn_doc,
             "turn(matrix, out, rows, columns, itemsize, first, stride)\n\n"
             "Transpose a matrix into out, from byte first on, rows stride bytes apart.");
PyDoc_STRVAR(is_turned_doc,
             "is_turned(matrix, turned, rows, columns, itemsize, first, stride, bfloat16) -> bool\n\n"
             "Whether a matrix, from byte first on, rows stride bytes apart, is the other's transpose,\n"
             "bit for bit; bfloat16: whether it is once its values are widened to float32.");

/* Whether rows of so many bytes, stride apart, lie within a buffer and not in each other. */
static int reaches(const Py_buffer *buffer, Py_ssize_t first, Py_ssize_t stride, Py_ssize_t count,
                   Py_ssize_t nbytes) {
  if (first < 0 || count < 0 || nbytes < 0 || stride < nbytes) return 0;
  if (count == 0 || nbytes == 0) return 1;
  return first <= buffer->len - nbytes && (count - 1) <= (buffer->len - nbytes - first) / stride;
}

static int has_size(int itemsize) {
  return itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8;
}

static PyObject *turn_matrix(PyObject *Py_UNUSED(module), PyObject *args) {
  Py_buffer in, out;
  Py_ssize_t rows, columns, first, stride;
  int itemsize;
  if (!PyArg_ParseTuple(args, "y*w*nninn", &in, &out, &rows, &columns, &itemsize, &first, &stride))
    return NULL;
  const int fits = has_size(itemsize) && rows >= 0 && columns >= 0 &&
                   holds(&in, rows * columns, itemsize, 0) &&
                   reaches(&out, first, stride, columns, rows * itemsize);
  if (fits) {
    const struct turning turning = {.matrix = in.buf, .turned = (char *)out.buf + first,
                                    .rows = rows, .columns = columns, .stride = columns * itemsize,
                                    .turned_stride = stride, .itemsize = itemsize};
    Py_BEGIN_ALLOW_THREADS
    turn(&turning);
    Py_END_ALLOW_THREADS
  }
  PyBuffer_Release(&in);
  PyBuffer_Release(&out);
  if (!fits) return PyErr_Format(PyExc_ValueError, "turn: buffers do not fit the shape");
  Py_RETURN_NONE;
}

static PyObject *compare_turned(PyObject *Py_UNUSED(module), PyObject *args) {
  Py_buffer in, other;
  Py_ssize_t rows, columns, first, stride;
  int itemsize, is_bfloat16, same = 0;
  if (!PyArg_ParseTuple(args, "y*y*nninnp", &in, &other, &rows, &columns, &itemsize, &first, &stride,
                        &is_bfloat16))
    return NULL;
  const int stored = is_bfloat16 ? 2 : itemsize;
  const int fits = has_size(itemsize) && (!is_bfloat16 || itemsize == 4) && rows >= 0 &&
                   columns >= 0 && holds(&other, rows * columns, itemsize, 0) &&
                   reaches(&in, first, stride, rows, columns * stored);
  if (fits) {
    const struct turning turning = {.matrix = (char *)in.buf + first, .turned = other.buf,
                                    .rows = rows, .columns = columns, .stride = stride,
                                    .turned_stride = rows * itemsize, .itemsize = itemsize};
    Py_BEGIN_ALLOW_THREADS
    same = is_turned(&turning, is_bfloat16);
    Py_END_ALLOW_THREADS
  }
  PyBuffer_Release(&in);
  PyBuffer_Release(&other);
  if (!fits) return PyErr_Format(PyExc_ValueError, "is_turned: buffers do not fit the shape");
  return PyBool_FromLong(same);
}

PyDoc_STRVAR(sha256_doc,
             "sha256_two(state, blocks, other_state, other_blocks)\n\n"
             "Take blocks of 64 bytes of two messages into their states, each eight uint32.");

static PyObject *two_digests(PyObject *Py_UNUSED(module), PyObject *args) {
  enum { STATE, BLOCKS, OTHER_STATE, OTHER_BLOCKS, BUFFERS, BLOCK = 64 };
  Py_buffer b[BUFFERS] = {{0}};
  if (!PyArg_ParseTuple(args, "w*y*w*y*", &b[STATE], &b[BLOCKS], &b[OTHER_STATE], &b[OTHER_BLOCKS]))
    return NULL;
  uint32_t *states[2] = {b[STATE].buf, b[OTHER_STATE].buf};
  const uint8_t *blocks[2] = {b[BLOCKS].buf, b[OTHER_BLOCKS].buf};
  const ptrdiff_t counts[2] = {b[BLOCKS].len / BLOCK, b[OTHER_BLOCKS].len / BLOCK};
  const int fits = sha256_usable() && states[0] != states[1] && holds(&b[STATE], 8, 4, 0) &&
                   holds(&b[OTHER_STATE], 8, 4, 0) && holds(&b[BLOCKS], counts[0], BLOCK, 0) &&
                   holds(&b[OTHER_BLOCKS], counts[1], BLOCK, 0);
  if (fits) {
    Py_BEGIN_ALLOW_THREADS
    sha256_two(states, blocks, counts);
    Py_END_ALLOW_THREADS
  }
  for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(&b[i]);
  if (!fits) return PyErr_Format(PyExc_ValueError, "sha256_two: no two states and whole blocks");
  Py_RETURN_NONE;
}

#if !defined(_WIN32)
/* Reads or writes rows of bytes, equally far apart in a file; returns how many are complete: all, but
 * where the file ends. */
static PyObject *transfer(PyObject *args, int writing) {
  Py_buffer rows;
  int descriptor;
  Py_ssize_t offset, stride, length;
  if (!PyArg_ParseTuple(args, writing ? "innny*" : "innnw*", &descriptor, &offset, &stride, &length,
                        &rows))
    return NULL;
  if (offset < 0 || stride < 0 || length <= 0 || rows.len % length) {
    PyBuffer_Release(&rows);
    return PyErr_Format(PyExc_ValueError, "rows of %zd bytes do not fit the buffer", length);
  }
  const Py_ssize_t count = rows.len / length;
  Py_ssize_t row = 0;
  int code = 0;
  Py_BEGIN_ALLOW_THREADS
  for (; row < count && code == 0; row++) {
    char *at = (char *)rows.buf + row * length;
    const off_t place = (off_t)offset + (off_t)row * stride;
    Py_ssize_t done = 0;
    while (done < length && code == 0) {
      const size_t left = (size_t)(length - done);
      const ssize_t got = writing ? pwrite(descriptor, at + done, left, place + done)
                                  : pread(descriptor, at + done, left, place + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) code = errno;
      else if (got == 0 && writing) code = EIO; /* neither an error nor progress */
      else if (got == 0) break;
      else done += got;
    }
    if (done < length) break;
  }
  Py_END_ALLOW_THREADS
  PyBuffer_Release(&rows);
  if (code) {
    errno = code;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyLong_FromSsize_t(row);
}

PyDoc_STRVAR(read_doc, "read_rows(descriptor, offset, stride, length, out) -> complete rows");
PyDoc_STRVAR(write_doc, "write_rows(descriptor, offset, stride, length, rows) -> complete rows");

static PyObject *read_rows(PyObject *Py_UNUSED(module), PyObject *args) {
  return transfer(args, 0);
}

static PyObject *write_rows(PyObject *Py_UNUSED(module), PyObject *args) {
  return transfer(args, 1);
}
#endif

static PyMethodDef methods[] = {{"pack", pack, METH_VARARGS, pack_doc},
                                {"merge", merge, METH_VARARGS, merge_doc},
                                {"pack_wide", pack_wide_factor, METH_VARARGS, pack_wide_doc},
                                {"merge_wide", wide, METH_VARARGS, wide_doc},
                                {"turn", turn_matrix, METH_VARARGS, turn_doc},
                                {"is_turned", compare_turned, METH_VARARGS, is_turned_doc},
                                {"sha256_two", two_digests, METH_VARARGS, sha256_doc},
#if !defined(_WIN32)
                                {"read_rows", read_rows, METH_VARARGS, read_doc},
                                {"write_rows", write_rows, METH_VARARGS, write_doc},
#endif
                                {NULL, NULL, 0, NULL}};

/* As fused.NAME: a build that lies beside newer sources must not be taken for one of them. */
static int fill(PyObject *module) {
  if (PyModule_AddStringConstant(module, "name", "merge_rows 1, merge_wide 1, turn 3, sha256 1")) return -1;
  if (PyModule_AddObject(module, "hashes", PyBool_FromLong(sha256_usable()))) return -1;
  return PyModule_AddObject(module, "usable", PyBool_FromLong(usable()));
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "The fused merge of bfloat16 rows.", 0, methods, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
