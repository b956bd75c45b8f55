#pragma once

#include <cstdint>

namespace fastllm {

// The part of a vocabulary that a table holds: ids start .. start + rows - 1. Without `partial` every id must be one
// of them; with it, any other id that is not negative belongs to another part.
struct Vocabulary {
  int64_t start;
  int64_t rows;
  bool partial;
};

}  // namespace fastllm
