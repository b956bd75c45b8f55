// attention_step on the CPU: one query of each head, bound by reading the keys and values.
#include "attention_step.h"

#include "strided.h"

namespace fastllm {
namespace {

Tensor side_by_side(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

const char* at(const Tensor& x, int64_t batch, int64_t head, int64_t bytes) {
  return static_cast<const char*>(x.const_data_ptr()) + (batch * x.stride(0) + head * x.stride(1)) * bytes;
}

// q (B, H, 1, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) of one dtype; mask, expanded to (B, H, 1, Sk), is boolean or
// float32. (B, H, 1, Dv): softmax(q k^T * scale + mask) v, with products and sums in float32.
Tensor attention_step(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask,
                      double scale) {
  const char* op = "attention_step";
  for (const Tensor* x : {&q_, &k_, &v_})
    if (x->dim() != 4 || !is_narrow_float(x->scalar_type()) || x->scalar_type() != q_.scalar_type())
      refuse(op, ": query, key and value must be float32, float16 or bfloat16 of 4 dimensions, all of one dtype");
  const int64_t batch = q_.size(0), heads = q_.size(1), heads_kv = k_.size(1), keys = k_.size(2), dim = q_.size(3);
  if (q_.size(2) != 1 || k_.size(0) != batch || v_.size(0) != batch || v_.size(1) != heads_kv || v_.size(2) != keys ||
      k_.size(3) != dim || heads_kv == 0 || heads % heads_kv != 0)
    refuse(op, ": query, key and value do not fit");
  const bool boolean = mask.has_value() && mask->scalar_type() == ScalarType::Bool;
  if (mask.has_value() && (shape_of(*mask) != std::vector<int64_t>{batch, heads, 1, keys} ||
                           (!boolean && mask->scalar_type() != ScalarType::Float)))
    refuse(op, ": mask must be boolean or float32, expanded to the scores");
  const int64_t dim_v = v_.size(3), group = heads / heads_kv, bytes = element_size(q_.scalar_type());
  Tensor out = empty_like_device(q_, {batch, heads, 1, dim_v}, q_.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor q = side_by_side(q_), k = side_by_side(k_), v = side_by_side(v_);
  const auto kernel = attention_step_kernels().attention_step;
  char* const written = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = row_grain(group * keys * (dim + dim_v));
  torch::stable::parallel_for(0, batch * heads_kv, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(step_scratch(group, keys, dim, dim_v) * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads_kv, head = i % heads_kv, first = head * group;
      AttentionStep call{};
      call.q = at(q, b, first, bytes);
      call.k = at(k, b, head, bytes);
      call.v = at(v, b, head, bytes);
      call.out = written + (b * heads + first) * dim_v * bytes;
      if (mask.has_value()) {
        call.mask = at(*mask, b, first, boolean ? 1 : 4);
        call.mask_stride = mask->stride(1);
        call.mask_step = mask->stride(3);
      }
      call.q_stride = q.stride(1);
      call.k_stride = k.stride(2);
      call.v_stride = v.stride(2);
      call.out_stride = dim_v;
      call.group = group;
      call.keys = keys;
      call.dim = dim;
      call.dim_v = dim_v;
      call.scale = static_cast<float>(scale);
      call.dtype = dtype_index(q.scalar_type());
      call.boolean = boolean;
      kernel(call, static_cast<float*>(scratch.get()));
    }
  });
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("attention_step", TORCH_BOX(&fastllm::attention_step)); }
