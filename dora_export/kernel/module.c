/* dora_export._kernel: merge_rows.c for Python, over buffers whose sizes are checked here. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "merge_rows.h"

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

static PyMethodDef methods[] = {{"pack", pack, METH_VARARGS, pack_doc},
                                {"merge", merge, METH_VARARGS, merge_doc},
                                {NULL, NULL, 0, NULL}};

static int fill(PyObject *module) {
  return PyModule_AddObject(module, "usable", PyBool_FromLong(usable()));
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "The fused merge of bfloat16 rows.", 0, methods, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
