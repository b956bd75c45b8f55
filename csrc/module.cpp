// The Python module fastllm._C. Importing it registers the operators; tensors go through them, not through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/level.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "fastllm_build.h"  // written by fastllm/extension/compile.py

namespace py = pybind11;

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

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = std::string(FASTLLM_BUILD_FLAGS);
  info["sources"] = std::string(FASTLLM_BUILD_SOURCES);
  info["torch_headers"] = std::string(FASTLLM_BUILD_TORCH);
  info["torch_target"] = std::string("2.10");
  info["cpu_level"] = std::string(fastllm::name_of(fastllm::level()));
  info["cpu_capability"] = std::string(fastllm::row_kernels().name);
  info["matrix_units"] = fastllm::attention_usable();
  info["bf16_products"] = std::string(fastllm::bf16_products());
  const std::string cuda = FASTLLM_BUILD_CUDA;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["cuda_architectures"] = std::vector<std::string>(FASTLLM_BUILD_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastllm's compiled operators (torch.ops.fastllm); build_info() says how they were built.";
  m.def("build_info", &build_info, R"(How this extension was built.

Returns a dict: ``compiler``, ``flags``, ``sources`` (a fingerprint of the code), ``torch_headers`` (the version whose
headers were used), ``torch_target`` (the oldest torch that it loads on), ``cpu_level`` (the highest instruction set
that it uses here: baseline, avx2, avx512 or amx; FASTLLM_CPU and ATEN_CPU_CAPABILITY lower it), ``cpu_capability`` (its
vector instructions by torch's name: default, avx2 or avx512), ``matrix_units`` (whether AMX serves attention here),
``bf16_products`` (what sums a layer's bfloat16 gradient: amx, avx512_bf16, or none), ``cuda`` (nvcc's version, None
without CUDA code) and ``cuda_architectures``.)");
}
