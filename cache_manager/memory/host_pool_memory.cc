#include "cache_manager/memory/host_pool_memory.h"

#include <fmt/format.h>

#include <string>
#include <utility>

#include "common/check.h"

namespace wintserve {

absl::StatusOr<std::unique_ptr<HostPoolMemory>> HostPoolMemory::Create(const PoolSize& size,
                                                                       int64_t available_bytes) {
  CHECK(size.num_blocks > 0 && !size.block_bytes_by_rank.empty(), "num_blocks={} ranks={}",
        size.num_blocks, size.block_bytes_by_rank.size());
  const double pool_bytes = TotalBytes(size.num_blocks, size);
  const double host_bytes = TotalBytes(size.num_host_slots, size);
  std::string what = fmt::format("KV pool of {:.2f} GiB", pool_bytes / kGib);
  std::string flags = kPoolFlags;
  if (size.num_host_slots > 0) {
    what += fmt::format(" with a host tier of {:.2f} GiB", host_bytes / kGib);
    flags = "--swap-space, " + flags;
  }
  // The kernel would promise the memory and kill a process later, when the pool fills up.
  if (pool_bytes + host_bytes > static_cast<double>(available_bytes)) {
    return absl::ResourceExhaustedError(fmt::format(
        "{} does not fit into the {:.2f} GiB of memory that is available ({}); lower {}", what,
        static_cast<double>(available_bytes) / kGib, DescribeBlocks(size), flags));
  }

  auto pool = std::make_unique<HostPoolMemory>();
  auto ranks = CreateHostMemory("kv", size.num_blocks, size);
  absl::Status status = ranks.status();
  if (ranks.ok()) pool->ranks_ = *std::move(ranks);
  if (status.ok() && size.num_host_slots > 0) {
    auto host_ranks = CreateHostMemory("host", size.num_host_slots, size);
    status = host_ranks.status();
    if (host_ranks.ok()) pool->host_ranks_ = *std::move(host_ranks);
  }
  if (!status.ok()) {
    return absl::ResourceExhaustedError(fmt::format("{} cannot be created ({}): {}", what,
                                                    DescribeBlocks(size),
                                                    std::string(status.message())));
  }
  return pool;
}

}  // namespace wintserve
