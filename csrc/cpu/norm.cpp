// norm_rows and norm_grad_rows on the CPU.
#include "norm.h"

#include <cstring>

#include "caches.h"
#include "strided.h"

namespace fastllm {
namespace {

bool is_wide(const Tensor& x, const std::optional<Tensor>& other) {
  return x.scalar_type() == ScalarType::Double || (other.has_value() && other->scalar_type() == ScalarType::Double);
}

// A weight or bias in the accumulator's dtype.
class Parameter {
 public:
  Parameter(const char* op, const std::optional<Tensor>& p, int64_t columns, bool wide) {
    if (!p.has_value()) return;
    if (p->numel() != columns || !is_supported_float(p->scalar_type()) || !p->is_contiguous() ||
        (!wide && p->scalar_type() == ScalarType::Double))
      refuse(op, ": weight and bias must be contiguous, one a column, and no wider than the accumulator");
    if (p->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float)) {
      data_ = p->const_data_ptr();
      return;
    }
    copy_.emplace(columns * (wide ? 8 : 4));
    norm_kernels().widen[wide](dtype_index(p->scalar_type()), p->const_data_ptr(), copy_->get(), columns);
    data_ = copy_->get();
  }

  const void* data() const { return data_; }

 private:
  std::optional<Scratch> copy_;
  const void* data_ = nullptr;
};

void check_rows(const char* op, const Tensor& x, const std::optional<Tensor>& other) {
  if (x.dim() < 1 || !is_supported_float(x.scalar_type()) || x.size(x.dim() - 1) < 1)
    refuse(op, ": expected rows of float64, float32, float16 or bfloat16");
  if (other.has_value() && (shape_of(*other) != shape_of(x) || !is_supported_float(other->scalar_type())))
    refuse(op, ": the tensors must have one shape");
}

// A number of each row, or of none; a tensor's own functions take longer than a short row.
class Stats {
 public:
  Stats() = default;
  Stats(const Tensor& tensor, bool wide)
      : data_(tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr()), wide_(wide) {}
  void put(int64_t i, double value) const {
    if (data_ == nullptr) return;
    if (wide_)
      static_cast<double*>(data_)[i] = value;
    else
      static_cast<float*>(data_)[i] = static_cast<float>(value);
  }
  double get(int64_t i) const {
    if (data_ == nullptr) return 0.0;
    return wide_ ? static_cast<const double*>(data_)[i] : static_cast<double>(static_cast<const float*>(data_)[i]);
  }

 private:
  void* data_ = nullptr;
  bool wide_ = false;
};

// What is normed, and how. weight has its offset added already. weight and bias may be narrower than the accumulator.
struct Norming {
  const Tensor& x;
  const std::optional<Tensor>&residual, &weight, &bias, &seed;
  double eps, dropout_p;
  bool center;

  bool wide() const { return is_wide(x, residual); }
};

// y as x; h as residual, and of no meaning without one.
void norm_of_rows(const char* op, const Norming& call, const Rows& xs, Tensor& y, Tensor& h, const Stats& mean,
                  const Stats& rstd) {
  const auto& [x, residual, weight, bias, seed, eps, dropout_p, center] = call;
  const int64_t columns = xs.columns;
  const bool wide = call.wide(), added = residual.has_value();
  const std::optional<Dropout> dropout = read_dropout(op, seed, dropout_p);
  if (xs.count == 0) return;
  const std::optional<Rows> residuals = added ? std::optional<Rows>(*residual) : std::nullopt;
  advise_huge_pages(y);
  if (added) advise_huge_pages(h);
  const Rows ys(y);
  const std::optional<Rows> hs = added ? std::optional<Rows>(h) : std::nullopt;
  const Parameter scale(op, weight, columns, wide), shift(op, bias, columns, wide);
  const int h_dtype = added ? residuals->dtype : xs.dtype;
  const bool past = past_caches(bytes_of(y) + (added ? bytes_of(h) : 0), columns * element_size(x.scalar_type()));
  const NormOptions options{columns, scale.data(), shift.data(), eps,
                            pointer_to(dropout), center, xs.dtype, h_dtype, past};
  const NormOfRow norm_of_row = norm_kernels().norm_of_row[wide];
  torch::stable::parallel_for(0, xs.count, row_grain(columns), [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * columns * (wide ? 8 : 4));
    for (int64_t i = begin; i < end; ++i) {
      NormRow row{xs.at(i), added ? residuals->at(i) : nullptr, ys.mutable_at(i), added ? hs->mutable_at(i) : nullptr,
                  i, 0, 0};
      norm_of_row(options, row, scratch.get());
      mean.put(i, row.mean);
      rstd.put(i, row.rstd);
    }
    if (past) order_past_caches();
  });
}

// (y, h, empty without a residual; mean, empty unless centered, and rstd (rows,) in the accumulator's dtype).
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_rows(const Tensor& x, const std::optional<Tensor>& residual,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const std::optional<Tensor>& seed, double eps, double dropout_p,
                                                     bool center) {
  const char* op = "norm_rows";
  check_rows(op, x, residual);
  const Norming call{x, residual, weight, bias, seed, eps, dropout_p, center};
  const bool wide = call.wide();
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Rows xs(x);
  Tensor y = empty_like_device(x, shape_of(x), x.scalar_type());
  Tensor h = residual.has_value() ? empty_like_device(x, shape_of(x), residual->scalar_type())
                                  : empty_like_device(x, {0}, x.scalar_type());
  Tensor mean = empty_like_device(x, {center ? xs.count : 0}, dtype);
  Tensor rstd = empty_like_device(x, {xs.count}, dtype);
  norm_of_rows(op, call, xs, y, h, Stats(mean, wide), Stats(rstd, wide));
  return {y, h, mean, rstd};
}

// Its y alone, of rows that nothing is added to: each further result takes 0.4 us.
Tensor normed_rows(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                   bool center) {
  const char* op = "normed_rows";
  check_rows(op, x, std::nullopt);
  Tensor y = empty_like_device(x, shape_of(x), x.scalar_type());
  norm_of_rows(op, {x, std::nullopt, weight, bias, std::nullopt, eps, 0.0, center}, Rows(x), y, y, Stats(), Stats());
  return y;
}

// Rows are summed into dweight and dbias part by part, and the parts in order: the same bits for any number of threads.
constexpr int64_t kParts = 64;

// (dinput, dresidual as normed, dweight, dbias); empty where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_grad_rows(
    const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& normed, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& seed_, const Tensor& mean_, const Tensor& rstd_, ScalarType input_dtype,
    ScalarType weight_dtype, ScalarType bias_dtype, double dropout_p, bool center, bool need_input,
    bool need_residual, bool need_weight, bool need_bias) {
  const char* op = "norm_grad_rows";
  check_rows(op, normed, dy);
  check_rows(op, normed, dh);
  const int64_t columns = normed.size(normed.dim() - 1);
  const bool wide = rstd_.scalar_type() == ScalarType::Double;
  const std::optional<Dropout> dropout = read_dropout(op, seed_, dropout_p);
  const Rows dys(dy), xs(normed);
  const std::optional<Rows> dhs = dh.has_value() ? std::optional<Rows>(*dh) : std::nullopt;
  if (rstd_.numel() != xs.count || (center && mean_.numel() != xs.count)) refuse(op, ": one mean and rstd a row");
  // A row of dinput is written as dy's are read, one of dresidual as normed's are.
  if (dy.scalar_type() != input_dtype || (dh.has_value() && dh->scalar_type() != normed.scalar_type()))
    refuse(op, ": dy is of the input's dtype, dh of what was normed");
  if (!is_supported_float(weight_dtype) || !is_supported_float(bias_dtype))
    refuse(op, ": gradients are float64, float32, float16 or bfloat16");
  const Stats mean(mean_, wide), rstd(rstd_, wide);
  const auto grad = [&](bool needed, ScalarType type) {
    return empty_like_device(dy, needed ? shape_of(normed) : std::vector<int64_t>{0}, type);
  };
  Tensor dinput = grad(need_input, input_dtype), dresidual = grad(need_residual, normed.scalar_type());
  Tensor dweight = empty_like_device(dy, {need_weight ? columns : 0}, weight_dtype);
  Tensor dbias = empty_like_device(dy, {need_bias ? columns : 0}, bias_dtype);
  advise_huge_pages(dinput);
  advise_huge_pages(dresidual);
  const Rows dinputs(dinput), dresiduals(dresidual);
  const Parameter scale(op, weight, columns, wide);
  const bool past = past_caches(bytes_of(dinput) + bytes_of(dresidual), columns * element_size(input_dtype));
  const NormOptions options{columns, scale.data(), nullptr, 0.0, pointer_to(dropout),
                            center, dys.dtype, xs.dtype, past};
  const int64_t element = wide ? 8 : 4, wanted = need_weight + need_bias;
  const int64_t rows_of_part = std::max<int64_t>((xs.count + kParts - 1) / kParts, 4);
  const int64_t parts = (xs.count + rows_of_part - 1) / rows_of_part;
  const int64_t part_bytes = wanted * columns * element;
  const Scratch sums(parts * part_bytes);
  const auto sum_of = [&](int64_t part, int64_t which) {
    return static_cast<char*>(sums.get()) + part * part_bytes + which * columns * element;
  };
  const NormGradOfRow norm_grad_of_row = norm_kernels().norm_grad_of_row[wide];
  const int64_t grain = std::max<int64_t>(1, row_grain(columns) / rows_of_part);
  torch::stable::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
    const Scratch scratch(3 * columns * element);
    for (int64_t part = first; part < last; ++part) {
      std::memset(sum_of(part, 0), 0, static_cast<size_t>(part_bytes));
      const int64_t end = std::min(xs.count, (part + 1) * rows_of_part);
      for (int64_t i = part * rows_of_part; i < end; ++i) {
        const NormGradRow row{dys.at(i), dh.has_value() ? dhs->at(i) : nullptr, xs.at(i),
                              need_input ? dinputs.mutable_at(i) : nullptr,
                              need_residual ? dresiduals.mutable_at(i) : nullptr,
                              need_weight ? sum_of(part, 0) : nullptr, need_bias ? sum_of(part, need_weight) : nullptr,
                              i, mean.get(i), rstd.get(i)};
        norm_grad_of_row(options, row, scratch.get());
      }
    }
    if (past) order_past_caches();
  });
  const auto add_up = [&](Tensor& out, int64_t which, auto zero) {
    using A = decltype(zero);
    char* const to = static_cast<char*>(out.mutable_data_ptr());
    const Dtype to_dtype = dtype_index(out.scalar_type());
    const int64_t to_bytes = element_size(out.scalar_type());
    const NarrowRow narrow = norm_kernels().narrow[wide];
    if (parts == 1) return narrow(to_dtype, sum_of(0, which), to, columns);
    torch::stable::parallel_for(0, columns, 4096, [&](int64_t begin, int64_t end) {
      const Scratch room((end - begin) * element);
      A* const total = static_cast<A*>(room.get());
      for (int64_t c = begin; c < end; ++c) total[c - begin] = zero;
      for (int64_t part = 0; part < parts; ++part) {
        const A* from = reinterpret_cast<const A*>(sum_of(part, which));
        for (int64_t c = begin; c < end; ++c) total[c - begin] += from[c];
      }
      narrow(to_dtype, total, to + begin * to_bytes, end - begin);
    });
  };
  for (int64_t which = 0; which < wanted; ++which) {
    Tensor& out = which == 0 && need_weight ? dweight : dbias;
    if (wide)
      add_up(out, which, 0.0);
    else
      add_up(out, which, 0.0f);
  }
  return {dinput, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("norm_rows", TORCH_BOX(&fastllm::norm_rows));
  m.impl("normed_rows", TORCH_BOX(&fastllm::normed_rows));
  m.impl("norm_grad_rows", TORCH_BOX(&fastllm::norm_grad_rows));
}
