// Records when the kernels of this process ran on the device, those of CUDA graphs too, through
// CUPTI's activity records. libcupti is loaded when it is asked for, so that no program needs it.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "bench/kernel_table.h"

namespace wintserve::bench {

// Threading: one thread calls; only one object lives at a time.
class KernelTimes {
 public:
  // Before the process uses the device first. From then on every launch takes some time longer. An
  // error says what is missing: the library, or the driver's permission to profile.
  static absl::StatusOr<std::unique_ptr<KernelTimes>> Create();
  ~KernelTimes();

  // The device is idle at both calls. Between them runs are recorded; those before are forgotten.
  absl::Status Begin();
  // In the order in which they began.
  absl::StatusOr<std::vector<KernelRun>> End();

 private:
  KernelTimes() = default;
  uint64_t begin_ns_ = 0;
};

}  // namespace wintserve::bench
