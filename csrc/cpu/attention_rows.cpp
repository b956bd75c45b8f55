// attention_rows and attention_grad_rows on the CPU: dense attention with every feature, in float32.
#include "attention_rows.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../scalar.h"
#include "strided.h"

namespace fastllm {
namespace {

// Rows of one head that a thread takes at once: each packs the keys that they see anew.
constexpr int64_t kRowsOfTask = 384;

// (batch, heads, rows, columns), with columns side by side.
Tensor four(const char* op, const Tensor& x) {
  if (x.dim() != 4 || !is_narrow_float(x.scalar_type()))
    refuse(op, ": expected float32, float16 or bfloat16 of 4 dimensions");
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

int64_t offset_of(const Tensor& x, int64_t batch, int64_t head) { return batch * x.stride(0) + head * x.stride(1); }

AttentionRows rows_of(const Tensor& x, int64_t batch, int64_t head) {
  const int64_t bytes = offset_of(x, batch, head) * element_size(x.scalar_type());
  return {static_cast<const char*>(x.const_data_ptr()) + bytes, x.stride(2)};
}

AttentionRowsOut rows_out_of(const Tensor& x, int64_t batch, int64_t head) {
  const int64_t bytes = offset_of(x, batch, head) * element_size(x.scalar_type());
  return {static_cast<char*>(x.mutable_data_ptr()) + bytes, x.stride(2)};
}

AttentionRowsOut rows_out_of(const std::optional<Tensor>& x, int64_t batch, int64_t head) {
  return x.has_value() ? rows_out_of(*x, batch, head) : AttentionRowsOut{nullptr, 0};
}

// One number a row: (batch, heads, rows) float32.
AttentionColumn column_of(const Tensor& x, int64_t batch, int64_t head) {
  return {static_cast<float*>(x.mutable_data_ptr()) + offset_of(x, batch, head), x.stride(2)};
}

struct Call {
  const char* op;
  Tensor q, k, v;
  std::optional<Tensor> bias, slopes;
  std::optional<Dropout> dropout;
  AttentionShape shape;
  int64_t first_plane;

  Call(const char* op_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias_,
       const std::optional<Tensor>& slopes_, const std::optional<Tensor>& seed_, double scale, double softcap,
       int64_t left, int64_t right, int64_t offset, double dropout_p, int64_t plane)
      : op(op_), q(four(op, q_)), k(four(op, k_)), v(four(op, v_)), bias(bias_), slopes(slopes_),
        dropout(read_dropout(op, seed_, dropout_p)), first_plane(plane) {
    const bool fits = q.size(0) == k.size(0) && k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == v.size(2) && q.size(3) == k.size(3);
    if (!fits || (q.size(1) > 0 && (k.size(1) == 0 || q.size(1) % k.size(1) != 0)))
      refuse(op, ": query, key and value do not fit");
    if (q.scalar_type() != k.scalar_type() || q.scalar_type() != v.scalar_type())
      refuse(op, ": query, key and value must have one dtype");
    const bool boolean = bias.has_value() && bias->scalar_type() == ScalarType::Bool;
    if (bias.has_value() && (shape_of(*bias) != scores() || (!boolean && bias->scalar_type() != ScalarType::Float)))
      refuse(op, ": bias must be boolean or float32, expanded to the scores");
    if (slopes.has_value() && (slopes->dim() != 2 || slopes->size(0) != q.size(0) || slopes->size(1) != q.size(1) ||
                               slopes->scalar_type() != ScalarType::Float))
      refuse(op, ": slopes must be float32 (batch, heads)");
    shape = {q.size(2), k.size(2), q.size(3), v.size(3), static_cast<float>(scale), static_cast<float>(softcap),
             left, right, offset, dtype_index(q.scalar_type()), boolean, pointer_to(dropout)};
  }
  Call(const Call&) = delete;  // the shape points at the dropout

  int64_t heads() const { return q.size(1); }
  int64_t planes() const { return q.size(0) * heads(); }
  int64_t group() const { return heads() / std::max<int64_t>(k.size(1), 1); }
  std::vector<int64_t> scores() const { return {q.size(0), q.size(1), q.size(2), k.size(2)}; }

  AttentionHead head(int64_t batch, int64_t head) const {
    AttentionHead h{rows_of(q, batch, head), rows_of(k, batch, head / group()), rows_of(v, batch, head / group()),
                    {nullptr, 0, 0}, 0.0f, -std::numeric_limits<float>::infinity(),
                    first_plane + batch * heads() + head};
    if (bias.has_value())
      h.bias = {rows_of_bias(batch, head), bias->stride(2), bias->stride(3)};
    if (slopes.has_value())
      h.slope =
          static_cast<const float*>(slopes->const_data_ptr())[batch * slopes->stride(0) + head * slopes->stride(1)];
    return h;
  }

 private:
  const void* rows_of_bias(int64_t batch, int64_t head) const {
    const int64_t bytes = shape.boolean ? 1 : 4;
    return static_cast<const char*>(bias->const_data_ptr()) + offset_of(*bias, batch, head) * bytes;
  }
};

void check_out(const char* op, const Tensor& x, int64_t rows, int64_t columns, const Call& call) {
  if (x.dim() != 4 || x.size(0) != call.q.size(0) || x.size(2) != rows || x.size(3) != columns ||
      x.scalar_type() != call.q.scalar_type() || (columns > 1 && x.numel() > 0 && x.stride(3) != 1))
    refuse(op, ": what is written must be of the query's dtype and fit, with columns side by side");
}

void check_column(const char* op, const Tensor& x, const Call& call) {
  if (x.dim() != 3 || x.size(0) != call.q.size(0) || x.size(1) != call.heads() || x.size(2) != call.q.size(2) ||
      x.scalar_type() != ScalarType::Float)
    refuse(op, ": expected a float32 for each row");
}

// The blocks of a head's rows in turns from both ends: under a causal edge, threads that share a head have like work.
int64_t from_both_ends(int64_t i, int64_t n) { return i % 2 == 0 ? i / 2 : n - 1 - i / 2; }

// Fills out (B, H, Sq, Dv), lse, most and log (B, H, Sq). bias is expanded to (B, H, Sq, Sk), slopes to (B, H); sinks
// (H,).
void attention_rows(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& sinks, const std::optional<Tensor>& slopes,
                    const std::optional<Tensor>& seed, Tensor out, Tensor lse, Tensor most, Tensor log, double scale,
                    double softcap, int64_t left, int64_t right, int64_t offset, double dropout_p,
                    int64_t first_plane) {
  const char* op = "attention_rows";
  const Call call(op, q, k, v, bias, slopes, seed, scale, softcap, left, right, offset, dropout_p, first_plane);
  const AttentionShape& s = call.shape;
  check_out(op, out, s.rows, s.dim_v, call);
  for (const Tensor& x : std::vector<Tensor>{lse, most, log}) check_column(op, x, call);
  if (sinks.has_value() &&
      (sinks->numel() != call.heads() || sinks->scalar_type() != ScalarType::Float || !sinks->is_contiguous()))
    refuse(op, ": sinks must be float32, contiguous, one a head");
  if (call.planes() * s.rows == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  const int64_t blocks = (s.rows + kRowsOfTask - 1) / kRowsOfTask, of_task = std::min(s.rows, kRowsOfTask);
  torch::stable::parallel_for(0, call.planes() * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.forward_bytes(s, of_task));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks / call.heads(), h = i / blocks % call.heads();
      const int64_t first = from_both_ends(i % blocks, blocks) * kRowsOfTask;
      AttentionHead head = call.head(b, h);
      if (sinks.has_value()) head.sink = static_cast<const float*>(sinks->const_data_ptr())[h];
      const AttentionOutput output{rows_out_of(out, b, h), column_of(lse, b, h), column_of(most, b, h),
                                   column_of(log, b, h)};
      kernels.forward(s, head, output, first, std::min(s.rows, first + kRowsOfTask), scratch.get());
    }
  });
}

// to (B, Hkv, Sk, D) = the sum over a group's heads of from (B, H, Sk, D) float32, in order.
void add_groups(const std::optional<Tensor>& to, const Tensor& from, int64_t group) {
  if (!to.has_value() || to->numel() == 0) return;
  const int64_t heads = to->size(1), rows = to->size(2), columns = to->size(3);
  const bool narrow_out = to->scalar_type() != ScalarType::Float;
  torch::stable::parallel_for(0, to->size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(static_cast<size_t>(columns));
    for (int64_t i = begin; i < end; ++i) {
      const float* first = static_cast<const float*>(from.const_data_ptr()) + i * group * rows * columns;
      const AttentionRowsOut out = rows_out_of(*to, i / heads, i % heads);
      for (int64_t r = 0; r < rows; ++r) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t g = 0; g < group; ++g)
          for (int64_t c = 0; c < columns; ++c) sum[c] += first[(g * rows + r) * columns + c];
        char* row = static_cast<char*>(out.data) + r * out.stride * (narrow_out ? 2 : 4);
        for (int64_t c = 0; c < columns; ++c) {
          if (!narrow_out)
            reinterpret_cast<float*>(row)[c] = sum[c];
          else if (to->scalar_type() == ScalarType::BFloat16)
            narrow(sum[c], reinterpret_cast<BF16*>(row)[c]);
          else
            narrow(sum[c], reinterpret_cast<F16*>(row)[c]);
        }
      }
    }
  });
}

// Fills dq, dk and dv, where they are there, and delta (B, H, Sq); adds to dbias, float32, expanded to the scores:
// where it is broadcast over batch or heads, each plane needs one of its own.
void attention_grad_rows(const Tensor& dout_, const std::optional<Tensor>& dlse, const Tensor& out_, const Tensor& most,
                         const Tensor& log, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& slopes,
                         const std::optional<Tensor>& seed, std::optional<Tensor> dq, std::optional<Tensor> dk,
                         std::optional<Tensor> dv, std::optional<Tensor> dbias, Tensor delta, double scale,
                         double softcap, int64_t left, int64_t right, int64_t offset, double dropout_p,
                         int64_t first_plane) {
  const char* op = "attention_grad_rows";
  const Call call(op, q, k, v, bias, slopes, seed, scale, softcap, left, right, offset, dropout_p, first_plane);
  const AttentionShape& s = call.shape;
  const Tensor dout = four(op, dout_), out = four(op, out_);
  for (const Tensor& x : std::vector<Tensor>{dout, out}) check_out(op, x, s.rows, s.dim_v, call);
  if (dq.has_value()) check_out(op, *dq, s.rows, s.dim, call);
  if (dk.has_value()) check_out(op, *dk, s.columns, s.dim, call);
  if (dv.has_value()) check_out(op, *dv, s.columns, s.dim_v, call);
  for (const Tensor& x : std::vector<Tensor>{most, log, delta}) check_column(op, x, call);
  if (dlse.has_value()) check_column(op, *dlse, call);
  if (dbias.has_value() && (shape_of(*dbias) != call.scores() || dbias->scalar_type() != ScalarType::Float))
    refuse(op, ": dbias must be float32, expanded to the scores");
  // The heads of a group each give the gradient of the one that they read; none do where there is no query's head.
  const bool grouped = call.group() != 1;
  const auto apart = [&](const std::optional<Tensor>& x) {
    const bool there = grouped && x.has_value();
    return empty_like_device(call.q, {there ? call.planes() : 0, there ? x->size(2) : 0, there ? x->size(3) : 0},
                             ScalarType::Float);
  };
  Tensor dk_apart = apart(dk), dv_apart = apart(dv);
  const auto plane_of = [](const Tensor& x, int64_t plane) {
    return AttentionRowsOut{static_cast<float*>(x.mutable_data_ptr()) + plane * x.size(1) * x.size(2), x.size(2)};
  };
  const AttentionGradKernels& kernels = attention_grad_kernels();
  torch::stable::parallel_for(0, call.planes(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.backward_bytes(s));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / call.heads(), h = i % call.heads();
      const AttentionUpstream upstream{rows_of(out, b, h), rows_of(dout, b, h),
                                       dlse.has_value() ? column_of(*dlse, b, h) : AttentionColumn{nullptr, 0},
                                       column_of(most, b, h), column_of(log, b, h)};
      AttentionGradient grad{rows_out_of(dq, b, h), {nullptr, 0}, {nullptr, 0}, grouped ? kF32 : s.dtype, nullptr, 0, 0,
                             column_of(delta, b, h)};
      if (dk.has_value()) grad.dk = grouped ? plane_of(dk_apart, i) : rows_out_of(*dk, b, h);
      if (dv.has_value()) grad.dv = grouped ? plane_of(dv_apart, i) : rows_out_of(*dv, b, h);
      if (dbias.has_value()) {
        grad.dbias = static_cast<float*>(dbias->mutable_data_ptr()) + offset_of(*dbias, b, h);
        grad.dbias_row = dbias->stride(2);
        grad.dbias_column = dbias->stride(3);
      }
      kernels.backward(s, call.head(b, h), upstream, grad, scratch.get());
    }
  });
  if (!grouped) return;
  add_groups(dk, dk_apart, call.group());
  add_groups(dv, dv_apart, call.group());
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention_rows", TORCH_BOX(&fastllm::attention_rows));
  m.impl("attention_grad_rows", TORCH_BOX(&fastllm::attention_grad_rows));
}
