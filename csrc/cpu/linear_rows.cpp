// linear_rows on the CPU: the products of a decoder's step, bound by reading the weights.
#include "linear_rows.h"

#include <algorithm>

#include "../tensors.h"

namespace fastllm {
namespace {

// Weights that are worth a thread of their own: 0.25 MB, about 8 us of reading. A guess.
constexpr int64_t kWorth = 65536;

// x (..., K) times weight (N, K), + bias (N,), as (..., N), in float32.
Tensor linear_rows(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias) {
  const char* op = "linear_rows";
  if (weight_.dim() != 2 || x_.dim() < 1 || x_.size(x_.dim() - 1) != weight_.size(1))
    refuse(op, ": weight must be (N, K), with K the last dimension of x");
  const int64_t outputs = weight_.size(0), depth = weight_.size(1);
  if (bias.has_value() && (bias->dim() != 1 || bias->numel() != outputs)) refuse(op, ": bias must be (N,)");
  const auto floats = [&](const Tensor& t, bool fits) {
    if (t.scalar_type() != ScalarType::Float) refuse(op, ": x, weight and bias must be float32");
    return fits ? t : torch::stable::contiguous(t);
  };
  const Tensor x = floats(x_, x_.is_contiguous()), weight = floats(weight_, depth <= 1 || weight_.stride(1) == 1);
  const std::optional<Tensor> added =
      bias.has_value() ? std::optional<Tensor>(floats(*bias, bias->is_contiguous())) : std::nullopt;
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = outputs;
  Tensor y = empty_like_device(x, shape, ScalarType::Float);
  if (y.numel() == 0) return y;
  const auto data = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const LinearRows call{data(x), data(weight), added.has_value() ? data(*added) : nullptr,
                        static_cast<float*>(y.mutable_data_ptr()),
                        y.numel() / outputs, depth, outputs, weight.stride(0)};
  const auto kernel = linear_kernels().linear_rows;
  const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, depth));
  torch::stable::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return y;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("linear_rows", TORCH_BOX(&fastllm::linear_rows)); }
