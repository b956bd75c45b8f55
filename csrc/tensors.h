// Checks and accessors for torch::stable::Tensor that the CPU and CUDA ops share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "vocabulary.h"

namespace fastllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A ValueError in Python: torch.ops calls by way of PyTorch's pybind11, which maps the standard exceptions.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline bool is_index(ScalarType dtype) { return dtype == ScalarType::Int || dtype == ScalarType::Long; }

inline bool is_supported_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// What fp32 computes at least as exactly.
inline bool is_narrow_float(ScalarType dtype) { return is_supported_float(dtype) && dtype != ScalarType::Double; }

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    default: return 2;
  }
}

inline void check_table(const char* op, const Tensor& weight) {
  if (weight.dim() != 2) refuse(op, ": weight must have 2 dimensions, got ", weight.dim());
  if (!is_supported_float(weight.scalar_type()))
    refuse(op, ": weight must be float64, float32, float16 or bfloat16");
}

inline Tensor check_indices(const char* op, const Tensor& indices) {
  if (!is_index(indices.scalar_type())) refuse(op, ": indices must be int32 or int64");
  return indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> with_last(const Tensor& indices, int64_t columns) {
  std::vector<int64_t> shape = shape_of(indices);
  shape.push_back(columns);
  return shape;
}

// A fresh contiguous tensor on `like`'s device. new_empty() looks its operator up by name at every call: 1.1 of the 2.6
// us that a product of one row with 64 x 64 weights took.
inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] < 1 ? 1 : shape[d];
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle fresh = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  type, device_type, device_index, &fresh));
  return Tensor(fresh);
}

// What a backward needs to know of its operands, once checked.
struct Backward {
  Tensor grad;     // rows x columns, contiguous
  Tensor indices;  // contiguous
  int64_t rows;    // of grad
  int64_t columns;
  int64_t tokens;  // indices that take part; rows = repeats * tokens, row r belongs to index r % tokens
  int64_t repeats;
  bool positions;  // the indices are 0, 1, 2, ...
};

inline Tensor check_dropped(const char* op, const Tensor& x) {
  if (!is_supported_float(x.scalar_type()) || x.dim() != 2)
    refuse(op, ": x must have 2 dimensions and be float64, float32, float16 or bfloat16");
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Backward check_backward(const char* op, const Tensor& grad, const Tensor& indices, bool positions) {
  if (grad.dim() < 1) refuse(op, ": grad must have at least one dimension");
  if (!is_supported_float(grad.scalar_type())) refuse(op, ": grad must be float64, float32, float16 or bfloat16");
  Backward b{grad.is_contiguous() ? grad : torch::stable::contiguous(grad),
             check_indices(op, indices),
             1,
             grad.size(grad.dim() - 1),
             indices.numel(),
             1,
             positions};
  for (int64_t d = 0; d + 1 < grad.dim(); ++d) b.rows *= grad.size(d);
  if (b.tokens == 0 ? b.rows != 0 : b.rows % b.tokens != 0)
    refuse(op, ": grad has ", b.rows, " rows, which ", b.tokens, " indices do not divide");
  if (b.rows == 0) b.tokens = 0;
  if (b.tokens > 0) b.repeats = b.rows / b.tokens;
  return b;
}

// `out` can take the gradient of b: rows x columns, in grad's dtype or, beside 16 bits, float32.
inline void check_output(const char* op, const Tensor& out, const Backward& b) {
  if (out.dim() != 2 || out.size(1) != b.columns) refuse(op, ": out must have shape (rows, ", b.columns, ")");
  const ScalarType from = b.grad.scalar_type(), to = out.scalar_type();
  if (from != to && (to != ScalarType::Float || from == ScalarType::Double))
    refuse(op, ": out must have grad's dtype, or be float32 beside a 16-bit grad");
  if (out.size(1) > 1 && out.stride(1) != 1) refuse(op, ": the columns of out must be contiguous");
  if (b.positions && b.tokens > out.size(0))
    refuse(op, ": ", b.tokens, " positions in a table of ", out.size(0), " rows");
}

inline void check_sum(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& indices,
                      int64_t rows, const std::vector<double>& scales) {
  const size_t tables = weights.size();
  if (tables == 0 || indices.size() != tables || scales.size() != tables)
    refuse(op, ": expected as many indices and scales as weights, and at least one");
  for (size_t t = 0; t < tables; ++t) {
    check_table(op, weights[t]);
    if (weights[t].scalar_type() != weights[0].scalar_type() || weights[t].size(1) != weights[0].size(1))
      refuse(op, ": the tables must share dtype and number of columns");
    const int64_t n = indices[t].numel();
    if (n == 0 ? rows != 0 : rows % n != 0) refuse(op, ": ", n, " indices do not divide ", rows, " rows");
  }
}

}  // namespace fastllm
