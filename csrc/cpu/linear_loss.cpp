// linear_loss_rows on the CPU: the losses of a linear layer's logits, one a row or their mean, and its gradients.
#include <cmath>
#include <cstring>

#include "../scalar.h"
#include "loss_rows.h"
#include "matmul.h"

namespace fastllm {
namespace {

// Rows for each ignored one from which ignored rows are multiplied too, as zeros, and not left out. They take 3% of a
// large product then. Of a small one the copies and the calls that leave them out take more: 13% of 128 x 768 x 4096 in
// bfloat16 at AVX-512. A text of 128 tokens has one without a next token. A guess between these.
constexpr int64_t kLeastPerIgnored = 32;

Tensor number(const Tensor& like, double value, ScalarType dtype) {
  Tensor one = empty_like_device(like, {}, dtype);
  round_into(one.mutable_data_ptr(), dtype, 0, value);
  return one;
}

template <class A>
void turn_sign(A* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = A(0) - values[i];
}

// What PyTorch's operators make of it in A: factor * (1 / total) for each row, 1 where there is no factor.
template <class A>
void shares_of(const A* factor, int64_t n, double total, A* out) {
  const A share = A(1) / static_cast<A>(total);
  for (int64_t i = 0; i < n; ++i) out[i] = factor == nullptr ? share : share * factor[i];
}

// Whether n numbers are neither infinite nor NaN.
bool all_finite(const Tensor& x, int64_t row) {
  const int64_t columns = x.size(1), stride = x.stride(1);
  const auto finite = [=](const auto* from) {
    for (int64_t c = 0; c < columns; ++c)
      if (!std::isfinite(static_cast<double>(widen(from[c * stride])))) return false;
    return true;
  };
  const char* const at = static_cast<const char*>(x.const_data_ptr()) +
                         row * x.stride(0) * element_size(x.scalar_type());
  switch (x.scalar_type()) {
    case ScalarType::Double: return finite(reinterpret_cast<const double*>(at));
    case ScalarType::BFloat16: return finite(reinterpret_cast<const BF16*>(at));
    case ScalarType::Half: return finite(reinterpret_cast<const F16*>(at));
    default: return finite(reinterpret_cast<const float*>(at));
  }
}

// How many of the targets count, or -1 where linear_loss_rows does not serve the rows x (rows, D): a target is no
// class, or ignored rows are better left out of the products. They are if they are many, and if 0 times one of their
// numbers is not 0.
int64_t linear_loss_counts(const Tensor& x, const Tensor& target_, int64_t ignore_index, int64_t classes) {
  if (x.dim() != 2 || target_.scalar_type() != ScalarType::Long || target_.numel() != x.size(0))
    refuse("linear_loss_counts: x must be (rows, D), and target int64, one a row");
  const Tensor target = target_.is_contiguous() ? target_ : torch::stable::contiguous(target_);
  const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t rows = target.numel();
  int64_t ignored = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] == ignore_index) {
      if (++ignored * kLeastPerIgnored > rows || !all_finite(x, i)) return -1;
    } else if (ids[i] < 0 || ids[i] >= classes) {
      return -1;
    }
  }
  return rows - ignored;
}

// The losses of the logits x (rows, D) weight (classes, D)^T, and the layer's gradients, where linear_loss_counts;
// else false and nothing is computed. (whether, loss, lse, hits, entropy, logits, dx, dweight), without elements what
// was not asked for:
// - `mean`: the loss is the sum of the rows' losses over `total`, in that dtype; else a loss a row, as the others.
//   total 0 stands for the number of targets that count. A total below 0 turns the sign of rows' losses too: they are
//   log-probabilities then, 0 and not -0 where a row does not count.
// - `skip`: an ignored row has 0 everywhere; else its logsumexp and its entropy are like another row's.
// - `logits` (rows, classes), where they are known; else they are computed, and come back if `keep`.
// - `need_x`, `need_weight`: gradients of the rows' losses, for `factor` (rows,) or 1, over `total`, and for dlse and
//   dentropy (rows,). The logits are overwritten then.
std::tuple<bool, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_loss_rows(
    const Tensor& x, const Tensor& weight, const Tensor& target_, const std::optional<Tensor>& known,
    const std::optional<Tensor>& factor, const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy,
    int64_t ignore_index, bool skip, double smoothing, double softcap, double scale, double z_loss, double total,
    std::optional<ScalarType> mean, bool keep, bool accuracy, bool entropy, bool need_x, bool need_weight) {
  const char* op = "linear_loss_rows";
  if (x.dim() != 2 || weight.dim() != 2 || x.size(1) != weight.size(1) || x.scalar_type() != weight.scalar_type())
    refuse(op, ": x must be (rows, D) and weight (classes, D), of one dtype");
  const int64_t rows = x.size(0), classes = weight.size(0);
  if (keep && (need_x || need_weight)) refuse(op, ": a gradient is written over the logits");
  const auto blank = [&] { return empty_like_device(x, {0}, x.scalar_type()); };
  const Tensor target = target_.is_contiguous() ? target_ : torch::stable::contiguous(target_);
  const int64_t counted = linear_loss_counts(x, target, ignore_index, classes);
  if (counted < 0) return {false, blank(), blank(), blank(), blank(), blank(), blank(), blank()};
  if (total == 0.0) total = static_cast<double>(counted);
  Tensor logits = known.has_value() ? *known : empty_like_device(x, {rows, classes}, x.scalar_type());
  if (logits.dim() != 2 || logits.size(0) != rows || logits.size(1) != classes ||
      logits.scalar_type() != x.scalar_type() || !logits.is_contiguous())
    refuse(op, ": logits must be (rows, classes), contiguous, in x's dtype");
  if (!known.has_value()) multiply_into(logits, x, turned(weight));

  const bool wide = x.scalar_type() == ScalarType::Double, back = need_x || need_weight;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> shares, dlogits;
  const std::optional<Tensor> none;
  if (back) {
    dlogits = logits;
    shares = empty_like_device(x, {rows}, dtype);
    column(op, factor, rows, dtype);  // checks it
    void* const to = shares->mutable_data_ptr();
    if (wide)
      shares_of(doubles(factor), rows, total, static_cast<double*>(to));
    else
      shares_of(floats(factor), rows, total, static_cast<float*>(to));
  }
  auto [loss, lse, hits, entropies] =
      counted_rows(logits, target, std::nullopt, {shares, dlse, dentropy, dlogits, none},
                   {smoothing, softcap, scale, z_loss}, {ignore_index, skip, accuracy, entropy});
  void* const losses = loss.mutable_data_ptr();
  if (mean.has_value()) {
    loss = number(x, wide ? mean_of(static_cast<const double*>(losses), rows, total)
                          : mean_of(static_cast<const float*>(losses), rows, total), *mean);
  } else if (total < 0.0) {
    if (wide)
      turn_sign(static_cast<double*>(losses), rows);
    else
      turn_sign(static_cast<float*>(losses), rows);
  }
  auto [dx, dweight] = product_gradients(logits, x, weight, need_x, need_weight);
  if (need_x && skip && counted < rows) {  // 0 times an infinite weight is NaN
    const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
    const size_t bytes = static_cast<size_t>(dx.size(1) * element_size(dx.scalar_type()));
    for (int64_t i = 0; i < rows; ++i)
      if (ids[i] == ignore_index) std::memset(static_cast<char*>(dx.mutable_data_ptr()) + i * bytes, 0, bytes);
  }
  return {true, loss, lse, hits, entropies, keep && !known.has_value() ? logits : blank(), dx, dweight};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("linear_loss_counts", TORCH_BOX(&fastllm::linear_loss_counts));
  m.impl("linear_loss_rows", TORCH_BOX(&fastllm::linear_loss_rows));
}
