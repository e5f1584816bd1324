// How one matrix of a quantised model is made, once the second moments of its inputs are known.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/layout.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/calibrate/moments.h"

namespace wintserve::quantizer {

// What an encoder needs to know of the inputs of a matrix.
struct MomentNeeds {
  bool hessian = false;       // of the inputs in the quantised model; the others come with it only
  bool cross = false;         // with the inputs in the unquantised model
  bool cross_output = false;  // with what repairs the residual, of matrices that add to it
};

// Threading: one thread.
class MatrixEncoder {
 public:
  virtual ~MatrixEncoder() = default;

  // num_inputs: of the matrix. models_differ: whether any matrix before this one is not what the
  // unquantised model has.
  virtual MomentNeeds Needs(const MatrixRef& ref, StoredFormat format, int64_t num_inputs,
                            bool models_differ) const = 0;
  // source: of the checkpoint. moments: what Needs asked for; null without a hessian. The result is
  // as MatrixQuantizer::Next has it.
  virtual absl::StatusOr<formats::HostMatrix> Encode(const MatrixRef& ref, StoredFormat format,
                                                     const formats::HostMatrix& source,
                                                     const Moments* moments) = 0;
};

// "layer 3 expert 5 down", for messages.
std::string MatrixPlace(const MatrixRef& ref);

// Whether a matrix adds to the residual.
bool AddsToResidual(MatrixRole role);

}  // namespace wintserve::quantizer
