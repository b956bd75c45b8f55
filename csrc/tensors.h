// Checks and accessors for torch::stable::Tensor that the CPU and CUDA ops share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// TypeError and ValueError in Python come from pybind11's mapping of the standard exceptions.
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

inline std::vector<int64_t> with_last(const Tensor& indices, int64_t columns) {
  const auto sizes = indices.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(columns);
  return shape;
}

inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// What a backward needs to know of its operands, once checked.
struct Backward {
  Tensor grad;     // rows x columns, contiguous
  Tensor indices;  // contiguous
  int64_t rows;    // of grad
  int64_t columns;
  int64_t tokens;  // indices that take part; rows = repeats * tokens, row r belongs to index r % tokens
  int64_t repeats;
};

inline Backward check_backward(const char* op, const Tensor& grad, const Tensor& indices) {
  if (grad.dim() < 1) refuse(op, ": grad must have at least one dimension");
  if (!is_supported_float(grad.scalar_type())) refuse(op, ": grad must be float64, float32, float16 or bfloat16");
  Backward b{grad.is_contiguous() ? grad : torch::stable::contiguous(grad), check_indices(op, indices), 0, 0, 0, 1};
  b.columns = grad.size(grad.dim() - 1);
  b.rows = 1;
  for (int64_t d = 0; d + 1 < grad.dim(); ++d) b.rows *= grad.size(d);
  b.tokens = b.indices.numel();
  if (b.tokens == 0 ? b.rows != 0 : b.rows % b.tokens != 0)
    refuse(op, ": grad has ", b.rows, " rows, which ", b.tokens, " indices do not divide");
  if (b.rows == 0) b.tokens = 0;
  if (b.tokens > 0) b.repeats = b.rows / b.tokens;
  return b;
}

}  // namespace fastllm
