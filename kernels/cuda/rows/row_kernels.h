// Operators on token rows: embedding, norm, rotary angles, SwiGLU. Launches only: no allocation, no
// waiting. All pointers are device memory. A row's result does not depend on the other rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/operands.h"

namespace wintserve::kernels::cuda {

struct EmbedArgs {
  const void* table = nullptr;  // [vocab_size, columns]
  bool is_bfloat16 = false;     // else float32
  int64_t vocab_size = 0;
  int64_t columns = 0;
  const int32_t* tokens = nullptr;  // [num_tokens]; an id beyond the table reads as the last one
  int64_t num_tokens = 0;
  Rows x;
};
// x[t, :] = table[tokens[t], :]
void LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);

// The longest row that LaunchAddRmsNorm takes; a quarter of it where columns or strides are no
// multiples of 4 or a pointer is not aligned to 16 bytes.
inline constexpr int64_t kMaxNormColumns = 32768;

struct AddRmsNormArgs {
  Rows x;
  ConstRows delta;                   // data may be null
  const int32_t* row_ids = nullptr;  // [num_rows]; null: row i
  int64_t num_rows = 0;
  int64_t columns = 0;
  const float* gain = nullptr;  // [columns]
  float epsilon = 0;
  Rows out;
};
// Backend::AddRmsNorm.
void LaunchAddRmsNorm(const AddRmsNormArgs& args, cudaStream_t stream);

struct RopeAnglesArgs {
  const int32_t* positions = nullptr;  // [num_tokens]
  int64_t num_tokens = 0;
  int head_dim = 0;  // even, at most 512
  float theta = 0;
  float compression_ratio = 1;
  Rows cos_sin;
};
// Backend::RopeAngles: the float32 angle's sine and cosine, correctly rounded but for rare ties.
void LaunchRopeAngles(const RopeAnglesArgs& args, cudaStream_t stream);

// out[r, c] = silu(gate_up[r, c]) * gate_up[r, width + c], c < width
void LaunchSwiGlu(ConstRows gate_up, int64_t num_rows, int64_t width, Rows out,
                  cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
