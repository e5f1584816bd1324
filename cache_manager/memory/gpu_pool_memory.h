// A KV pool in the memory of GPUs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_manager/memory/gpu_driver.h"
#include "cache_manager/memory/pool_memory.h"
#include "common/mapped_memory.h"
#include "common/unique_fd.h"

namespace wintserve {

// Rank r's device tier is memory of device r, in parts of 1 GiB, or larger where it would be more
// of them than a packet can carry; the last one is as small as the device's granularity allows.
// Blocks may lie across two parts. Nothing maps the memory here: only its descriptors are held, and
// as long as they are it keeps its content, whoever dies that had mapped it. It is not zeroed. The
// host tier is that of HostPoolMemory.
class GpuPoolMemory final : public PoolMemory {
 public:
  // Takes all of the memory at once. RESOURCE_EXHAUSTED: more than available_bytes for the host
  // tier, or than a device has free. Otherwise as CheckGpu.
  static absl::StatusOr<std::unique_ptr<GpuPoolMemory>> Create(const PoolSize& size,
                                                               int64_t available_bytes,
                                                               GpuDriver* driver);

  int num_ranks() const override { return static_cast<int>(ranks_.size()); }
  TierMemory device_tier(int rank) const override;
  bool has_host_tier() const override { return !host_ranks_.empty(); }
  TierMemory host_tier(int rank) const override { return TierOf(host_ranks_[rank]); }

 private:
  std::vector<SharedMemory> ranks_;
  std::vector<MappedMemory> host_ranks_;  // empty: no host tier
};

}  // namespace wintserve
