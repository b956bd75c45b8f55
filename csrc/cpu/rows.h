// Kernels on whole rows, built once per vector instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "../order.h"

namespace fastllm {

enum Dtype : int { kF32, kF64, kBF16, kF16, kDtypes };

// The rows that one id gathered: token t stands for the `repeats` rows t, t + period, t + 2 * period, ...
struct Segment {
  const void* grad;  // rows x stride elements
  int64_t stride;
  const int64_t* tokens;
  int64_t count;
  int64_t repeats;
  int64_t period;
};

// out[c] = (accumulate ? out[c] : 0) + scale * (sum of the segment's column begin + c) for `columns` columns, summed in
// the order of order.h. `scratch` holds 3 * columns doubles.
using SumRows = void (*)(void* out, const Segment&, int64_t begin, int64_t columns, double scale, bool accumulate,
                         void* scratch);

// out = sum over tables of scale * row; a null row adds nothing. `dropout`, where not null, is of `row`.
using CombineRows = void (*)(void* out, const void* const* rows, const double* scales, int64_t tables, int64_t columns,
                             const Dropout* dropout, int64_t row);

// out = what dropout leaves of x, a row of `columns`.
using DropRow = void (*)(const void* x, void* out, int64_t columns, const Dropout&, int64_t row);

// By the dtype of the rows; sum_rows also by whether out is float32 although the rows are not.
struct RowKernels {
  const char* name;
  SumRows sum_rows[kDtypes][2];
  CombineRows combine_rows[kDtypes];
  DropRow drop_row[kDtypes];
};

// The best of level.h's level().
const RowKernels& row_kernels();

}  // namespace fastllm
