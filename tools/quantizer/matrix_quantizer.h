// How the matrices of a checkpoint become those of a quantised one: by rounding alone
// (tools/quantizer/output/rounding_quantizer.h) or with calibration.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/layout.h"
#include "kernels/formats/matrix.h"

namespace wintserve::quantizer {

// The matrices that a quantised checkpoint stores, in the order in which they are made:
// AllMatrices(config) without the head where it is tied, which has no tensors of its own.
inline std::vector<MatrixRef> StoredMatrices(const ModelConfig& config, bool head_is_tied) {
  std::vector<MatrixRef> refs = AllMatrices(config);
  if (head_is_tied) refs.pop_back();
  return refs;
}

// Makes the matrices of one quantised checkpoint, one after the other. Each call is a step, and
// there is one step for each of StoredMatrices(), in that order: first Replay() for those that an
// earlier run has made, then Next() for the rest.
//
// Ownership:   results are the caller's; the quantiser keeps no reference to them.
// Threading:   one thread calls; an implementation may use more inside.
// Memory:      besides what it has handed out, a bounded number of matrices (an implementation says
//              how many) and what calibration keeps; never a whole layer's experts in float32.
// Determinism: results depend on the checkpoint, the options and the calibration text alone, not on
//              the number of threads, nor on how many steps were replayed: a run that was
//              interrupted and resumed writes the same bytes as one that was not.
class MatrixQuantizer {
 public:
  virtual ~MatrixQuantizer() = default;

  // The whole matrix (of one rank) that `ref` names, [k, n] as MatrixRole has it:
  //   kWint8, kWint4, kWint2   in that format; kWint2 in the K order that the implementation was
  //                            made with
  //   kPlain                   kBfloat16, the router kFloat32; the checkpoint's weights, or what
  //                            calibration has solved for in their place
  // Errors: as Checkpoint::LoadMatrix; INVALID_ARGUMENT for a weight that is not finite or a matrix
  // that does not come in the format's tiles, both with the matrix' name. After an error no further
  // step is possible.
  // REQUIRES: `ref` is the next of StoredMatrices().
  virtual absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref, StoredFormat format) = 0;

  // The same step where `done` is what Next() gave in an earlier run of the same options: brings
  // the state to where Next() would have left it. Errors as of Next().
  // REQUIRES: `ref` is the next of StoredMatrices(); no step was a Next() yet.
  virtual absl::Status Replay(const MatrixRef& ref, formats::HostMatrix done) = 0;

  // The gain of the final norm [hidden_size] that goes with the matrices, or nothing: the source's.
  // REQUIRES: the matrices of all layers are done.
  virtual absl::StatusOr<std::vector<float>> FinalNorm() const { return std::vector<float>(); }

  // The unquantised matrix that the last Next() began with, as the source checkpoint has it, or
  // null where the implementation does not keep it; for measuring the error. Until the next step.
  virtual const formats::HostMatrix* source() const { return nullptr; }
};

}  // namespace wintserve::quantizer
