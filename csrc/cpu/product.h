#pragma once

namespace fastllm {

// What multiplies bfloat16 for add_product_ on this machine: "amx", "avx512_bf16", or "none", and then there is no
// add_product_. level.h says what may lower it.
const char* bf16_products();

}  // namespace fastllm
