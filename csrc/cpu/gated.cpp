// gated_rows and gated_grad_rows on the CPU.
#include "gated.h"

#include "strided.h"

namespace fastllm {
namespace {

struct Pair {
  Tensor gate, up;
};

// The halves of the last dimension, as views.
Pair halves(Tensor both) {
  const int64_t last = both.dim() - 1, columns = both.size(last) / 2;
  return {torch::stable::narrow(both, last, 0, columns), torch::stable::narrow(both, last, columns, columns)};
}

Pair check(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  if (activation < 0 || activation >= kActivations) refuse(op, ": there is no activation ", activation);
  if (!up.has_value() && (gate.dim() == 0 || gate.size(gate.dim() - 1) % 2 != 0))
    refuse(op, ": without up, gate's last dimension must be even");
  const Pair pair = up.has_value() ? Pair{gate, *up} : halves(gate);
  if (shape_of(pair.gate) != shape_of(pair.up)) refuse(op, ": up must have gate's shape");
  if (!is_narrow_float(pair.gate.scalar_type()) || !is_narrow_float(pair.up.scalar_type()))
    refuse(op, ": gate and up must be float32, float16 or bfloat16");
  return pair;
}

// All rows in pieces, shared out among threads: work(row, first column, columns). Rows that follow each other without
// gaps in every tensor are taken as one.
template <class Work>
void each_piece(const Rows& rows, bool gapless, const Work& work) {
  constexpr int64_t kPiece = 4096;
  const int64_t count = gapless ? 1 : rows.count, columns = gapless ? rows.count * rows.columns : rows.columns;
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, count * pieces, row_grain(std::min(columns, kPiece)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      work(i / pieces, first, std::min(kPiece, columns - first));
    }
  });
}

ScalarType result_dtype(const Pair& pair) {
  const ScalarType dtype = pair.gate.scalar_type();
  return dtype == pair.up.scalar_type() ? dtype : ScalarType::Float;
}

// act(gate) * up in the dtype that the two promote to. Without `up` gate holds both, along its last dimension.
Tensor gated_rows(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  const Pair pair = check("gated_rows", gate, up, activation);
  Tensor y = empty_like_device(gate, shape_of(pair.gate), result_dtype(pair));
  if (y.numel() == 0) return y;
  advise_huge_pages(y);
  const Rows gates(pair.gate), ups(pair.up), ys(y);
  const auto gated_run = gated_kernels().gated_run[activation];
  each_piece(ys, pair.gate.is_contiguous() && pair.up.is_contiguous(), [&](int64_t row, int64_t c, int64_t n) {
    gated_run({gates.at(row, c), ups.at(row, c), ys.mutable_at(row, c), n, gates.dtype, ups.dtype});
  });
  return y;
}

// (dgate as gate, dup as up), empty where not needed; without `up` dgate holds both, and dup is empty.
std::tuple<Tensor, Tensor> gated_grad_rows(const Tensor& dy, const Tensor& gate, const std::optional<Tensor>& up,
                                           int64_t activation, bool need_gate, bool need_up) {
  const char* op = "gated_grad_rows";
  const Pair pair = check(op, gate, up, activation);
  if (shape_of(dy) != shape_of(pair.gate) || dy.scalar_type() != result_dtype(pair))
    refuse(op, ": dy must have the result's shape and dtype");
  const auto grad = [&](const Tensor& x, bool needed) {
    Tensor fresh = empty_like_device(x, needed ? shape_of(x) : std::vector<int64_t>{0}, x.scalar_type());
    advise_huge_pages(fresh);
    return fresh;
  };
  const Tensor dgate = grad(gate, need_gate), dup = grad(up.value_or(gate), up.has_value() && need_up);
  if (dy.numel() == 0 || !(need_gate || need_up)) return {dgate, dup};
  const Pair grads = up.has_value() ? Pair{dgate, dup} : halves(dgate);
  need_up = up.has_value() ? need_up : need_gate;
  const Rows dys(dy), gates(pair.gate), ups(pair.up), dgates(grads.gate), dups(grads.up);
  const auto gated_grad_run = gated_kernels().gated_grad_run[activation];
  const bool gapless =
      up.has_value() && dy.is_contiguous() && pair.gate.is_contiguous() && pair.up.is_contiguous();
  each_piece(gates, gapless, [&](int64_t row, int64_t c, int64_t n) {
    gated_grad_run({dys.at(row, c), gates.at(row, c), ups.at(row, c), need_gate ? dgates.mutable_at(row, c) : nullptr,
                    need_up ? dups.mutable_at(row, c) : nullptr, n, gates.dtype, ups.dtype});
  });
  return {dgate, dup};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("gated_rows", TORCH_BOX(&fastllm::gated_rows));
  m.impl("gated_grad_rows", TORCH_BOX(&fastllm::gated_grad_rows));
}
