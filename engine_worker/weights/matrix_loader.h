// Tensor bytes to canonical form: one rank's slice of one matrix, or one vector.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/tensor_set.h"
#include "kernels/formats/matrix.h"

namespace wintserve {

// A tensor as the layout requires it to be.
struct ExpectedTensor {
  std::string name;
  std::vector<TensorType> types;             // any of them
  std::vector<std::vector<int64_t>> shapes;  // any of them
};

std::vector<TensorType> FloatTensorTypes();

// The tensors of a stored matrix.
std::vector<ExpectedTensor> ExpectedTensors(const StoredMatrix& stored);

// Every element of a float tensor, widened. REQUIRES: a type of FloatTensorTypes().
std::vector<float> ReadFloats(const TensorView& view);

// What the slice of `rank` takes, about: on disk, where a scale of rows that are split counts in
// part, and exactly as the HostMatrix that LoadMatrixSlice gives. REQUIRES: as LoadMatrixSlice.
MatrixBytes BytesOfSlice(const TensorSet& set, const LogicalMatrix& matrix, int rank,
                         int world_size, bool as_float32);

// The slice of `rank` in `world_size`. The pages that were read for it are dropped from this
// process (DropPages). Plain weights become kBfloat16 if all of them are stored as that, else (or
// if as_float32) kFloat32. DATA_LOSS: a scale that is not finite or out of any sensible range.
// REQUIRES: the tensors in `set` are as ExpectedTensors() has them; the split comes out even.
absl::StatusOr<formats::HostMatrix> LoadMatrixSlice(const TensorSet& set,
                                                    const LogicalMatrix& matrix, int rank,
                                                    int world_size, formats::KOrder k_order,
                                                    bool as_float32);

}  // namespace wintserve
