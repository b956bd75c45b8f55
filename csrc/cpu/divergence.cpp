// divergence_rows on the CPU: how a student's row of logits differs from its teacher's, and the gradients of both in
// the same pass over the row.
#include "divergence.h"

#include "strided.h"

namespace fastllm {
namespace {

// student (rows, classes); teacher of its shape, or with indices (rows, k) int64 probabilities (rows, k); factor
// (rows,) in the accumulator's dtype. The gradients for it go to dstudent and dteacher, which may be the logits.
// softcap 0: none.
Tensor divergence_rows(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& indices_,
                       const std::optional<Tensor>& factor, const std::optional<Tensor>& dstudent,
                       const std::optional<Tensor>& dteacher, int64_t direction, double beta, double temperature,
                       double softcap, double teacher_softcap) {
  const char* op = "divergence_rows";
  for (const Tensor* x : {&student, &teacher})
    if (x->dim() != 2 || !is_supported_float(x->scalar_type()) || x->size(0) != student.size(0))
      refuse(op, ": student and teacher must be matrices of as many rows, float64, float32, float16 or bfloat16");
  const int64_t n_rows = student.size(0), classes = student.size(1), kept = indices_.has_value() ? teacher.size(1) : 0;
  if (classes < 1 || direction < 0 || direction >= kDirections) refuse(op, ": no classes, or no such direction");
  if (indices_.has_value()) {
    if (indices_->dim() != 2 || indices_->size(0) != n_rows || indices_->size(1) != kept ||
        indices_->scalar_type() != ScalarType::Long || dteacher.has_value())
      refuse(op, ": indices must be int64 of the probabilities' shape, which get no gradient");
  } else if (teacher.size(1) != classes) {
    refuse(op, ": teacher must have as many classes as student");
  }
  for (const auto* out : {&dstudent, &dteacher})
    if (out->has_value() && ((*out)->dim() != 2 || (*out)->size(0) != n_rows || (*out)->size(1) != classes ||
                             (classes > 1 && (*out)->stride(1) != 1)))
      refuse(op, ": a gradient must be of the logits' shape, its classes side by side");
  const bool wide = student.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  if (factor.has_value() ? factor->numel() != n_rows || factor->scalar_type() != dtype || !factor->is_contiguous()
                         : dstudent.has_value() || dteacher.has_value())
    refuse(op, ": a gradient needs a factor, contiguous, one a row, in the accumulator's dtype");

  Tensor values = empty_like_device(student, {n_rows}, dtype);
  const Rows xs(student), teachers(teacher);
  const std::optional<Tensor> indices =
      indices_.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*indices_)) : std::nullopt;
  const auto* ids = indices.has_value() ? static_cast<const int64_t*>(indices->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < n_rows * kept; ++i)
    if (ids[i] < 0 || ids[i] >= classes) refuse(op, ": an index is not a class");
  const std::optional<Rows> dxs = dstudent.has_value() ? std::optional<Rows>(*dstudent) : std::nullopt;
  const std::optional<Rows> dts = dteacher.has_value() ? std::optional<Rows>(*dteacher) : std::nullopt;
  const DivergenceOptions options{classes, kept, static_cast<int>(direction), beta, temperature, softcap,
                                  teacher_softcap, xs.dtype, teachers.dtype,
                                  dxs.has_value() ? dxs->dtype : xs.dtype,
                                  dts.has_value() ? dts->dtype : teachers.dtype};
  const void* factors = factor.has_value() ? factor->const_data_ptr() : nullptr;
  void* results = values.mutable_data_ptr();
  const DivergenceOfRow divergence_of_row = divergence_kernels().divergence_of_row[wide];
  torch::stable::parallel_for(0, n_rows, row_grain(classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch((5 * classes + kept) * (wide ? 8 : 4));
    for (int64_t i = begin; i < end; ++i) {
      const double share = factors == nullptr ? 0.0
                           : wide             ? static_cast<const double*>(factors)[i]
                                              : static_cast<double>(static_cast<const float*>(factors)[i]);
      DivergenceRow row{xs.at(i), teachers.at(i), ids == nullptr ? nullptr : ids + i * kept,
                        dxs.has_value() ? dxs->mutable_at(i) : nullptr, dts.has_value() ? dts->mutable_at(i) : nullptr,
                        share, 0.0};
      divergence_of_row(options, row, scratch.get());
      if (wide)
        static_cast<double*>(results)[i] = row.value;
      else
        static_cast<float*>(results)[i] = static_cast<float>(row.value);
    }
  });
  return values;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("divergence_rows", TORCH_BOX(&fastllm::divergence_rows)); }
