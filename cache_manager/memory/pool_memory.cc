#include "cache_manager/memory/pool_memory.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr double kGib = 1 << 30;

// "32 blocks of 57344 bytes on 2 ranks", or the sizes joined by "+" where ranks differ.
std::string Describe(uint32_t num_blocks, const std::vector<uint64_t>& block_bytes_by_rank) {
  const bool equal = std::adjacent_find(block_bytes_by_rank.begin(), block_bytes_by_rank.end(),
                                        std::not_equal_to<>()) == block_bytes_by_rank.end();
  const std::string bytes = equal ? fmt::to_string(block_bytes_by_rank.front())
                                  : fmt::format("{}", fmt::join(block_bytes_by_rank, "+"));
  return fmt::format("{} blocks of {} bytes on {} rank{}", num_blocks, bytes,
                     block_bytes_by_rank.size(), block_bytes_by_rank.size() == 1 ? "" : "s");
}

}  // namespace

absl::StatusOr<PoolMemory> PoolMemory::Create(uint32_t num_blocks,
                                              const std::vector<uint64_t>& block_bytes_by_rank,
                                              int64_t available_bytes) {
  CHECK(num_blocks > 0 && !block_bytes_by_rank.empty(), "num_blocks={} ranks={}", num_blocks,
        block_bytes_by_rank.size());
  // A double holds any product of the two, so that a hostile size cannot wrap around to a small
  // one.
  double pool_bytes = 0;
  for (const uint64_t block_bytes : block_bytes_by_rank) {
    CHECK(block_bytes > 0);
    pool_bytes += static_cast<double>(num_blocks) * static_cast<double>(block_bytes);
  }
  // The kernel would promise the memory and kill a process later, when the pool fills up.
  if (pool_bytes > static_cast<double>(available_bytes)) {
    return absl::ResourceExhaustedError(fmt::format(
        "KV pool of {:.2f} GiB does not fit into the {:.2f} GiB of memory that is available ({}); "
        "lower --num-gpu-blocks-override, --max-num-seqs or --max-model-len",
        pool_bytes / kGib, available_bytes / kGib, Describe(num_blocks, block_bytes_by_rank)));
  }

  PoolMemory pool;
  for (size_t rank = 0; rank < block_bytes_by_rank.size(); ++rank) {
    const auto size_bytes = static_cast<int64_t>(num_blocks * block_bytes_by_rank[rank]);
    auto memory = MappedMemory::Create(fmt::format("wintserve-kv-rank{}", rank), size_bytes);
    if (!memory.ok()) {
      return absl::ResourceExhaustedError(fmt::format(
          "KV pool of {:.2f} GiB cannot be created ({}): {}", pool_bytes / kGib,
          Describe(num_blocks, block_bytes_by_rank), std::string(memory.status().message())));
    }
    pool.ranks_.push_back(*std::move(memory));
  }
  return pool;
}

}  // namespace wintserve
