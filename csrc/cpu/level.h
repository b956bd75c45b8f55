// The instruction sets of a CPU, each with those before it, and how far this process may go.
#pragma once

namespace fastllm {

enum class Level { kBaseline, kAvx2, kAvx512, kAmx };

// The highest level that the environment allows, whatever this machine has: FASTLLM_CPU (baseline, avx2, avx512, amx)
// and ATEN_CPU_CAPABILITY (default, avx2, avx512), the lower of the two. PyTorch's avx512 leaves matrix units on, and
// so does ours. Read once. Throws std::invalid_argument for another value of FASTLLM_CPU.
Level allowed();

// The highest level that this extension uses here: allowed(), and no more than it was built for and this machine has.
Level level();

const char* name_of(Level);

}  // namespace fastllm
