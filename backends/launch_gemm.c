/* What a GEMM by cuBLASLt takes, in one call from Python.

   ctypes takes 6 us for the arguments of cublasLtMatmul, as long as cuBLASLt takes to launch. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

typedef int (*set_attribute_t)(void *desc, int attribute, const void *value, size_t size);
typedef int (*matmul_t)(void *handle, void *desc, const void *alpha, const void *a, void *a_layout,
                        const void *b, void *b_layout, const void *beta, const void *c,
                        void *c_layout, void *d, void *d_layout, const void *algorithm,
                        void *workspace, size_t workspace_bytes, void *stream);

/* _Launch of cublaslt.py */
typedef struct {
    set_attribute_t set_attribute;
    matmul_t matmul;
    void *handle, *desc, *a_layout, *b_layout, *out_layout;
    size_t workspace_bytes;
    uint64_t algorithm[8];
} Launch;

enum { BIAS_POINTER = 8, A_SCALE_POINTER = 17, B_SCALE_POINTER = 18 }; /* of a descriptor */
enum { LAUNCH, A_AT, B_AT, STREAM, A, B, OUT, A_SCALE_INV, B_SCALE_INV, BIAS, ADDEND, WORKSPACE,
       COUNT };

static PyObject *DATA_PTR;

/* The number that an argument is, or where a tensor lies; 0 for None. */
static uint64_t number_of(PyObject *argument) {
    if (argument == Py_None) return 0;
    if (PyLong_Check(argument)) return PyLong_AsUnsignedLongLong(argument);
    PyObject *address = PyObject_CallMethodNoArgs(argument, DATA_PTR);
    if (!address) return (uint64_t)-1;
    uint64_t number = PyLong_AsUnsignedLongLong(address);
    Py_DECREF(address);
    return number;
}

/* launch(launch's address, a_at, b_at, stream, *tensors) -> status; bias, addend and workspace may
   be None. a_at and b_at: which elements the scales are. The caller holds the Launch's lock. The
   addend lies in memory as the output does.
   cuBLAS is column-major: it sees the transposed output, b @ a.T, so b is its A. */
static PyObject *launch(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    uint64_t at[COUNT];
    if (count != COUNT) {
        PyErr_Format(PyExc_TypeError, "launch takes %d arguments, not %zd", COUNT, count);
        return NULL;
    }
    for (int i = 0; i < COUNT; i++) {
        at[i] = number_of(args[i]);
        if (at[i] == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    }
    at[A_SCALE_INV] += at[A_AT] * sizeof(float);
    at[B_SCALE_INV] += at[B_AT] * sizeof(float);
    const Launch *l = (const Launch *)at[LAUNCH];
    const float one = 1, beta = at[ADDEND] ? 1 : 0;
    void *addend = (void *)(at[ADDEND] ? at[ADDEND] : at[OUT]);
    int status;
    Py_BEGIN_ALLOW_THREADS /* it waits where the queue of launches is full */
    status = l->set_attribute(l->desc, A_SCALE_POINTER, &at[B_SCALE_INV], sizeof(uint64_t));
    if (!status)
        status = l->set_attribute(l->desc, B_SCALE_POINTER, &at[A_SCALE_INV], sizeof(uint64_t));
    if (!status && at[BIAS])
        status = l->set_attribute(l->desc, BIAS_POINTER, &at[BIAS], sizeof(uint64_t));
    if (!status)
        status = l->matmul(l->handle, l->desc, &one, (void *)at[B], l->b_layout, (void *)at[A],
                           l->a_layout, &beta, addend, l->out_layout, (void *)at[OUT],
                           l->out_layout, l->algorithm, (void *)at[WORKSPACE],
                           l->workspace_bytes, (void *)at[STREAM]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

static PyMethodDef METHODS[] = {
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launch a GEMM."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "launch_gemm", NULL, -1, METHODS};

PyMODINIT_FUNC PyInit_launch_gemm(void) {
    DATA_PTR = PyUnicode_InternFromString("data_ptr");
    return DATA_PTR ? PyModule_Create(&MODULE) : NULL;
}
