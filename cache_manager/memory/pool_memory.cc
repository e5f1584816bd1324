#include "cache_manager/memory/pool_memory.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {

std::string DescribeBlocks(const PoolSize& size) {
  const std::vector<uint64_t>& by_rank = size.block_bytes_by_rank;
  const bool equal =
      std::adjacent_find(by_rank.begin(), by_rank.end(), std::not_equal_to<>()) == by_rank.end();
  const std::string bytes =
      equal ? fmt::to_string(by_rank.front()) : fmt::format("{}", fmt::join(by_rank, "+"));
  return fmt::format("{} blocks of {} bytes on {} rank{}", size.num_blocks, bytes, by_rank.size(),
                     by_rank.size() == 1 ? "" : "s");
}

double TotalBytes(uint32_t count, const PoolSize& size) {
  double bytes = 0;
  for (const uint64_t block_bytes : size.block_bytes_by_rank) {
    CHECK(block_bytes > 0);
    bytes += static_cast<double>(count) * static_cast<double>(block_bytes);
  }
  return bytes;
}

absl::StatusOr<std::vector<MappedMemory>> CreateHostMemory(const char* tier, uint32_t count,
                                                           const PoolSize& size) {
  std::vector<MappedMemory> ranks;
  for (size_t rank = 0; rank < size.block_bytes_by_rank.size(); ++rank) {
    ASSIGN_OR_RETURN(
        MappedMemory memory,
        MappedMemory::Create(fmt::format("wintserve-{}-rank{}", tier, rank),
                             static_cast<int64_t>(count * size.block_bytes_by_rank[rank])));
    ranks.push_back(std::move(memory));
  }
  return ranks;
}

TierMemory TierOf(const MappedMemory& memory) {
  return {.kind = SharedMemory::Kind::kHost,
          .size_bytes = memory.size_bytes(),
          .parts = {{memory.fd(), memory.size_bytes()}}};
}

}  // namespace wintserve
