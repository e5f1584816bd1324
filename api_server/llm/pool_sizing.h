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
  std::vector<uint64_t> block_bytes_by_rank = {};  // none is 0
  uint64_t memory_bytes = 0;                       // of the machine or container
  std::optional<int> num_blocks_override = {};     // --num-gpu-blocks-override
};

// The least of: what max_num_seqs sequences of max_model_len need, a quarter of the memory, 4 GiB;
// both over all ranks. The override replaces all three.
// INVALID_ARGUMENT: that does not hold one sequence of max_model_len.
absl::StatusOr<uint32_t> DecideNumBlocks(const PoolSizing& sizing);

// The machine's memory, or the limit of the control group that the process runs in.
uint64_t AvailableMemoryBytes();

}  // namespace wintserve
