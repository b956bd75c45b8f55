// Attention of one plane (one batch entry and head) in bfloat16 on the matrix units (AMX) of a CPU.
#pragma once

#include <cstdint>

#include "amx.h"

namespace fastllm {

// Rows of one plane: `rows` of them, `stride` elements apart, each with its columns side by side.
struct Plane {
  const uint16_t* data;
  int64_t stride;
};

struct PlaneOut {
  uint16_t* data;
  int64_t stride;
};

struct PlaneShape {
  int64_t queries;
  int64_t keys;
  int64_t columns;  // of queries, keys and values alike
  float scale;
  bool causal;  // key j is hidden from query i < j
};

// Bytes of scratch for one plane, to be aligned to 64.
int64_t amx_forward_scratch(const PlaneShape&);
int64_t amx_backward_scratch(const PlaneShape&);

void amx_forward(const PlaneShape&, Plane q, Plane k, Plane v, PlaneOut out, void* scratch);
void amx_backward(const PlaneShape&, Plane dout, Plane q, Plane k, Plane v, PlaneOut dq, PlaneOut dk, PlaneOut dv,
                  void* scratch);

}  // namespace fastllm
