// linear_rows on the CPU: the products of a decoder's step, bound by reading the weights.
#include "linear_rows.h"

#include <algorithm>

#include "strided.h"

namespace fastllm {
namespace {

// Weights that are worth a thread of their own: 0.25 MB in float32, about 8 us of reading. A guess.
constexpr int64_t kWorth = 65536;

// x (..., K) times weight (N, K), + bias (N,), as (..., N), all of one dtype; summed in float32 and rounded once.
Tensor linear_rows(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias) {
  const char* op = "linear_rows";
  if (weight_.dim() != 2 || x_.dim() < 1 || x_.size(x_.dim() - 1) != weight_.size(1))
    refuse(op, ": weight must be (N, K), with K the last dimension of x");
  const int64_t outputs = weight_.size(0), depth = weight_.size(1);
  if (bias.has_value() && (bias->dim() != 1 || bias->numel() != outputs)) refuse(op, ": bias must be (N,)");
  const ScalarType dtype = x_.scalar_type();
  const auto fitting = [&](const Tensor& t, bool fits) {
    if (!is_narrow_float(dtype) || t.scalar_type() != dtype)
      refuse(op, ": x, weight and bias must all be float32, bfloat16 or float16");
    return fits ? t : torch::stable::contiguous(t);
  };
  const Tensor x = fitting(x_, x_.is_contiguous()), weight = fitting(weight_, depth <= 1 || weight_.stride(1) == 1);
  const std::optional<Tensor> added =
      bias.has_value() ? std::optional<Tensor>(fitting(*bias, bias->is_contiguous())) : std::nullopt;
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = outputs;
  Tensor y = empty_like_device(x, shape, dtype);
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / outputs;
  const LinearRows call{x.const_data_ptr(), weight.const_data_ptr(),
                        added.has_value() ? added->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                        dtype_index(dtype), rows, depth, outputs, weight.stride(0)};
  const auto kernel = linear_kernels().linear_rows;
  const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, depth));
  torch::stable::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
    const Scratch wide(dtype == ScalarType::Float ? 0 : rows * depth * 4);
    kernel(call, begin, end, static_cast<float*>(wide.get()));
  });
  return y;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("linear_rows", TORCH_BOX(&fastllm::linear_rows)); }
