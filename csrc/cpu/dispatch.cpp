#include "attention_rows.h"
#include "attention_step.h"
#include "cross_entropy.h"
#include "divergence.h"
#include "gated.h"
#include "level.h"
#include "linear_rows.h"
#include "norm.h"
#include "rotary.h"
#include "rows.h"

namespace fastllm {

#define FASTLLM_DECLARE                                   \
  extern const AttentionKernels attention_kernels;        \
  extern const AttentionGradKernels attention_grad_kernels; \
  extern const AttentionStepKernels attention_step_kernels; \
  extern const RowKernels kernels;                        \
  extern const CrossEntropyKernels cross_entropy_kernels; \
  extern const DivergenceKernels divergence_kernels;      \
  extern const GatedKernels gated_kernels;                \
  extern const LinearKernels linear_kernels;              \
  extern const NormKernels norm_kernels;                  \
  extern const RotaryKernels rotary_kernels;
namespace isa_default {
FASTLLM_DECLARE
}
#if defined(FASTLLM_X86_VARIANTS)
namespace isa_avx2 {
FASTLLM_DECLARE
}
namespace isa_avx512 {
FASTLLM_DECLARE
}
#endif

#if defined(FASTLLM_X86_VARIANTS)
#define FASTLLM_CHOSEN(table) \
  (level() >= Level::kAvx512  ? isa_avx512::table \
   : level() == Level::kAvx2 ? isa_avx2::table    \
                             : isa_default::table)
#else
#define FASTLLM_CHOSEN(table) isa_default::table
#endif

const RowKernels& row_kernels() { return FASTLLM_CHOSEN(kernels); }
const AttentionKernels& attention_kernels() { return FASTLLM_CHOSEN(attention_kernels); }
const AttentionGradKernels& attention_grad_kernels() { return FASTLLM_CHOSEN(attention_grad_kernels); }
const AttentionStepKernels& attention_step_kernels() { return FASTLLM_CHOSEN(attention_step_kernels); }
const CrossEntropyKernels& cross_entropy_kernels() { return FASTLLM_CHOSEN(cross_entropy_kernels); }
const DivergenceKernels& divergence_kernels() { return FASTLLM_CHOSEN(divergence_kernels); }
const GatedKernels& gated_kernels() { return FASTLLM_CHOSEN(gated_kernels); }
const LinearKernels& linear_kernels() { return FASTLLM_CHOSEN(linear_kernels); }
const NormKernels& norm_kernels() { return FASTLLM_CHOSEN(norm_kernels); }
const RotaryKernels& rotary_kernels() { return FASTLLM_CHOSEN(rotary_kernels); }

}  // namespace fastllm
