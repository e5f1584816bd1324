#include "cache_manager/memory/pool_memory.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <utility>

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

// A double holds any product of the two, so that a hostile size cannot wrap around to a small one.
double TotalBytes(uint32_t num_blocks, const std::vector<uint64_t>& block_bytes_by_rank) {
  double bytes = 0;
  for (const uint64_t block_bytes : block_bytes_by_rank) {
    CHECK(block_bytes > 0);
    bytes += static_cast<double>(num_blocks) * static_cast<double>(block_bytes);
  }
  return bytes;
}

absl::StatusOr<std::vector<MappedMemory>> CreateRanks(
    const char* tier, uint32_t num_blocks, const std::vector<uint64_t>& block_bytes_by_rank) {
  std::vector<MappedMemory> ranks;
  for (size_t rank = 0; rank < block_bytes_by_rank.size(); ++rank) {
    ASSIGN_OR_RETURN(
        MappedMemory memory,
        MappedMemory::Create(fmt::format("wintserve-{}-rank{}", tier, rank),
                             static_cast<int64_t>(num_blocks * block_bytes_by_rank[rank])));
    ::madvise(memory.data(), memory.size_bytes(), MADV_DONTDUMP);  // without it dumps are larger
    ranks.push_back(std::move(memory));
  }
  return ranks;
}

}  // namespace

absl::StatusOr<PoolMemory> PoolMemory::Create(uint32_t num_blocks,
                                              const std::vector<uint64_t>& block_bytes_by_rank,
                                              int64_t available_bytes, uint32_t num_host_slots) {
  CHECK(num_blocks > 0 && !block_bytes_by_rank.empty(), "num_blocks={} ranks={}", num_blocks,
        block_bytes_by_rank.size());
  const double pool_bytes = TotalBytes(num_blocks, block_bytes_by_rank);
  const double host_bytes = TotalBytes(num_host_slots, block_bytes_by_rank);
  std::string what = fmt::format("KV pool of {:.2f} GiB", pool_bytes / kGib);
  std::string flags = "--num-gpu-blocks-override, --max-num-seqs or --max-model-len";
  if (num_host_slots > 0) {
    what += fmt::format(" with a host tier of {:.2f} GiB", host_bytes / kGib);
    flags = "--swap-space, " + flags;
  }
  // The kernel would promise the memory and kill a process later, when the pool fills up.
  if (pool_bytes + host_bytes > static_cast<double>(available_bytes)) {
    return absl::ResourceExhaustedError(fmt::format(
        "{} does not fit into the {:.2f} GiB of memory that is available ({}); lower {}", what,
        available_bytes / kGib, Describe(num_blocks, block_bytes_by_rank), flags));
  }

  PoolMemory pool;
  auto ranks = CreateRanks("kv", num_blocks, block_bytes_by_rank);
  absl::Status status = ranks.status();
  if (ranks.ok()) pool.ranks_ = *std::move(ranks);
  if (status.ok() && num_host_slots > 0) {
    auto host_ranks = CreateRanks("host", num_host_slots, block_bytes_by_rank);
    status = host_ranks.status();
    if (host_ranks.ok()) pool.host_ranks_ = *std::move(host_ranks);
  }
  if (!status.ok()) {
    return absl::ResourceExhaustedError(fmt::format("{} cannot be created ({}): {}", what,
                                                    Describe(num_blocks, block_bytes_by_rank),
                                                    std::string(status.message())));
  }
  return pool;
}

}  // namespace wintserve
