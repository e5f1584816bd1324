// How far the decoded weights of a quantised matrix are from the weights that it was made of.
#pragma once

#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"

namespace wintserve::quantizer {

// Sums over weights: of (w - w')^2 and of w^2. Their ratio is the normalised mean square error.
struct WeightError {
  double error = 0;
  double norm = 0;

  void Add(const WeightError& other) {
    error += other.error;
    norm += other.norm;
  }
  double nmse() const { return norm > 0 ? error / norm : 0; }
};

// w' as formats::DecodeToFloat has them. Deterministic: sums are taken in a fixed order.
// REQUIRES: equal shapes; `source` is kBfloat16 or kFloat32.
WeightError MeasureWeightError(const formats::HostMatrix& source,
                               const formats::HostMatrix& quantized,
                               kernels::cpu::ThreadPool& pool);

}  // namespace wintserve::quantizer
