#include <cstdlib>
#include <cstring>

#include "cross_entropy.h"
#include "gated.h"
#include "norm.h"
#include "rotary.h"
#include "rows.h"

namespace fastllm {

#define FASTLLM_DECLARE                                   \
  extern const RowKernels kernels;                        \
  extern const CrossEntropyKernels cross_entropy_kernels; \
  extern const GatedKernels gated_kernels;                \
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

enum class Isa { kDefault, kAvx2, kAvx512 };

static Isa choose() {
#if defined(FASTLLM_X86_VARIANTS)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_default = wish != nullptr && std::strcmp(wish, "default") == 0;
  const bool only_avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !only_default && !only_avx2) return Isa::kAvx512;
  if (avx2 && !only_default) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

static Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

#if defined(FASTLLM_X86_VARIANTS)
#define FASTLLM_CHOSEN(table) \
  (isa() == Isa::kAvx512 ? isa_avx512::table : isa() == Isa::kAvx2 ? isa_avx2::table : isa_default::table)
#else
#define FASTLLM_CHOSEN(table) isa_default::table
#endif

const RowKernels& row_kernels() { return FASTLLM_CHOSEN(kernels); }
const CrossEntropyKernels& cross_entropy_kernels() { return FASTLLM_CHOSEN(cross_entropy_kernels); }
const GatedKernels& gated_kernels() { return FASTLLM_CHOSEN(gated_kernels); }
const NormKernels& norm_kernels() { return FASTLLM_CHOSEN(norm_kernels); }
const RotaryKernels& rotary_kernels() { return FASTLLM_CHOSEN(rotary_kernels); }

}  // namespace fastllm
