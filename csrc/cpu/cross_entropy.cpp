// cross_entropy_rows on the CPU: the loss of each row of logits, and its gradient in the same pass over the row.
// cross_entropy_loss: the same of class indices, with the mean or the sum of all rows.
// linear_loss_rows: the same of a linear layer's logits, with the layer's gradients.
#include "cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "caches.h"
#include "../scalar.h"
#include "matmul.h"
#include "strided.h"

namespace fastllm {
namespace {

// Rows for each ignored one from which ignored rows are multiplied too, as zeros, and not left out. They take 3% of a
// large product then. Of a small one the copies and the calls that leave them out take more: 13% of 128 x 768 x 4096 in
// bfloat16 at AVX-512. A text of 128 tokens has one without a next token. A guess between these.
constexpr int64_t kLeastPerIgnored = 32;

const double* doubles(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const double*>(t->const_data_ptr()) : nullptr;
}

const float* floats(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A vector of the accumulator's dtype, one element a row, or one number for all rows.
struct Column {
  const float* narrow;
  const double* wide;
  double all = 0.0;
  double operator[](int64_t i) const { return wide ? wide[i] : narrow ? static_cast<double>(narrow[i]) : all; }
};

Column column(const char* op, const std::optional<Tensor>& t, int64_t rows, ScalarType dtype) {
  if (!t.has_value()) return {nullptr, nullptr};
  if (t->numel() != rows || t->scalar_type() != dtype || !t->is_contiguous())
    refuse(op, ": factors must be contiguous, one a row, in the accumulator's dtype");
  const bool wide = dtype == ScalarType::Double;
  return {wide ? nullptr : floats(t), wide ? doubles(t) : nullptr};
}

// What the rows of a call share, checked.
struct Labelled {
  const Tensor& x;       // (rows, classes)
  const Tensor& target;  // (rows,) int64, or probabilities of x's shape
  bool probabilities;
  ScalarType dtype;  // of the accumulator
  LossOptions options;

  Labelled(const char* op, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
           double smoothing, double softcap, double scale, double z_loss)
      : x(x), target(target), probabilities(is_supported_float(target.scalar_type())) {
    if (x.dim() != 2 || !is_supported_float(x.scalar_type()) || x.size(1) < 1)
      refuse(op, ": x must be (rows, classes), float64, float32, float16 or bfloat16");
    const int64_t n_rows = rows(), classes = x.size(1);
    const bool wide = x.scalar_type() == ScalarType::Double ||
                      (probabilities && target.scalar_type() == ScalarType::Double);
    dtype = wide ? ScalarType::Double : ScalarType::Float;
    if (probabilities ? target.dim() != 2 || target.size(0) != n_rows || target.size(1) != classes
                      : target.scalar_type() != ScalarType::Long || target.numel() != n_rows)
      refuse(op, ": target must be int64, one a row, or floating point of x's shape");
    if (weight.has_value() &&
        (weight->numel() != classes || weight->scalar_type() != dtype || !weight->is_contiguous()))
      refuse(op, ": weight must be contiguous, one a class, in the accumulator's dtype");
    options = {classes, weight.has_value() ? weight->const_data_ptr() : nullptr, static_cast<double>(classes),
               smoothing, scale, softcap, z_loss, false, 0, 0, false};
    if (weight.has_value()) {
      options.weight_sum = 0;
      for (int64_t c = 0; c < classes; ++c)
        options.weight_sum += wide ? doubles(weight)[c] : static_cast<double>(floats(weight)[c]);
    }
  }

  int64_t rows() const { return x.size(0); }
  bool wide() const { return dtype == ScalarType::Double; }
};

// Gradients of rows: those that come in, and where the others go.
struct RowGradients {
  Column factor, dlse, dentropy;
  const std::optional<Tensor>&dx, &dtarget;
};

// What comes of each row, in the accumulator's dtype; null for what is not asked for.
struct RowResults {
  void *loss, *lse, *hit, *entropy;
};

// Which rows count: `ignored` targets do not, and nothing at all comes of them if `skip`.
struct Counting {
  int64_t ignored;
  bool skip;
};

void put(void* values, bool wide, int64_t i, double value) {
  if (wide)
    static_cast<double*>(values)[i] = value;
  else
    static_cast<float*>(values)[i] = static_cast<float>(value);
}

void losses_of_rows(const Labelled& call, const RowGradients& gradients, const RowResults& results,
                    Counting counting) {
  const auto& [x, target, probabilities, dtype, given] = call;
  const std::optional<Tensor>&dx = gradients.dx, &dtarget = gradients.dtarget;
  const int64_t classes = given.classes;
  const bool wide = call.wide();
  const Rows xs(x);
  const Tensor indices = probabilities || target.is_contiguous() ? target : torch::stable::contiguous(target);
  const std::optional<Rows> qs = probabilities ? std::optional<Rows>(target) : std::nullopt;
  const std::optional<Rows> dxs = dx.has_value() ? std::optional<Rows>(*dx) : std::nullopt;
  const std::optional<Rows> dqs = dtarget.has_value() ? std::optional<Rows>(*dtarget) : std::nullopt;
  LossOptions options = given;
  options.x_dtype = xs.dtype;
  options.q_dtype = probabilities ? qs->dtype : kF32;
  options.past_caches = dx.has_value() && dx->const_data_ptr() != x.const_data_ptr() &&
                        past_caches(bytes_of(*dx), classes * element_size(dx->scalar_type()));
  const auto* ids = probabilities ? nullptr : static_cast<const int64_t*>(indices.const_data_ptr());
  const LossOfRow loss_of_row = cross_entropy_kernels().loss_of_row[wide];
  torch::stable::parallel_for(0, call.rows(), row_grain(classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(4 * classes * (wide ? 8 : 4));
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = probabilities || (ids[i] != counting.ignored && ids[i] >= 0 && ids[i] < classes);
      LossRow row{xs.at(i), probabilities ? qs->at(i) : nullptr, counts && !probabilities ? ids[i] : -1,
                  dxs.has_value() ? dxs->mutable_at(i) : nullptr, dqs.has_value() ? dqs->mutable_at(i) : nullptr,
                  gradients.factor[i], gradients.dlse[i], gradients.dentropy[i], 0, 0, 0, 0};
      if (counts || !counting.skip)
        loss_of_row(options, row, scratch.get());
      else if (row.dx != nullptr)
        std::memset(row.dx, 0, static_cast<size_t>(classes * element_size(dx->scalar_type())));
      put(results.loss, wide, i, row.loss);
      if (results.lse != nullptr) put(results.lse, wide, i, row.lse);
      if (results.hit != nullptr) put(results.hit, wide, i, row.hit);
      if (results.entropy != nullptr) put(results.entropy, wide, i, row.entropy);
    }
    if (options.past_caches) order_past_caches();
  });
}

// x (rows, classes); target (rows,) int64, or probabilities of x's shape; weight (classes,), factor, dlse and dentropy
// (rows,) in the accumulator's dtype. The gradient for them goes to dx, which may be x, and to dtarget. softcap 0:
// none.
std::tuple<Tensor, Tensor, Tensor, Tensor> counted_rows(
    const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dtarget, Counting counting, double smoothing, double softcap, double scale,
    double z_loss, bool accuracy, bool entropy) {
  const char* op = "cross_entropy_rows";
  Labelled call(op, x, target, weight, smoothing, softcap, scale, z_loss);
  const int64_t rows = call.rows(), classes = call.options.classes;
  for (const auto* out : {&dx, &dtarget})
    if (out->has_value() && ((*out)->dim() != 2 || (*out)->size(0) != rows || (*out)->size(1) != classes ||
                             (classes > 1 && (*out)->stride(1) != 1)))
      refuse(op, ": a gradient must be of x's shape, its classes side by side");
  call.options.entropy = entropy || dentropy.has_value();
  const ScalarType dtype = call.dtype;
  Tensor loss = empty_like_device(x, {rows}, dtype), lse = empty_like_device(x, {rows}, dtype);
  Tensor hits = empty_like_device(x, {accuracy ? rows : 0}, dtype);
  Tensor entropies = empty_like_device(x, {entropy ? rows : 0}, dtype);
  losses_of_rows(call,
                 {column(op, factor, rows, dtype), column(op, dlse, rows, dtype), column(op, dentropy, rows, dtype),
                  dx, dtarget},
                 {loss.mutable_data_ptr(), lse.mutable_data_ptr(), accuracy ? hits.mutable_data_ptr() : nullptr,
                  entropy ? entropies.mutable_data_ptr() : nullptr},
                 counting);
  return {loss, lse, hits, entropies};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_rows(
    const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dtarget, int64_t ignore_index, double smoothing, double softcap, double scale,
    double z_loss, bool accuracy, bool entropy) {
  return counted_rows(x, target, weight, factor, dlse, dentropy, dx, dtarget, {ignore_index, false}, smoothing,
                      softcap, scale, z_loss, accuracy, entropy);
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

// to[i] = value, rounded to the accumulator's dtype and then to `dtype`.
void round_into(void* to, ScalarType dtype, int64_t i, double value) {
  switch (dtype) {
    case ScalarType::Double: static_cast<double*>(to)[i] = value; break;
    case ScalarType::BFloat16: narrow(static_cast<float>(value), static_cast<BF16*>(to)[i]); break;
    case ScalarType::Half: narrow(static_cast<float>(value), static_cast<F16*>(to)[i]); break;
    default: static_cast<float*>(to)[i] = static_cast<float>(value);
  }
}

Tensor number(const Tensor& like, double value, ScalarType dtype) {
  Tensor one = empty_like_device(like, {}, dtype);
  round_into(one.mutable_data_ptr(), dtype, 0, value);
  return one;
}

// As torch's at::Reduction.
enum Reduction : int64_t { kNone, kMean, kSum };

// What a mean divides by: the number of targets that are not ignored, or the sum of their classes' weights. Of 0 beside
// smoothing NaN, as Loss.divisor in Python.
double total_of(const Labelled& call, const int64_t* ids, int64_t ignore_index) {
  double total = 0.0;
  for (int64_t i = 0; i < call.rows(); ++i)
    if (ids[i] != ignore_index)
      total += call.options.weight == nullptr ? 1.0
               : call.wide() ? static_cast<const double*>(call.options.weight)[ids[i]]
                             : static_cast<double>(static_cast<const float*>(call.options.weight)[ids[i]]);
  if (total == 0.0 && call.options.smoothing != 0.0) return std::numeric_limits<double>::quiet_NaN();
  return call.wide() ? total : static_cast<double>(static_cast<float>(total));
}

// The loss of the logits x (rows, classes) for the classes target (rows,), in `dtype`: a number a row, or their mean or
// sum. (the first row whose target is no class, -1 where there is none; what a mean divides by, else 1; loss;
// logsumexp of each row in the accumulator's dtype; gradient of a mean or a sum, for an upstream gradient of 1). Of a
// target that is no class comes nothing else.
std::tuple<int64_t, double, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> cross_entropy_loss(
    const Tensor& x, const Tensor& target_, const std::optional<Tensor>& weight, int64_t reduction, ScalarType dtype,
    int64_t ignore_index, double smoothing, double softcap, double scale, double z_loss, bool need_lse, bool need_x) {
  const char* op = "cross_entropy_loss";
  const Tensor target = target_.is_contiguous() ? target_ : torch::stable::contiguous(target_);
  const Labelled call(op, x, target, weight, smoothing, softcap, scale, z_loss);
  if (call.probabilities || reduction < kNone || reduction > kSum || (need_x && reduction == kNone))
    refuse(op, ": target must be int64, and a gradient is that of a mean or a sum");
  const int64_t rows = call.rows(), classes = call.options.classes;
  const bool wide = call.wide();
  const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    if ((ids[i] < 0 || ids[i] >= classes) && ids[i] != ignore_index)
      return {i, 1.0, std::nullopt, std::nullopt, std::nullopt};

  const double total = reduction == kMean ? total_of(call, ids, ignore_index) : 1.0;
  std::optional<Tensor> lse, dx;
  if (need_lse) lse = empty_like_device(x, {rows}, call.dtype);
  if (need_x) dx = empty_like_device(x, {rows, classes}, x.scalar_type());
  // What PyTorch's operators make of 1 / total.
  const double share = wide ? 1.0 / total : static_cast<double>(1.0f / static_cast<float>(total));
  const Column none{nullptr, nullptr};
  Tensor loss = empty_like_device(x, reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, dtype);
  const bool in_place = reduction == kNone && dtype == call.dtype;
  const Scratch room(in_place ? 0 : rows * element_size(call.dtype));
  void* const losses = in_place ? loss.mutable_data_ptr() : room.get();
  losses_of_rows(call, {need_x ? Column{nullptr, nullptr, share} : none, none, none, dx, std::nullopt},
                 {losses, need_lse ? lse->mutable_data_ptr() : nullptr, nullptr, nullptr}, {ignore_index, false});
  if (reduction != kNone)
    round_into(loss.mutable_data_ptr(), dtype, 0,
               wide ? mean_of(static_cast<const double*>(losses), rows, total)
                    : mean_of(static_cast<const float*>(losses), rows, total));
  else if (!in_place)
    for (int64_t i = 0; i < rows; ++i)
      round_into(loss.mutable_data_ptr(), dtype, i,
                 wide ? static_cast<const double*>(losses)[i] : static_cast<const float*>(losses)[i]);
  return {-1, total, loss, lse, dx};
}

// cross_entropy_loss of an ordinary call, in x's dtype: Python takes 0.15 us for each argument and result.
// (the first row whose target is no class, or -1; loss; gradient, without elements where it is not asked for)
std::tuple<int64_t, Tensor, Tensor> cross_entropy_of_classes(const Tensor& x, const Tensor& target,
                                                             int64_t ignore_index, int64_t reduction, bool need_x) {
  auto [bad, total, loss, lse, dx] = cross_entropy_loss(x, target, std::nullopt, reduction, x.scalar_type(),
                                                        ignore_index, 0.0, 0.0, 1.0, 0.0, false, need_x);
  const auto blank = [&] { return empty_like_device(x, {0}, x.scalar_type()); };
  return {bad, loss.has_value() ? *loss : blank(), dx.has_value() ? *dx : blank()};
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

// How many of the targets count, or -1 where linear_loss_rows does not serve the rows x (rows, D): a target is no class,
// or ignored rows are better left out of the products. They are if they are many, and if 0 times one of their numbers
// is not 0.
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
      counted_rows(logits, target, std::nullopt, shares, dlse, dentropy, dlogits, std::nullopt, {ignore_index, skip},
                   smoothing, softcap, scale, z_loss, accuracy, entropy);
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
  m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cross_entropy_rows));
  m.impl("cross_entropy_loss", TORCH_BOX(&fastllm::cross_entropy_loss));
  m.impl("cross_entropy_of_classes", TORCH_BOX(&fastllm::cross_entropy_of_classes));
  m.impl("linear_loss_counts", TORCH_BOX(&fastllm::linear_loss_counts));
  m.impl("linear_loss_rows", TORCH_BOX(&fastllm::linear_loss_rows));
}
