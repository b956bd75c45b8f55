// attention_amx_fwd and attention_amx_bwd on CPUs with matrix units: plain or causal attention in bfloat16.
#include "attention.h"

#include "attention_amx.h"
#include "strided.h"

namespace fastllm {

bool attention_usable() {
#if defined(FASTLLM_AMX)
  static const bool usable = amx_usable();
  return usable;
#else
  return false;
#endif
}

#if defined(FASTLLM_AMX)
namespace {

// (batch, heads, rows, columns), with columns side by side.
Tensor rows_of(const char* op, const Tensor& x) {
  if (x.dim() != 4 || x.scalar_type() != ScalarType::BFloat16) refuse(op, ": expected bfloat16 of 4 dimensions");
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

PlaneShape check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  if (!attention_usable()) refuse(op, ": this machine has no matrix units");
  for (int64_t d : {0, 1, 3})
    if (q.size(d) != k.size(d)) refuse(op, ": query and key must have the same batch, heads and columns");
  for (int64_t d = 0; d < 4; ++d)
    if (k.size(d) != v.size(d)) refuse(op, ": key and value must have the same shape");
  if (causal && q.size(2) != k.size(2)) refuse(op, ": causal needs as many queries as keys");
  if (q.numel() == 0 || k.numel() == 0) refuse(op, ": empty tensors");
  return {q.size(2), k.size(2), q.size(3), static_cast<float>(scale), causal};
}

Plane plane(const Tensor& x, int64_t batch, int64_t head) {
  const auto* data = static_cast<const uint16_t*>(x.const_data_ptr());
  return {data + batch * x.stride(0) + head * x.stride(1), x.stride(2)};
}

// A fresh tensor of x's shape that lies in memory as (batch, rows, heads, columns): what a model joins heads from.
Tensor fresh(const Tensor& x) {
  Tensor out = empty_like_device(x, {x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type());
  advise_huge_pages(out);
  return torch::stable::transpose(out, 1, 2);
}

PlaneOut plane_out(const Tensor& x, int64_t batch, int64_t head) {
  auto* data = static_cast<uint16_t*>(x.mutable_data_ptr());
  return {data + batch * x.stride(0) + head * x.stride(1), x.stride(2)};
}

template <class Body>
void each_plane(const Tensor& q, int64_t scratch_bytes, const Body& body) {
  const int64_t heads = q.size(1);
  torch::stable::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    amx_begin();
    for (int64_t i = begin; i < end; ++i) body(i / heads, i % heads, scratch.get());
    amx_end();
  });
}

Tensor attention_amx_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale, bool causal) {
  const char* op = "attention_amx_fwd";
  const Tensor q = rows_of(op, q_), k = rows_of(op, k_), v = rows_of(op, v_);
  const PlaneShape shape = check(op, q, k, v, scale, causal);
  Tensor out = fresh(q);
  each_plane(q, amx_forward_scratch(shape), [&](int64_t b, int64_t h, void* scratch) {
    amx_forward(shape, plane(q, b, h), plane(k, b, h), plane(v, b, h), plane_out(out, b, h), scratch);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_amx_bwd(const Tensor& dout_, const Tensor& q_, const Tensor& k_,
                                                 const Tensor& v_, double scale, bool causal) {
  const char* op = "attention_amx_bwd";
  const Tensor q = rows_of(op, q_), k = rows_of(op, k_), v = rows_of(op, v_), dout = rows_of(op, dout_);
  const PlaneShape shape = check(op, q, k, v, scale, causal);
  for (int64_t d = 0; d < 4; ++d)
    if (dout.size(d) != q.size(d)) refuse(op, ": dout must have the query's shape");
  Tensor dq = fresh(q), dk = fresh(k), dv = fresh(v);
  each_plane(q, amx_backward_scratch(shape), [&](int64_t b, int64_t h, void* scratch) {
    amx_backward(shape, plane(dout, b, h), plane(q, b, h), plane(k, b, h), plane(v, b, h), plane_out(dq, b, h),
                 plane_out(dk, b, h), plane_out(dv, b, h), scratch);
  });
  return {dq, dk, dv};
}

}  // namespace
#endif

}  // namespace fastllm

#if defined(FASTLLM_AMX)
STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention_amx_fwd", TORCH_BOX(&fastllm::attention_amx_fwd));
  m.impl("attention_amx_bwd", TORCH_BOX(&fastllm::attention_amx_bwd));
}
#endif
