#include "api_server/llm/pool_sizing.h"

#include <fmt/core.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr uint64_t kMaxPoolBytes = uint64_t{4} << 30;

constexpr uint64_t kMaxNumBlocks = std::numeric_limits<int32_t>::max();

absl::StatusOr<uint32_t> BlocksOfGpus(const PoolSizing& sizing, uint64_t blocks_per_sequence) {
  uint64_t num_blocks = kMaxNumBlocks;
  for (size_t rank = 0; rank < sizing.block_bytes_by_rank.size(); ++rank) {
    num_blocks = std::min(num_blocks,
                          sizing.available_bytes_by_rank[rank] / sizing.block_bytes_by_rank[rank]);
  }
  if (num_blocks < blocks_per_sequence) {
    const uint64_t least = *std::min_element(sizing.available_bytes_by_rank.begin(),
                                             sizing.available_bytes_by_rank.end());
    return absl::InvalidArgumentError(fmt::format(
        "{} MiB of a GPU's memory are left for the KV pool: {} blocks, a sequence of "
        "--max-model-len {} needs {}: raise --gpu-memory-utilization or lower --max-model-len",
        least >> 20, num_blocks, sizing.max_model_len, blocks_per_sequence));
  }
  return static_cast<uint32_t>(num_blocks);
}

}  // namespace

absl::StatusOr<uint32_t> DecideNumBlocks(const PoolSizing& sizing) {
  const uint64_t blocks_per_sequence =
      (sizing.max_model_len + sizing.block_size_tokens - 1) / sizing.block_size_tokens;
  const uint64_t block_bytes = std::accumulate(sizing.block_bytes_by_rank.begin(),
                                               sizing.block_bytes_by_rank.end(), uint64_t{0});
  if (sizing.num_blocks_override.has_value()) {
    const int num_blocks = *sizing.num_blocks_override;
    if (num_blocks < 0 || static_cast<uint64_t>(num_blocks) < blocks_per_sequence) {
      return absl::InvalidArgumentError(fmt::format(
          "--num-gpu-blocks-override {} holds no sequence of --max-model-len {}: {} blocks of {} "
          "tokens are needed",
          num_blocks, sizing.max_model_len, blocks_per_sequence, sizing.block_size_tokens));
    }
    return static_cast<uint32_t>(num_blocks);
  }
  CHECK(!sizing.available_bytes_by_rank.empty());
  if (!sizing.ranks_share_memory) return BlocksOfGpus(sizing, blocks_per_sequence);
  const uint64_t available_bytes = *std::min_element(sizing.available_bytes_by_rank.begin(),
                                                     sizing.available_bytes_by_rank.end());
  const uint64_t pool_bytes = std::min(available_bytes / 4, kMaxPoolBytes);
  const uint64_t num_blocks = std::min(
      {blocks_per_sequence * sizing.max_num_seqs, pool_bytes / block_bytes, kMaxNumBlocks});
  if (num_blocks < blocks_per_sequence) {
    return absl::InvalidArgumentError(fmt::format(
        "the KV pool of {} MiB (a quarter of the memory that is available, at most 4096 MiB) holds "
        "{} blocks of {} KiB, a sequence of --max-model-len {} needs {}: lower --max-model-len or "
        "set --num-gpu-blocks-override",
        pool_bytes >> 20, num_blocks, block_bytes >> 10, sizing.max_model_len,
        blocks_per_sequence));
  }
  return static_cast<uint32_t>(num_blocks);
}

}  // namespace wintserve
