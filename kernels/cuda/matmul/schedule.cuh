// Which experts have tokens, and where the items of a product lie, in shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

struct Item {
  int expert = 0;
  int token_tile = 0;  // of the expert
  int row_block = 0;
};

struct Schedule {
  const int32_t* first_token;  // [num_experts + 1]
  const int32_t* first_tile;   // [num_experts + 1]: token tiles of the experts before
  int num_token_tiles;         // of all experts

  // Item `index` when each token tile has num_row_blocks items, experts in ascending order.
  // *expert is one that does not lie behind it, and becomes the item's.
  WINTSERVE_DEVICE Item Locate(int index, int num_row_blocks, int* expert) const {
    while (index >= first_tile[*expert + 1] * num_row_blocks) ++*expert;
    const int first = first_tile[*expert];
    const plan::ItemPlace place = plan::PlaceOfItem(
        index - first * num_row_blocks, first_tile[*expert + 1] - first, num_row_blocks);
    return {*expert, place.token_tile, place.row_block};
  }
};

// Called by all threads of a block; a barrier lies between the parts. Waits for the kernel before
// this one if the schedule is its work.
WINTSERVE_DEVICE Schedule BuildSchedule(const ProductParams& p, int token_tile, uint8_t* shared) {
  auto* first_token = reinterpret_cast<int32_t*>(shared);
  int32_t* first_tile = first_token + p.num_experts + 1;
  const int thread = ThreadIndex();
  if (p.is_schedule_new) WaitForPreviousKernel();
  if (p.first_token == nullptr) {
    if (thread == 0) {
      first_token[0] = 0;
      first_token[1] = p.num_tokens;
      first_tile[0] = 0;
      first_tile[1] = plan::DivideUp(p.num_tokens, token_tile);
    }
  } else if (thread < 32) {
    // All loads first, so that they wait for memory together.
    constexpr int kRounds = plan::kMaxExperts / 32;
    int begin[kRounds];
    int end[kRounds];
    WINTSERVE_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int expert = round * 32 + thread;
      begin[round] = expert < p.num_experts ? LoadFresh(p.first_token + expert) : 0;
      end[round] = expert < p.num_experts ? LoadFresh(p.first_token + expert + 1) : 0;
    }
    int before = 0;
    WINTSERVE_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      if (round * 32 >= p.num_experts) break;
      const int expert = round * 32 + thread;
      const int own = plan::DivideUp(end[round] - begin[round], token_tile);
      int tiles = own;
      WINTSERVE_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int other = ShuffleUp(tiles, step);
        if (thread >= step) tiles += other;
      }
      if (expert < p.num_experts) {
        first_token[expert] = begin[round];
        first_tile[expert] = before + tiles - own;
        if (expert == p.num_experts - 1) {
          first_token[p.num_experts] = end[round];
          first_tile[p.num_experts] = before + tiles;
        }
      }
      before += Shuffle(tiles, 31);
    }
  }
  SyncBlock();
  return {first_token, first_tile, first_tile[p.num_experts]};
}

// The expert of a token tile, which lies before schedule.num_token_tiles. For all lanes of a warp.
WINTSERVE_DEVICE int ExpertOfTile(const Schedule& schedule, int num_experts, int tile) {
  const int lane = ThreadIndex() % 32;
  int expert = 0;  // as many as end at or before the tile
  for (int base = 0; base < num_experts; base += 32) {
    const bool before = base + lane < num_experts && schedule.first_tile[base + lane + 1] <= tile;
    expert += CountBits(Ballot(before));
  }
  return expert;
}

// Row of the prepared activations of token `token` over all experts.
WINTSERVE_DEVICE int64_t SourceRow(const ProductParams& p, int token) {
  return p.source_row == nullptr ? token : p.source_row[token];
}

// The first tile of a warp. One beyond the last computes the last two again, for nobody.
WINTSERVE_DEVICE int ClampTile(const ProductParams& p, int tile, int num_tiles) {
  return tile < p.tiles ? tile : p.tiles - num_tiles;
}

WINTSERVE_DEVICE float SwiGlu(float gate, float up) { return gate / Add(1.0f, Exp(-gate)) * up; }

}  // namespace wintserve::kernels::cuda
