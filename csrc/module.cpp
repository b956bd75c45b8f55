// The Python module fastllm._C. Importing it registers the operators; tensors go through them, not through here.
// Only CPython's stable API is used, so that one binary serves every Python from 3.10 on. compile/steps.py defines
// Py_LIMITED_API, but for a Python without that API (3.13 and 3.14 without the global lock).
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/attention.h"
#include "cpu/level.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "fastllm_build.h"  // written by fastllm/extension/compile/steps.py

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

// A dict that is being filled. After the first failure, whose Python error stands, the rest does nothing.
class Info {
 public:
  Info() : dict_(PyDict_New()) {}

  // Takes `value` over; nullptr: making it failed.
  void set(const char* key, PyObject* value) {
    if (dict_ != nullptr && (value == nullptr || PyDict_SetItemString(dict_, key, value) != 0)) {
      Py_CLEAR(dict_);
    }
    Py_XDECREF(value);
  }

  void set(const char* key, const std::string& text) { set(key, PyUnicode_FromString(text.c_str())); }

  PyObject* take() { return dict_; }

 private:
  PyObject* dict_;
};

PyObject* list_of(std::initializer_list<const char*> texts) {
  PyObject* list = PyList_New(0);
  for (const char* text : texts) {
    PyObject* item = PyUnicode_FromString(text);
    if (list != nullptr && (item == nullptr || PyList_Append(list, item) != 0)) {
      Py_CLEAR(list);
    }
    Py_XDECREF(item);
  }
  return list;
}

PyObject* build_info(PyObject*, PyObject*) {
  std::string cpu_level, cpu_capability, bf16_products;
  bool matrix_units;
  try {
    cpu_level = fastllm::name_of(fastllm::level());
    cpu_capability = fastllm::row_kernels().name;
    matrix_units = fastllm::attention_usable();
    bf16_products = fastllm::bf16_products();
  } catch (const std::exception& error) {  // FASTLLM_CPU has a value that means nothing
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  const std::string cuda = FASTLLM_BUILD_CUDA;
  Info info;
  info.set("compiler", compiler());
  info.set("flags", FASTLLM_BUILD_FLAGS);
  info.set("sources", FASTLLM_BUILD_SOURCES);
  info.set("torch_headers", FASTLLM_BUILD_TORCH);
  info.set("torch_target", "2.10");
  info.set("cpu_level", cpu_level);
  info.set("cpu_capability", cpu_capability);
  info.set("matrix_units", PyBool_FromLong(matrix_units));
  info.set("bf16_products", bf16_products);
  info.set("cuda", cuda.empty() ? Py_NewRef(Py_None) : PyUnicode_FromString(cuda.c_str()));
  info.set("cuda_architectures", list_of(FASTLLM_BUILD_ARCHITECTURES));
  return info.take();
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, R"(How this extension was built.

Returns a dict: ``compiler``, ``flags``, ``sources`` (a fingerprint of the code), ``torch_headers`` (the version whose
headers were used), ``torch_target`` (the oldest torch that it loads on), ``cpu_level`` (the highest instruction set
that it uses here: baseline, avx2, avx512 or amx; FASTLLM_CPU and ATEN_CPU_CAPABILITY lower it), ``cpu_capability`` (its
vector instructions by torch's name: default, avx2 or avx512), ``matrix_units`` (whether AMX serves attention here),
``bf16_products`` (what sums a layer's bfloat16 gradient: amx, avx512_bf16, or none), ``cuda`` (nvcc's version, None
without CUDA code) and ``cuda_architectures``.)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "fastllm's compiled operators (torch.ops.fastllm); build_info() says how they were built.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
