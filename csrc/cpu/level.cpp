#include "level.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(FASTLLM_X86_VARIANTS)
#include <cpuid.h>
#endif

#include "amx.h"

namespace fastllm {
namespace {

constexpr Level kLevels[] = {Level::kBaseline, Level::kAvx2, Level::kAvx512, Level::kAmx};

Level cap() {
  const char* wish = std::getenv("FASTLLM_CPU");
  if (wish == nullptr || *wish == '\0') return Level::kAmx;
  for (Level one : kLevels)
    if (std::string(wish) == name_of(one)) return one;
  throw std::invalid_argument("FASTLLM_CPU: expected baseline, avx2, avx512 or amx, got '" + std::string(wish) + "'");
}

Level torchs_cap() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = wish == nullptr ? "" : wish;
  return name == "default" ? Level::kBaseline : name == "avx2" ? Level::kAvx2 : Level::kAmx;
}

#if defined(FASTLLM_X86_VARIANTS)
// Conversions of float16, whose name not every compiler's __builtin_cpu_supports() knows.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Level machine() {
#if defined(FASTLLM_X86_VARIANTS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx2) return Level::kBaseline;
  if (!avx512) return Level::kAvx2;
#if defined(FASTLLM_AMX)
  if (amx_usable()) return Level::kAmx;
#endif
  return Level::kAvx512;
#else
  return Level::kBaseline;
#endif
}

}  // namespace

const char* name_of(Level level) {
  switch (level) {
    case Level::kBaseline: return "baseline";
    case Level::kAvx2: return "avx2";
    case Level::kAvx512: return "avx512";
    default: return "amx";
  }
}

Level allowed() {
  static const Level lowest = std::min(cap(), torchs_cap());
  return lowest;
}

Level level() {
  static const Level chosen = std::min(allowed(), machine());
  return chosen;
}

}  // namespace fastllm
