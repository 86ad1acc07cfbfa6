/* dora_export._oracle: compare_rows.c for Python, over buffers checked here. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "compare_rows.h"

static int usable(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

static int holds(const Py_buffer *buffer, Py_ssize_t items, Py_ssize_t itemsize) {
  return buffer->len == items * itemsize;
}

static Py_ssize_t itemsize(int type) { return type == FLOAT32 ? 4 : 2; }

static Py_ssize_t in_strips(Py_ssize_t columns) { return (columns + STRIP - 1) / STRIP * STRIP; }

static double *scratch_for(Py_ssize_t columns) {
  double *scratch = PyMem_RawMalloc(comparison_scratch(columns) * sizeof *scratch);
  if (scratch == NULL) PyErr_NoMemory();
  return scratch;
}

PyDoc_STRVAR(compare_doc,
             "compare(types, rule, columns, rank, scalars, base, merged, left, right, right_sizes,\n"
             "        magnitude, by_column, figures, column_excess, column_lengths)\n\n"
             "Hold stored rows against the exact result; see compare_rows.h. types: (base, merged);\n"
             "scalars: (eps, least, half, step, floor). Empty buffers stand for none.");

static PyObject *compare(PyObject *Py_UNUSED(module), PyObject *args) {
  enum { BASE, MERGED, LEFT, RIGHT, RIGHT_SIZES, MAGNITUDE, BY_COLUMN, FOUND, COLUMN_EXCESS,
         COLUMN_LENGTHS, BUFFERS };
  Py_buffer b[BUFFERS] = {{0}};
  int base_type, merged_type, rule;
  Py_ssize_t columns, rank;
  struct comparison rows = {0};
  if (!PyArg_ParseTuple(args, "(ii)inn(ddddd)" "y*y*y*y*y*y*y*w*w*w*", &base_type, &merged_type,
                        &rule, &columns, &rank, &rows.eps, &rows.least, &rows.half, &rows.step,
                        &rows.floor, &b[BASE], &b[MERGED], &b[LEFT], &b[RIGHT], &b[RIGHT_SIZES],
                        &b[MAGNITUDE], &b[BY_COLUMN], &b[FOUND], &b[COLUMN_EXCESS],
                        &b[COLUMN_LENGTHS]))
    return NULL;
  PyObject *result = NULL;
  const int known = columns > 0 && rank >= 0 && base_type >= BFLOAT16 && base_type <= FLOAT32 &&
                    merged_type >= BFLOAT16 && merged_type <= FLOAT32 && rule >= AS_IT_IS &&
                    rule <= BY_MAGNITUDE;
  const Py_ssize_t count = known ? b[BASE].len / (columns * itemsize(base_type)) : 0;
  const Py_ssize_t wide = known ? in_strips(columns) : 0, word = sizeof(double);
  const Py_ssize_t per_column = b[COLUMN_EXCESS].len ? wide : 0;
  if (!known || !holds(&b[BASE], count * columns, itemsize(base_type)) ||
      !holds(&b[MERGED], count * columns, itemsize(merged_type)) ||
      !holds(&b[LEFT], count * rank, word) || !holds(&b[RIGHT], wide * rank, word) ||
      !holds(&b[RIGHT_SIZES], wide, word) ||
      !holds(&b[MAGNITUDE], rule == AS_IT_IS ? 0 : count, word) ||
      !holds(&b[BY_COLUMN], b[BY_COLUMN].len ? wide : 0, word) ||
      !holds(&b[FOUND], count * FIGURES, word) || !holds(&b[COLUMN_EXCESS], per_column, word) ||
      !holds(&b[COLUMN_LENGTHS], per_column, word)) {
    PyErr_Format(PyExc_ValueError, "compare: buffers do not fit %zd rows of %zd columns", count,
                 columns);
    goto done;
  }
  double *scratch = scratch_for(columns);
  if (scratch == NULL) goto done;
  rows.base = b[BASE].buf, rows.merged = b[MERGED].buf;
  rows.base_type = (enum stored_type)base_type, rows.merged_type = (enum stored_type)merged_type;
  rows.count = count, rows.columns = columns, rows.rank = rank;
  rows.left = b[LEFT].buf, rows.right = b[RIGHT].buf, rows.right_sizes = b[RIGHT_SIZES].buf;
  rows.magnitude = b[MAGNITUDE].buf;
  rows.by_column = b[BY_COLUMN].len ? b[BY_COLUMN].buf : NULL;
  rows.rule = (enum row_rule)rule;
  rows.figures = b[FOUND].buf;
  rows.column_excess = per_column ? b[COLUMN_EXCESS].buf : NULL;
  rows.column_lengths = per_column ? b[COLUMN_LENGTHS].buf : NULL;
  Py_BEGIN_ALLOW_THREADS
  compare_rows(&rows, scratch);
  Py_END_ALLOW_THREADS
  PyMem_RawFree(scratch);
  result = Py_NewRef(Py_None);
done:
  for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(&b[i]);
  return result;
}

PyDoc_STRVAR(squares_doc,
             "add_column_squares(type, columns, rank, base, left, right, squares)\n\n"
             "Add the squares of W + left @ right to sums per column.");

static PyObject *column_squares(PyObject *Py_UNUSED(module), PyObject *args) {
  enum { BASE, LEFT, RIGHT, SQUARES, BUFFERS };
  Py_buffer b[BUFFERS] = {{0}};
  int type;
  Py_ssize_t columns, rank;
  if (!PyArg_ParseTuple(args, "inn" "y*y*y*w*", &type, &columns, &rank, &b[BASE], &b[LEFT],
                        &b[RIGHT], &b[SQUARES]))
    return NULL;
  PyObject *result = NULL;
  const int known = columns > 0 && rank >= 0 && type >= BFLOAT16 && type <= FLOAT32;
  const Py_ssize_t count = known ? b[BASE].len / (columns * itemsize(type)) : 0;
  const Py_ssize_t wide = known ? in_strips(columns) : 0, word = sizeof(double);
  if (!known || !holds(&b[BASE], count * columns, itemsize(type)) ||
      !holds(&b[LEFT], count * rank, word) || !holds(&b[RIGHT], wide * rank, word) ||
      !holds(&b[SQUARES], wide, word)) {
    PyErr_Format(PyExc_ValueError, "add_column_squares: buffers do not fit %zd rows of %zd columns",
                 count, columns);
    goto done;
  }
  double *scratch = scratch_for(columns);
  if (scratch == NULL) goto done;
  const struct comparison rows = {.base = b[BASE].buf,
                                  .base_type = (enum stored_type)type,
                                  .count = count,
                                  .columns = columns,
                                  .rank = rank,
                                  .left = b[LEFT].buf,
                                  .right = b[RIGHT].buf};
  Py_BEGIN_ALLOW_THREADS
  add_column_squares(&rows, b[SQUARES].buf, scratch);
  Py_END_ALLOW_THREADS
  PyMem_RawFree(scratch);
  result = Py_NewRef(Py_None);
done:
  for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(&b[i]);
  return result;
}

static PyMethodDef methods[] = {
    {"compare", compare, METH_VARARGS, compare_doc},
    {"add_column_squares", column_squares, METH_VARARGS, squares_doc},
    {NULL, NULL, 0, NULL}};

/* As compiled.NAME: a build that lies beside newer sources must not be taken for one of them. */
static int fill(PyObject *module) {
  if (PyModule_AddStringConstant(module, "name", "compare_rows 1")) return -1;
  return PyModule_AddObject(module, "usable", PyBool_FromLong(usable()));
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_oracle", "Stored rows against the exact result.", 0, methods, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__oracle(void) { return PyModuleDef_Init(&definition); }
