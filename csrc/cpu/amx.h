// The matrix units (AMX) of a CPU.
#pragma once

namespace fastllm {

// Whether this machine and its kernel let a process use them; asks for the permission.
bool amx_usable();

// Around a thread's work on them.
void amx_begin();
void amx_end();

}  // namespace fastllm
