// What the parts of a model take: in parameters, on disk, and as the backends keep them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint_files.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::inspect {

enum class Part {
  kEmbedding,
  kAttention,
  kDenseMlp,
  kExperts,
  kSharedExperts,
  kRouter,
  kNorms,
  kHead,
};
std::string_view PartName(Part part);

struct Size {
  int64_t num_parameters = 0;  // a tied head has none of its own
  int64_t on_disk = 0;         // bytes, as the others
  int64_t on_cpu = 0;
  int64_t on_cuda = 0;

  Size& operator+=(const Size& other);
};

struct ModelSizes {
  std::map<Part, Size> parts;  // those that the model has
  // Float matrices that are not bfloat16, which the CUDA backend does not take: on_cuda is without
  // them.
  bool has_float32_matrices = false;

  Size total() const;
};

// Of `rank` of world_size. files: null for what the config alone tells, plain weights as bfloat16;
// then, or for a part of a model, on_disk is what the formats make of the shapes, not what the
// files have. REQUIRES: CheckTensorParallel(config, world_size) is OK.
ModelSizes SizesOf(const ModelConfig& config, const CheckpointFiles* files, int rank,
                   int world_size);

// Parameters that one token's pass multiplies with: everything but the embedding's table, unless it
// is the head as well, and of the experts those that a token takes.
int64_t ActiveParameters(const ModelConfig& config, const ModelSizes& whole);

// Layers next to each other that are alike.
struct LayerRange {
  int first = 0;
  int last = 0;
  std::string attention;       // format: "wint8", "BF16", "BF16 and F32"
  std::string mlp;             // of the dense MLP, or of the first expert
  int num_experts = 0;         // 0: dense
  std::string shared_experts;  // empty without

  bool IsLike(const LayerRange& other) const;
};
std::vector<LayerRange> LayerRanges(const ModelConfig& config, const CheckpointFiles* files);

// Of one rank, all layers. kind: of a GPU; a CPU keeps float32.
int64_t CpuKvBytesPerToken(const ModelConfig& config, int world_size);
int64_t CudaKvBytesPerToken(const ModelConfig& config, int world_size,
                            kernels::plan::KvCacheKind kind);

}  // namespace wintserve::inspect
