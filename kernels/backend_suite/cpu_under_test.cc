#include "kernels/backend_suite/backend_under_test.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve::kernels {

BackendUnderTest MakeBackendUnderTest() {
  constexpr double kEpsilon = 0x1p-24;
  return {
      .backend = cpu::CreateCpuBackend({.num_threads = 2, .rounding = WeightRounding::kUnrounded}),
      // Highway's exp errs by one unit in the last place (2 eps); a sum, a division and a
      // product follow. The C library's sine errs by less than one unit in the last place.
      .errors = {.swiglu = 6 * kEpsilon, .sine = 2 * kEpsilon, .softmax_weight = 4 * kEpsilon}};
}

}  // namespace wintserve::kernels
