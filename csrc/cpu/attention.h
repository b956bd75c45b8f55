#pragma once

namespace fastllm {

// Whether the operators of attention.cpp run on this machine.
bool attention_usable();

}  // namespace fastllm
