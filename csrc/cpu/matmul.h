// Products of matrices by PyTorch's own operator, which is called without the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../tensors.h"

namespace fastllm {

// out (M, N) = a (M, K) b (K, N), of one dtype.
inline void multiply_into(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// The transpose of a matrix, as a view.
inline Tensor turned(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// The gradients of x (rows, D) and weight (classes, D) for dz (rows, classes), that of their product; without elements
// where not needed.
inline std::tuple<Tensor, Tensor> product_gradients(const Tensor& dz, const Tensor& x, const Tensor& weight,
                                                    bool need_x, bool need_weight) {
  const std::vector<int64_t> none{0};
  Tensor dx = empty_like_device(x, need_x ? shape_of(x) : none, x.scalar_type());
  Tensor dweight = empty_like_device(weight, need_weight ? shape_of(weight) : none, weight.scalar_type());
  if (need_weight) multiply_into(dweight, turned(dz), x);
  if (need_x) multiply_into(dx, dz, weight);
  return {dx, dweight};
}

}  // namespace fastllm
