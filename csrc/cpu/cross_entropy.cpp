// cross_entropy_rows on the CPU: the loss of each row of logits, and its gradient in the same pass over the row.
// linear_loss_rows: the same of a linear layer's logits, with the layer's gradients.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "caches.h"
#include "../scalar.h"
#include "matmul.h"
#include "strided.h"

namespace fastllm {
namespace {

const double* doubles(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const double*>(t->const_data_ptr()) : nullptr;
}

const float* floats(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A vector of the accumulator's dtype, one element a row.
struct Column {
  const float* narrow;
  const double* wide;
  double operator[](int64_t i) const { return wide ? wide[i] : narrow ? static_cast<double>(narrow[i]) : 0.0; }
};

Column column(const char* op, const std::optional<Tensor>& t, int64_t rows, ScalarType dtype) {
  if (!t.has_value()) return {nullptr, nullptr};
  if (t->numel() != rows || t->scalar_type() != dtype || !t->is_contiguous())
    refuse(op, ": factors must be contiguous, one a row, in the accumulator's dtype");
  const bool wide = dtype == ScalarType::Double;
  return {wide ? nullptr : floats(t), wide ? doubles(t) : nullptr};
}

// x (rows, classes); target (rows,) int64, or probabilities of x's shape; weight (classes,), factor, dlse and dentropy
// (rows,) in the accumulator's dtype. The gradient for them goes to dx, which may be x, and to dtarget. softcap 0:
// none.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_rows(
    const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight, const std::optional<Tensor>& factor_,
    const std::optional<Tensor>& dlse_, const std::optional<Tensor>& dentropy_, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dtarget, int64_t ignore_index, double smoothing, double softcap, double scale,
    double z_loss, bool accuracy, bool entropy) {
  const char* op = "cross_entropy_rows";
  if (x.dim() != 2 || !is_supported_float(x.scalar_type()) || x.size(1) < 1)
    refuse(op, ": x must be (rows, classes), float64, float32, float16 or bfloat16");
  const int64_t n_rows = x.size(0), classes = x.size(1);
  const bool probabilities = is_supported_float(target.scalar_type());
  const bool wide = x.scalar_type() == ScalarType::Double ||
                    (probabilities && target.scalar_type() == ScalarType::Double);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  if (probabilities ? target.dim() != 2 || target.size(0) != n_rows || target.size(1) != classes
                    : target.scalar_type() != ScalarType::Long || target.numel() != n_rows)
    refuse(op, ": target must be int64, one a row, or floating point of x's shape");
  if (weight.has_value() && (weight->numel() != classes || weight->scalar_type() != dtype || !weight->is_contiguous()))
    refuse(op, ": weight must be contiguous, one a class, in the accumulator's dtype");
  for (const auto* out : {&dx, &dtarget})
    if (out->has_value() && ((*out)->dim() != 2 || (*out)->size(0) != n_rows || (*out)->size(1) != classes ||
                             (classes > 1 && (*out)->stride(1) != 1)))
      refuse(op, ": a gradient must be of x's shape, its classes side by side");

  const Column factor = column(op, factor_, n_rows, dtype), dlse = column(op, dlse_, n_rows, dtype),
               dentropy = column(op, dentropy_, n_rows, dtype);
  LossOptions options{classes, weight.has_value() ? weight->const_data_ptr() : nullptr, static_cast<double>(classes),
                      smoothing, scale, softcap, z_loss, entropy || dentropy_.has_value(), 0, 0, false};
  if (weight.has_value()) {
    options.weight_sum = 0;
    for (int64_t c = 0; c < classes; ++c)
      options.weight_sum += wide ? doubles(weight)[c] : static_cast<double>(floats(weight)[c]);
  }
  Tensor loss = empty_like_device(x, {n_rows}, dtype), lse = empty_like_device(x, {n_rows}, dtype);
  Tensor hits = empty_like_device(x, {accuracy ? n_rows : 0}, dtype);
  Tensor entropies = empty_like_device(x, {entropy ? n_rows : 0}, dtype);
  const auto put = [wide](void* values, int64_t i, double value) {
    if (wide)
      static_cast<double*>(values)[i] = value;
    else
      static_cast<float*>(values)[i] = static_cast<float>(value);
  };
  void* const losses = loss.mutable_data_ptr();
  void* const lses = lse.mutable_data_ptr();
  void* const all_hits = hits.mutable_data_ptr();
  void* const all_entropies = entropies.mutable_data_ptr();

  const Rows xs(x);
  const Tensor indices = probabilities || target.is_contiguous() ? target : torch::stable::contiguous(target);
  const std::optional<Rows> qs = probabilities ? std::optional<Rows>(target) : std::nullopt;
  const std::optional<Rows> dxs = dx.has_value() ? std::optional<Rows>(*dx) : std::nullopt;
  const std::optional<Rows> dqs = dtarget.has_value() ? std::optional<Rows>(*dtarget) : std::nullopt;
  options.x_dtype = xs.dtype;
  options.q_dtype = probabilities ? qs->dtype : kF32;
  options.past_caches = dx.has_value() && dx->const_data_ptr() != x.const_data_ptr() &&
                        past_caches(bytes_of(*dx), classes * element_size(dx->scalar_type()));
  const auto* ids = probabilities ? nullptr : static_cast<const int64_t*>(indices.const_data_ptr());
  const LossOfRow loss_of_row = cross_entropy_kernels().loss_of_row[wide];
  torch::stable::parallel_for(0, n_rows, row_grain(classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(4 * classes * (wide ? 8 : 4));
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = probabilities || (ids[i] != ignore_index && ids[i] >= 0 && ids[i] < classes);
      LossRow row{xs.at(i), probabilities ? qs->at(i) : nullptr, counts && !probabilities ? ids[i] : -1,
                  dxs.has_value() ? dxs->mutable_at(i) : nullptr, dqs.has_value() ? dqs->mutable_at(i) : nullptr,
                  factor[i], dlse[i], dentropy[i], 0, 0, 0, 0};
      loss_of_row(options, row, scratch.get());
      put(losses, i, row.loss);
      put(lses, i, row.lse);
      if (accuracy) put(all_hits, i, row.hit);
      if (entropy) put(all_entropies, i, row.entropy);
    }
    if (options.past_caches) order_past_caches();
  });
  return {loss, lse, hits, entropies};
}

// Whether every target is a class and none is ignored.
bool every_counts(const Tensor& target, int64_t ignore_index, int64_t classes) {
  const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
  return std::all_of(ids, ids + target.numel(),
                     [=](int64_t id) { return id >= 0 && id < classes && id != ignore_index; });
}

// The sum of n numbers over `total`, in double with what each sum loses carried on (Neumaier 1974).
template <class A>
double mean_of(const A* values, int64_t n, double total) {
  double sum = 0.0, lost = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(values[i]), next = sum + value;
    lost += std::abs(sum) >= std::abs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  // Infinite sums lose NaN.
  return (std::isfinite(sum) ? sum + lost : sum) / total;
}

Tensor number(const Tensor& like, double value, ScalarType dtype) {
  Tensor one = empty_like_device(like, {}, dtype);
  void* const to = one.mutable_data_ptr();
  switch (dtype) {
    case ScalarType::Double: *static_cast<double*>(to) = value; break;
    case ScalarType::BFloat16: narrow(static_cast<float>(value), *static_cast<BF16*>(to)); break;
    case ScalarType::Half: narrow(static_cast<float>(value), *static_cast<F16*>(to)); break;
    default: *static_cast<float*>(to) = static_cast<float>(value);
  }
  return one;
}

// What PyTorch's operators make of them in A: factor * (1 / total) for each row, 1 where there is no factor; and the
// losses with their sign turned, 0 for a loss of 0.
template <class A>
void shares_of(const A* factor, int64_t n, double total, A* out) {
  const A share = A(1) / static_cast<A>(total);
  for (int64_t i = 0; i < n; ++i) out[i] = factor == nullptr ? share : share * factor[i];
}
template <class A>
void turn(A* losses, int64_t n) {
  for (int64_t i = 0; i < n; ++i) losses[i] = A(0) - losses[i];
}

// The losses of the logits x (rows, D) weight (classes, D)^T, and the layer's gradients, where every target counts;
// where one does not, false and nothing is computed. (whether, loss, lse, hits, entropy, logits, dx, dweight), without
// elements what was not asked for:
// - `mean`: the loss is the sum of the rows' losses over `total`, in that dtype; else a loss a row, as the others, with
//   its sign turned if total is negative.
// - `logits` (rows, classes), where they are known; else they are computed, and come back if `keep`.
// - `need_x`, `need_weight`: gradients of the rows' losses, for `factor` (rows,) or 1, over `total`, and for dlse and
//   dentropy (rows,). The logits are overwritten then.
std::tuple<bool, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_loss_rows(
    const Tensor& x, const Tensor& weight, const Tensor& target_, const std::optional<Tensor>& known,
    const std::optional<Tensor>& factor, const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy,
    int64_t ignore_index, double smoothing, double softcap, double scale, double z_loss, double total,
    std::optional<ScalarType> mean, bool keep, bool accuracy, bool entropy, bool need_x, bool need_weight) {
  const char* op = "linear_loss_rows";
  if (x.dim() != 2 || weight.dim() != 2 || x.size(1) != weight.size(1) || x.scalar_type() != weight.scalar_type())
    refuse(op, ": x must be (rows, D) and weight (classes, D), of one dtype");
  const int64_t rows = x.size(0), classes = weight.size(0);
  if (target_.scalar_type() != ScalarType::Long || target_.numel() != rows)
    refuse(op, ": target must be int64, one a row");
  if (keep && (need_x || need_weight)) refuse(op, ": a gradient is written over the logits");
  const auto blank = [&] { return empty_like_device(x, {0}, x.scalar_type()); };
  const Tensor target = target_.is_contiguous() ? target_ : torch::stable::contiguous(target_);
  if (!every_counts(target, ignore_index, classes))
    return {false, blank(), blank(), blank(), blank(), blank(), blank(), blank()};
  Tensor logits = known.has_value() ? *known : empty_like_device(x, {rows, classes}, x.scalar_type());
  if (logits.dim() != 2 || logits.size(0) != rows || logits.size(1) != classes ||
      logits.scalar_type() != x.scalar_type() || !logits.is_contiguous())
    refuse(op, ": logits must be (rows, classes), contiguous, in x's dtype");
  if (!known.has_value()) multiply_into(logits, x, turned(weight));

  const bool wide = x.scalar_type() == ScalarType::Double, back = need_x || need_weight;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> shares, dlogits;
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
      cross_entropy_rows(logits, target, std::nullopt, shares, dlse, dentropy, dlogits, std::nullopt, ignore_index,
                         smoothing, softcap, scale, z_loss, accuracy, entropy);
  void* const losses = loss.mutable_data_ptr();
  if (mean.has_value())
    loss = number(x, wide ? mean_of(static_cast<const double*>(losses), rows, total)
                          : mean_of(static_cast<const float*>(losses), rows, total), *mean);
  else if (total < 0.0)
    wide ? turn(static_cast<double*>(losses), rows) : turn(static_cast<float*>(losses), rows);
  const auto [dx, dweight] = product_gradients(logits, x, weight, need_x, need_weight);
  return {true, loss, lse, hits, entropies, keep && !known.has_value() ? logits : blank(), dx, dweight};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cross_entropy_rows));
  m.impl("linear_loss_rows", TORCH_BOX(&fastllm::linear_loss_rows));
}
