// Memory that another process made, mapped for the current device.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "common/shared_memory.h"
#include "kernels/backend.h"

namespace wintserve::kernels::cuda {

// A GPU's memory, its parts one behind the other in one range of addresses that the current device
// may read and write. Unmapping waits for the device. INVALID_ARGUMENT: memory of the host.
// INTERNAL: the driver refuses it; the message says at which call.
absl::StatusOr<std::unique_ptr<Buffer>> MapGpuMemory(SharedMemory shared);

// Runs items of a loop, on several threads maybe: run(num_items, item).
using ParallelFor = absl::FunctionRef<void(int64_t num_items, absl::FunctionRef<void(int64_t)>)>;

// Memory of the host, taken from the system by `parallel_for`, which keeps what it holds, and
// locked, so that the device copies from and to it while the host goes on. RESOURCE_EXHAUSTED:
// there is not as much; INVALID_ARGUMENT: as MappedMemory::FromParts.
absl::StatusOr<std::unique_ptr<Buffer>> MapAndLockHostMemory(SharedMemory shared,
                                                             ParallelFor parallel_for);

}  // namespace wintserve::kernels::cuda
