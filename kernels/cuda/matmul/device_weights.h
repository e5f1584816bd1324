// Packed matrices in device memory, as the launches of matmul.h take them.
#pragma once

#include <cstdint>

#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

// layout.size_bytes() bytes at `data`, aligned to 256, made by plan::PackWeights.
struct DeviceWeights {
  plan::WeightLayout layout;
  const uint8_t* data = nullptr;
};

struct DeviceMlp {
  DeviceWeights gate_up;  // layout.gate_up is true
  DeviceWeights down;
};

}  // namespace wintserve::kernels::cuda
