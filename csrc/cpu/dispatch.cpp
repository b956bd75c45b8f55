#include <cstdlib>
#include <cstring>

#include "rows.h"

namespace fastllm {

namespace isa_default {
extern const RowKernels kernels;
}
#if defined(FASTLLM_X86_VARIANTS)
namespace isa_avx2 {
extern const RowKernels kernels;
}
namespace isa_avx512 {
extern const RowKernels kernels;
}
#endif

static const RowKernels& choose() {
#if defined(FASTLLM_X86_VARIANTS)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_default = wish != nullptr && std::strcmp(wish, "default") == 0;
  const bool only_avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !only_default && !only_avx2) return isa_avx512::kernels;
  if (avx2 && !only_default) return isa_avx2::kernels;
#endif
  return isa_default::kernels;
}

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace fastllm
