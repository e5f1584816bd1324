// Arguments of the kernels of a weight product, as they are passed by value. All pointers are
// device memory. Plain structs: host code fills them, kernels and their emulation read them.
#pragma once

#include <cstdint>

#include "kernels/formats/matrix.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

// What the offsets of decoded weights (plan::Offsets) add to a group's sum, negated, in two forms
// of the same number: float32, and two binary16 in a word,
//     2^14 * low half + 2^3 * high half,
// which an mma multiplies with a constant operand to spread it over an accumulator.
struct alignas(16) ChunkCorrections {
  uint32_t halves[plan::kGroupsPerChunk];
  float values[plan::kGroupsPerChunk];
};
static_assert(sizeof(ChunkCorrections) == 16);

// Rows of activations in the B operand's order, made by PrepareRow:
//   values [row][chunk][group][pair][t][8 positions]  IEEE binary16 of x * 2^e, e of the row; in
//       the order kWgmma [row][chunk][group][pair][select][b][t][2 positions]
//   inverse_scale [row]                               2^-e
//   corrections [row][chunk]
struct PreparedRows {
  uint16_t* values = nullptr;
  float* inverse_scale = nullptr;
  ChunkCorrections* corrections = nullptr;
};

struct PrepareParams {
  const float* x = nullptr;  // [num_rows][k], rows x_stride floats apart
  int64_t x_stride = 0;
  int k = 0;
  int chunks = 0;
  formats::KOrder k_order = formats::KOrder::kMma64;
  plan::Offsets offsets;
  plan::OperandOrder order = plan::OperandOrder::kMma;
  int threads = 0;  // of a block; PrepareThreads is best
  PreparedRows out;
};

// Packed matrices (plan::WeightLayout) of the experts, all of one layout.
struct ExpertTable {
  const uint8_t* weights[plan::kMaxExperts] = {};
};

enum class Epilogue {
  kStore,   // y = sums
  kSwiGlu,  // y = silu(gate sums) * up sums; the layout is a gate-up layout
};

// Tokens of expert e are first_token[e] … first_token[e + 1] - 1. Token i reads row source_row[i]
// of x and writes row i of y.
struct ProductParams {
  ExpertTable experts;
  int num_experts = 1;
  int64_t records_offset = 0;  // of plan::WeightLayout
  int tiles = 0;
  int chunks = 0;
  int columns = 0;  // plan::WeightLayout::width
  int slices = 1;
  // Of the cached kernel: as in ProductPlan.
  int groups = 1;
  int token_slots = plan::kBlockTokens;

  PreparedRows x;
  // The stream kernel's blocks prepare the only row themselves, in shared memory: all but `out`.
  bool prepares_row = false;
  PrepareParams row;
  const int32_t* source_row = nullptr;   // [tokens]; null: row i
  const int32_t* first_token = nullptr;  // [num_experts + 1]; null: one expert has all tokens
  int num_tokens = 0;
  // The kernel right before this one writes first_token and source_row: they are not to be read
  // before it has ended.
  bool is_schedule_new = false;

  Epilogue epilogue = Epilogue::kStore;
  float* y = nullptr;  // [num_tokens][columns]
  int64_t y_stride = 0;

  // Not null: every block of the tile kernel computes one slice and leaves its sums here,
  // [slice][token][tile][row]; AddSlices makes y of them.
  float* split_sums = nullptr;
};

// Sorts (row, choice) pairs by expert. Pair i is row i / top_k.
struct SortParams {
  const int32_t* expert_ids = nullptr;  // [num_pairs], each in 0 … num_experts - 1
  int num_pairs = 0;
  int num_experts = 0;
  int top_k = 0;
  int threads = 0;                   // of a block
  int32_t* first_token = nullptr;    // [num_experts + 1]
  int32_t* source_row = nullptr;     // [num_pairs] by place
  int32_t* place_of_pair = nullptr;  // [num_pairs]
};

// y[r] = sum over a row's pairs, in ascending order of place, of weight * expert_out[place]; then
// + shared_out[r] unless null.
struct CombineParams {
  const float* expert_out = nullptr;  // [num_pairs][columns], dense
  const int32_t* place_of_pair = nullptr;
  const float* pair_weights = nullptr;  // [num_pairs]
  int top_k = 0;
  const float* shared_out = nullptr;  // [num_rows][columns], dense
  int columns = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

inline constexpr int kRowThreads = 256;  // threads of a block of the kernels over columns of rows
inline constexpr int kMaxRowWarps = 32;  // warps of a block of the kernels over whole rows
inline constexpr int kMaxTopK = 32;

}  // namespace wintserve::kernels::cuda
