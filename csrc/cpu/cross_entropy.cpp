// cross_entropy_rows on the CPU: the loss of each row of logits, and its gradient in the same pass over the row.
#include "cross_entropy.h"

#include "caches.h"
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

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cross_entropy_rows)); }
