// How many KV blocks the pool gets.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

struct PoolSizing {
  int max_num_seqs = 0;
  int max_model_len = 0;  // tokens
  int block_size_tokens = 64;
  bool ranks_share_memory = true;                      // of one host; false: a GPU each
  std::vector<uint64_t> block_bytes_by_rank = {};      // none is 0
  std::vector<uint64_t> available_bytes_by_rank = {};  // as the ranks' Hellos say; one a rank
  std::optional<int> num_blocks_override = {};         // --num-gpu-blocks-override
};

// GPUs of their own: all that each rank has left for KV blocks, so as many as the rank with the
// least can hold. One host's memory, which the ranks measure each after it has loaded its weights
// (the least that one of them found is what is available to all of them together): the least of
// what max_num_seqs sequences of max_model_len need, a quarter of the memory that is available,
// 4 GiB; all three over all ranks. The override replaces both rules.
// INVALID_ARGUMENT: that does not hold one sequence of max_model_len.
absl::StatusOr<uint32_t> DecideNumBlocks(const PoolSizing& sizing);

}  // namespace wintserve
