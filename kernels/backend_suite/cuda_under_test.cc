#include <cstdio>
#include <cstdlib>

#include "kernels/backend_suite/backend_under_test.h"
#include "kernels/cuda/cuda_backend.h"

namespace wintserve::kernels {

BackendUnderTest MakeBackendUnderTest() {
  auto backend = cuda::CreateCudaBackend({});
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", backend.status().ToString().c_str());
    std::exit(1);
  }
  constexpr double kEpsilon = 0x1p-24;
  return {.backend = *std::move(backend),
          .errors = {// Binary16 with the row's largest in [2^14, 2^15): 11 bits down to 2^-14,
                     // steps of 2^-24 below.
                     .activation_relative = 0x1p-11,
                     .activation_of_largest = 0x1p-39,
                     .bfloat16_weight_of_largest = 0x1p-39,
                     // Tensor cores cut off where float32 would round, and align addends to the
                     // largest of several first.
                     .addition = 0x1p-22,
                     .has_code_offsets = true,
                     // expf errs by two units in the last place; sum, division and product follow.
                     .swiglu = 8 * kEpsilon,
                     .sine = kEpsilon,
                     .kv = 0x1p-9,
                     .softmax_weight = 0x1p-9}};
}

}  // namespace wintserve::kernels
