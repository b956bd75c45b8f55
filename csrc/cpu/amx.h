// The matrix units (AMX) of a CPU.
#pragma once

namespace fastllm {

// Whether this machine, its kernel and level.h's caps let a process use them; asks for the permission.
bool amx_usable();

// Whether this machine has products of pairs of bfloat16 (AVX-512 BF16), and level() reaches AVX-512.
bool bf16_pairs_usable();

// Around a thread's work on matrix units.
void amx_begin();
void amx_end();

}  // namespace fastllm
