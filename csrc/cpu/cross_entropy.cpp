// cross_entropy_rows on the CPU: the loss of each row of logits, and its gradient in the same pass over the row.
// cross_entropy_loss: the same of class indices, with the mean or the sum of all rows.
#include "cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "caches.h"
#include "../scalar.h"
#include "loss_rows.h"
#include "strided.h"

namespace fastllm {

Column column(const char* op, const std::optional<Tensor>& t, int64_t rows, ScalarType dtype) {
  if (!t.has_value()) return {nullptr, nullptr};
  if (t->numel() != rows || t->scalar_type() != dtype || !t->is_contiguous())
    refuse(op, ": factors must be contiguous, one a row, in the accumulator's dtype");
  const bool wide = dtype == ScalarType::Double;
  return {wide ? nullptr : floats(t), wide ? doubles(t) : nullptr};
}

namespace {

// What the rows of a call share, checked.
struct Labelled {
  const Tensor& x;       // (rows, classes)
  const Tensor& target;  // (rows,) int64, or probabilities of x's shape
  bool probabilities;
  ScalarType dtype;  // of the accumulator
  LossOptions options;

  Labelled(const char* op, const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
           const LossNumbers& numbers)
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
               numbers.smoothing, numbers.scale, numbers.softcap, numbers.z_loss, false, 0, 0, false};
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

void put(void* values, bool wide, int64_t i, double value) {
  if (wide)
    static_cast<double*>(values)[i] = value;
  else
    static_cast<float*>(values)[i] = static_cast<float>(value);
}

// Whether rows are taken a lane each. Time of that over a row by itself, forward and gradient in float32, one thread of
// an AMD EPYC, 32, 64, 65, 100 and 120 classes: AVX-512 0.66, 0.80, 0.55, 0.60, 0.57, AVX2 0.78, 0.94, 0.70, 0.86, 1.1.
// More classes that fill their vectors gained nothing, and 256 took 1.2 and 1.3 times as long.
bool in_lanes(int64_t classes) {
  return classes <= 64 || (classes <= FewRows::kMostClasses && classes % 16 != 0);
}

// losses_of_rows of plain rows of few classes, in float32.
void losses_of_few(const Labelled& call, const LossOptions& options, const RowGradients& gradients,
                   const RowResults& results, int64_t ignored) {
  const int64_t classes = options.classes;
  const Rows xs(call.x);
  const Tensor indices = call.target.is_contiguous() ? call.target : torch::stable::contiguous(call.target);
  const std::optional<Rows> dxs = gradients.dx.has_value() ? std::optional<Rows>(*gradients.dx) : std::nullopt;
  const auto* ids = static_cast<const int64_t*>(indices.const_data_ptr());
  const LossesOfFew losses = cross_entropy_kernels().losses_of_few;
  const auto step = [&](const Rows& rows) {
    return call.rows() > 1 ? static_cast<const char*>(rows.at(1)) - static_cast<const char*>(rows.at(0)) : 0;
  };
  const int64_t x_step = step(xs), dx_step = dxs.has_value() ? step(*dxs) : 0;
  const auto from = [](auto* all, int64_t i) { return all == nullptr ? nullptr : all + i; };
  const auto results_from = [&](void* all, int64_t i) { return from(static_cast<float*>(all), i); };
  torch::stable::parallel_for(0, call.rows(), row_grain(classes), [&](int64_t begin, int64_t end) {
    losses(options, {end - begin, static_cast<const char*>(xs.at(begin)), x_step,
                     dxs.has_value() ? static_cast<char*>(dxs->mutable_at(begin)) : nullptr, dx_step, ids + begin,
                     ignored, from(gradients.factor.narrow, begin), from(gradients.dlse.narrow, begin),
                     static_cast<float>(gradients.factor.all), static_cast<float>(gradients.dlse.all),
                     results_from(results.loss, begin), results_from(results.lse, begin),
                     results_from(results.hit, begin)});
  });
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
  if (!wide && !counting.skip && in_lanes(classes) && is_plain(options, probabilities))
    return losses_of_few(call, options, gradients, results, counting.ignored);
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> counted_rows(const Tensor& x, const Tensor& target,
                                                        const std::optional<Tensor>& weight,
                                                        const LossGradients& gradients, const LossNumbers& numbers,
                                                        Counting counting) {
  const char* op = "cross_entropy_rows";
  Labelled call(op, x, target, weight, numbers);
  const int64_t rows = call.rows(), classes = call.options.classes;
  const auto& [factor, dlse, dentropy, dx, dtarget] = gradients;
  for (const auto* out : {&dx, &dtarget})
    if (out->has_value() && ((*out)->dim() != 2 || (*out)->size(0) != rows || (*out)->size(1) != classes ||
                             (classes > 1 && (*out)->stride(1) != 1)))
      refuse(op, ": a gradient must be of x's shape, its classes side by side");
  call.options.entropy = counting.entropy || dentropy.has_value();
  const ScalarType dtype = call.dtype;
  Tensor loss = empty_like_device(x, {rows}, dtype), lse = empty_like_device(x, {rows}, dtype);
  Tensor hits = empty_like_device(x, {counting.accuracy ? rows : 0}, dtype);
  Tensor entropies = empty_like_device(x, {counting.entropy ? rows : 0}, dtype);
  losses_of_rows(call,
                 {column(op, factor, rows, dtype), column(op, dlse, rows, dtype), column(op, dentropy, rows, dtype),
                  dx, dtarget},
                 {loss.mutable_data_ptr(), lse.mutable_data_ptr(),
                  counting.accuracy ? hits.mutable_data_ptr() : nullptr,
                  counting.entropy ? entropies.mutable_data_ptr() : nullptr},
                 counting);
  return {loss, lse, hits, entropies};
}

void round_into(void* to, ScalarType dtype, int64_t i, double value) {
  switch (dtype) {
    case ScalarType::Double: static_cast<double*>(to)[i] = value; break;
    case ScalarType::BFloat16: narrow(static_cast<float>(value), static_cast<BF16*>(to)[i]); break;
    case ScalarType::Half: narrow(static_cast<float>(value), static_cast<F16*>(to)[i]); break;
    default: static_cast<float*>(to)[i] = static_cast<float>(value);
  }
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_rows(
    const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dtarget, int64_t ignore_index, double smoothing, double softcap, double scale,
    double z_loss, bool accuracy, bool entropy) {
  return counted_rows(x, target, weight, {factor, dlse, dentropy, dx, dtarget}, {smoothing, softcap, scale, z_loss},
                      {ignore_index, false, accuracy, entropy});
}

// As torch's at::Reduction.
enum Reduction : int64_t { kNone, kMean, kSum };

// The first row whose target is no class, or -1, and how many targets are not ignored.
struct Counted {
  int64_t bad, count;
};

Counted counted(const int64_t* ids, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t ignored = 0, wrong = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool passed = ids[i] == ignore_index;
    ignored += passed;
    wrong += !passed && static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(classes);
  }
  for (int64_t i = 0; wrong != 0 && i < rows; ++i)
    if ((ids[i] < 0 || ids[i] >= classes) && ids[i] != ignore_index) return {i, rows - ignored};
  return {-1, rows - ignored};
}

// What a mean divides by: the `count` of targets that are not ignored, or the sum of their classes' weights. Of 0
// beside smoothing NaN, as Loss.divisor in Python.
double total_of(const Labelled& call, const int64_t* ids, int64_t count, int64_t ignore_index) {
  double total = static_cast<double>(count);
  if (call.options.weight != nullptr) {
    total = 0.0;
    for (int64_t i = 0; i < call.rows(); ++i)
      if (ids[i] != ignore_index)
        total += call.wide() ? static_cast<const double*>(call.options.weight)[ids[i]]
                             : static_cast<double>(static_cast<const float*>(call.options.weight)[ids[i]]);
  }
  if (total == 0.0 && call.options.smoothing != 0.0) return std::numeric_limits<double>::quiet_NaN();
  return call.wide() ? total : static_cast<double>(static_cast<float>(total));
}

// What PyTorch's operators make of number / total.
double share_of(double number, double total, bool wide) {
  return wide ? number / total : static_cast<double>(static_cast<float>(number) / static_cast<float>(total));
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
  const Labelled call(op, x, target, weight, {smoothing, softcap, scale, z_loss});
  if (call.probabilities || reduction < kNone || reduction > kSum || (need_x && reduction == kNone))
    refuse(op, ": target must be int64, and a gradient is that of a mean or a sum");
  const int64_t rows = call.rows(), classes = call.options.classes;
  const bool wide = call.wide();
  const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
  const auto [bad, count] = counted(ids, rows, classes, ignore_index);
  if (bad >= 0) return {bad, 1.0, std::nullopt, std::nullopt, std::nullopt};

  const double total = reduction == kMean ? total_of(call, ids, count, ignore_index) : 1.0;
  std::optional<Tensor> lse, dx;
  if (need_lse) lse = empty_like_device(x, {rows}, call.dtype);
  if (need_x) dx = empty_like_device(x, {rows, classes}, x.scalar_type());
  const double share = share_of(1.0, total, wide);
  const Column none{nullptr, nullptr};
  Tensor loss = empty_like_device(x, reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, dtype);
  const bool in_place = reduction == kNone && dtype == call.dtype;
  const Scratch room(in_place ? 0 : rows * element_size(call.dtype));
  void* const losses = in_place ? loss.mutable_data_ptr() : room.get();
  losses_of_rows(call, {need_x ? Column{nullptr, nullptr, share} : none, none, none, dx, std::nullopt},
                 {losses, need_lse ? lse->mutable_data_ptr() : nullptr, nullptr, nullptr},
                 {ignore_index, false, false, false});
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

double number_of(const Tensor& t) {
  const void* at = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double: return *static_cast<const double*>(at);
    case ScalarType::BFloat16: return static_cast<double>(widen(*static_cast<const BF16*>(at)));
    case ScalarType::Half: return static_cast<double>(widen(*static_cast<const F16*>(at)));
    default: return static_cast<double>(*static_cast<const float*>(at));
  }
}

// The gradient of x for that of cross_entropy_of_classes' loss: `dloss` is one number, 1 where there is none, or of a
// loss a row contiguous and in the accumulator's dtype. A target that is no class counts as an ignored one.
Tensor cross_entropy_of_classes_grad(const Tensor& x, const Tensor& target_, const std::optional<Tensor>& dloss,
                                     int64_t ignore_index, int64_t reduction) {
  const char* op = "cross_entropy_of_classes_grad";
  const Tensor target = target_.is_contiguous() ? target_ : torch::stable::contiguous(target_);
  const Labelled call(op, x, target, std::nullopt, {0.0, 0.0, 1.0, 0.0});
  const int64_t rows = call.rows(), classes = call.options.classes;
  const bool fits = !dloss.has_value()     ? reduction != kNone
                    : reduction != kNone ? dloss->numel() == 1 && is_supported_float(dloss->scalar_type())
                                         : true;
  if (call.probabilities || reduction < kNone || reduction > kSum || !fits)
    refuse(op, ": target must be int64, and dloss a number, or of a loss a row one a row");
  Column factor{nullptr, nullptr, dloss.has_value() && reduction != kNone ? number_of(*dloss) : 1.0};
  if (reduction == kNone) factor = column(op, dloss, rows, call.dtype);
  if (reduction == kMean) {
    const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
    const int64_t count = counted(ids, rows, classes, ignore_index).count;
    factor.all = share_of(factor.all, static_cast<double>(count), call.wide());
  }
  const std::optional<Tensor> dx = empty_like_device(x, {rows, classes}, x.scalar_type());
  const Scratch losses(rows * element_size(call.dtype));
  const Column none{nullptr, nullptr};
  losses_of_rows(call, {factor, none, none, dx, std::nullopt}, {losses.get(), nullptr, nullptr, nullptr},
                 {ignore_index, false, false, false});
  return *dx;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cross_entropy_rows));
  m.impl("cross_entropy_loss", TORCH_BOX(&fastllm::cross_entropy_loss));
  m.impl("cross_entropy_of_classes", TORCH_BOX(&fastllm::cross_entropy_of_classes));
  m.impl("cross_entropy_of_classes_grad", TORCH_BOX(&fastllm::cross_entropy_of_classes_grad));
}
