#include "cache_manager/memory/gpu_pool_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "common/unix_socket.h"

namespace wintserve {
namespace {

constexpr int64_t kPartBytes = int64_t{1} << 30;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// How much more the device would give, in powers of two of its granularity, of which none is more
// than limit_bytes.
int64_t FreeBytes(GpuDriver* driver, int device, int64_t granularity_bytes, int64_t limit_bytes) {
  std::vector<UniqueFd> held;
  int64_t free_bytes = 0;
  int64_t size_bytes = granularity_bytes;
  while (size_bytes < limit_bytes) size_bytes *= 2;
  for (; size_bytes >= granularity_bytes; size_bytes /= 2) {
    auto memory = driver->Allocate(device, size_bytes);
    if (!memory.ok()) continue;
    held.push_back(*std::move(memory));
    free_bytes += size_bytes;
  }
  return free_bytes;
}

absl::Status DoesNotFit(const PoolSize& size, int rank, const GpuTraits& traits,
                        double free_bytes) {
  const double rank_bytes =
      static_cast<double>(size.num_blocks) * static_cast<double>(size.block_bytes_by_rank[rank]);
  return absl::ResourceExhaustedError(fmt::format(
      "KV pool of {:.2f} GiB does not fit into {}: {:.2f} GiB of its {:.2f} GiB are free ({}); "
      "lower --gpu-memory-utilization or --num-gpu-blocks-override",
      rank_bytes / kGib, GpuName(rank, traits), free_bytes / kGib,
      static_cast<double>(traits.total_bytes) / kGib, DescribeBlocks(size)));
}

absl::StatusOr<SharedMemory> AllocateRank(const PoolSize& size, int rank, GpuDriver* driver) {
  ASSIGN_OR_RETURN(const GpuTraits traits, CheckGpu(driver, rank));
  const uint64_t block_bytes = size.block_bytes_by_rank[rank];
  // Before the product, which could wrap around.
  if (block_bytes > static_cast<uint64_t>(traits.total_bytes) / size.num_blocks) {
    const int64_t free_bytes =
        FreeBytes(driver, rank, traits.granularity_bytes, traits.total_bytes);
    return DoesNotFit(size, rank, traits, static_cast<double>(free_bytes));
  }
  SharedMemory memory = {.kind = SharedMemory::Kind::kGpu,
                         .size_bytes = static_cast<int64_t>(size.num_blocks * block_bytes),
                         .parts = {}};
  const int64_t total_bytes = RoundUp(memory.size_bytes, traits.granularity_bytes);
  const int64_t part_bytes =
      RoundUp(std::max(kPartBytes, (total_bytes + kMaxPacketFds - 1) / kMaxPacketFds),
              traits.granularity_bytes);
  for (int64_t offset = 0; offset < total_bytes; offset += part_bytes) {
    const int64_t bytes = std::min(part_bytes, total_bytes - offset);
    absl::StatusOr<UniqueFd> part = driver->Allocate(rank, bytes);
    if (absl::IsResourceExhausted(part.status())) {
      const int64_t more_bytes = FreeBytes(driver, rank, traits.granularity_bytes, bytes);
      return DoesNotFit(size, rank, traits, static_cast<double>(offset + more_bytes));
    }
    if (!part.ok()) {
      return absl::Status(part.status().code(),
                          fmt::format("KV pool of {:.2f} GiB cannot be created on {}: {}",
                                      static_cast<double>(memory.size_bytes) / kGib,
                                      GpuName(rank, traits), std::string(part.status().message())));
    }
    memory.parts.push_back({*std::move(part), bytes});
  }
  return memory;
}

}  // namespace

std::string GpuName(int device, const GpuTraits& traits) {
  return fmt::format("GPU {} ({})", device, traits.name);
}

absl::StatusOr<GpuTraits> CheckGpu(GpuDriver* driver, int device) {
  ASSIGN_OR_RETURN(GpuTraits traits, driver->Query(device));
  std::string lacks;
  if (!traits.has_virtual_memory) {
    lacks =
        "virtual memory management (CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is "
        "0)";
  } else if (!traits.exports_fds) {
    lacks =
        "memory as file descriptors "
        "(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0)";
  } else if (traits.granularity_bytes <= 0) {
    lacks = fmt::format("a granularity of memory (it says {})", traits.granularity_bytes);
  }
  if (lacks.empty()) return traits;
  return absl::FailedPreconditionError(fmt::format(
      "{} has no {}, of which the KV pool is made; its driver serves {}. Update the driver, or, on "
      "a "
      "virtual machine or WSL, give this machine a GPU that has it; --device cpu goes without",
      GpuName(device, traits), lacks, traits.driver));
}

absl::StatusOr<std::unique_ptr<GpuPoolMemory>> GpuPoolMemory::Create(const PoolSize& size,
                                                                     int64_t available_bytes,
                                                                     GpuDriver* driver) {
  CHECK(size.num_blocks > 0 && !size.block_bytes_by_rank.empty(), "num_blocks={} ranks={}",
        size.num_blocks, size.block_bytes_by_rank.size());
  const double host_bytes = TotalBytes(size.num_host_slots, size);
  // The workers lock all of the host tier into memory.
  if (host_bytes > static_cast<double>(available_bytes)) {
    return absl::ResourceExhaustedError(fmt::format(
        "host tier of {:.2f} GiB does not fit into the {:.2f} GiB of memory that is available; "
        "lower --swap-space",
        host_bytes / kGib, static_cast<double>(available_bytes) / kGib));
  }
  auto pool = std::make_unique<GpuPoolMemory>();
  for (int rank = 0; rank < std::ssize(size.block_bytes_by_rank); ++rank) {
    ASSIGN_OR_RETURN(SharedMemory memory, AllocateRank(size, rank, driver));
    pool->ranks_.push_back(std::move(memory));
  }
  if (size.num_host_slots > 0) {
    auto host_ranks = CreateHostMemory("host", size.num_host_slots, size);
    if (!host_ranks.ok()) {
      return absl::ResourceExhaustedError(
          fmt::format("host tier of {:.2f} GiB cannot be created: {}", host_bytes / kGib,
                      std::string(host_ranks.status().message())));
    }
    pool->host_ranks_ = *std::move(host_ranks);
  }
  return pool;
}

TierMemory GpuPoolMemory::device_tier(int rank) const {
  const SharedMemory& memory = ranks_[rank];
  TierMemory tier = {.kind = memory.kind, .size_bytes = memory.size_bytes, .parts = {}};
  for (const SharedMemory::Part& part : memory.parts) {
    tier.parts.push_back({part.fd.get(), part.size_bytes});
  }
  return tier;
}

}  // namespace wintserve
