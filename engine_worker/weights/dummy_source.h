// Weights of any config without a checkpoint: for speed and memory, which depend on shapes and
// formats, not on what a model knows.
#pragma once

#include <cstdint>
#include <memory>

#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/formats/dummy_matrix.h"

namespace wintserve {

struct DummyWeightOptions {
  // 0: a token takes any expert as soon as any other. Above, some are preferred by every token: at
  // 1 by as much as a token's own preferences differ, from about 10 on nearly all tokens take the
  // same.
  double router_skew = 0;
};

// The formats are those that the config's quantization section names, the rest is bfloat16 and the
// router float32. Magnitudes keep activations and logits of the order of 1 through any number of
// layers. The same weights on every backend; a rank has its slice of them.
// REQUIRES: CheckTensorParallel(config, world_size) is OK. The backend outlives the source.
std::unique_ptr<WeightSource> MakeDummySource(const ModelConfig& config,
                                              const DummyWeightOptions& options,
                                              kernels::Backend* backend, int rank, int world_size);

// A rank's slice of a matrix: what the source makes, and the shape and format of what a checkpoint
// of this config has. REQUIRES: as MakeDummySource.
formats::DummyMatrix DescribeDummyMatrix(const ModelConfig& config, const MatrixRef& ref, int rank,
                                         int world_size);

// Bytes of a rank's weights in the CUDA layouts, without what the config alone does not tell: a
// head that may be tied counts as tied.
int64_t CudaWeightBytes(const ModelConfig& config, int rank, int world_size);

}  // namespace wintserve
