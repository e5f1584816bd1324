// The tests of this folder run on every backend; each backend's binary links them with its own
// MakeBackendUnderTest.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace wintserve::kernels {

// How far the backend's arithmetic may be from exact. A test's bound follows from these, the shapes
// and the numbers; references are float64 sums over the unrounded weights.
struct ErrorModel {
  // What a number of x becomes in a product: off by relative * |number| + of_largest * the row's
  // largest.
  double activation_relative = 0;
  double activation_of_largest = 0;
  // The same for weights, by column; of bfloat16 ones only, quantised ones are exact.
  double bfloat16_weight_of_largest = 0;
  // One float32 addition, and whether sums run over codes with an offset (plan/weight_layout.h).
  double addition = 0x1p-24;
  bool has_code_offsets = false;
  // Relative, of silu(gate) * up.
  double swiglu = 0;
  // Absolute, of a sine or cosine.
  double sine = 0;
  // Relative: keys and values as the cache keeps them; softmax weights as they are multiplied.
  double kv = 0;
  double softmax_weight = 0;
};

struct BackendUnderTest {
  std::unique_ptr<Backend> backend;  // with WeightRounding::kUnrounded
  ErrorModel errors;
};

BackendUnderTest MakeBackendUnderTest();

}  // namespace wintserve::kernels
