// What the tensors of a checkpoint are called and how they lie: the one place that knows names.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/tensor_set.h"
#include "kernels/formats/matrix.h"

namespace wintserve {

// Told by the names of the tensors, never by how config.json spells its dtype key.
//   Paddle         ernie.* (or model.*), fused matrices, [in, out]
//   Hugging Face   model.*, separate matrices, [out, in]
//   early PT       model.*, fused matrices, [out, in]
// and any other mixture of the three.
struct Layout {
  std::string prefix;  // "ernie" or "model"
  bool has_fused_qkv = true;
  bool has_fused_gate_up = true;
  bool is_out_in = false;
  bool router_is_out_in = false;
  bool head_is_out_in = false;
  bool head_is_tied = false;
  bool has_router_bias = false;
};

// DATA_LOSS: the names fit none of the layouts.
absl::StatusOr<Layout> DetectLayout(const TensorSet& set, const ModelConfig& config);

// The sizes that one of `num_shards` pre-sharded directories holds.
// REQUIRES: CheckTensorParallel(config, num_shards) is OK.
ModelConfig ConfigOfShard(const ModelConfig& config, int num_shards);

enum class StoredFormat { kPlain, kWint8, kWint4, kWint2 };  // kPlain: any float type

// Of a quantised matrix in memory. nullopt for kPlain: the tensor's type, or whoever makes it,
// decides.
std::optional<formats::WeightFormat> QuantizedFormat(StoredFormat stored);

// A matrix [k, n] as one or several tensors named `name` + "." + suffix.
struct StoredMatrix {
  std::string name;
  StoredFormat format = StoredFormat::kPlain;
  int64_t k = 0;
  int64_t n = 0;
  bool is_out_in = false;  // kPlain: the tensor is [n, k]
};

// Columns of a stored matrix that a MatrixRef is made of, and how they split over ranks: in whole
// units. Fewer units than ranks: neighbouring ranks share a unit.
struct MatrixPart {
  StoredMatrix stored;
  int64_t n_begin = 0;
  int64_t num_units = 0;
  int64_t unit_columns = 1;
};

enum class Split { kNone, kColumns, kRows };

struct LogicalMatrix {
  std::vector<MatrixPart> parts;  // side by side along n, all of the same k
  Split split = Split::kNone;
};

// What `rank` of `world_size` takes of a part's tensor. REQUIRES: the split comes out even.
formats::MatrixSlice SliceOf(const MatrixPart& part, Split split, int rank, int world_size);

// Paddle's layout as the config alone tells it; what it leaves to the tensors is absent.
Layout CanonicalLayout(const ModelConfig& config);

// REQUIRES: `ref` names a matrix that a model of `config` has.
LogicalMatrix DescribeMatrix(const Layout& layout, const ModelConfig& config, const MatrixRef& ref);

// "ernie.layers.3.input_layernorm.weight". `layer` is ignored for kFinalNorm.
std::string VectorTensorName(const Layout& layout, VectorRole role, int layer);

// Tensors that other programs use and this one skips.
enum class SkipReason {
  kMultiTokenPrediction,
  kKvCacheScale,
  kOtherScheme,  // statistics of other quantisation schemes
  kTiedHead,     // the unused head of a tied model
};
// "multi-token prediction"
std::string_view SkipReasonName(SkipReason reason);
// nullopt: the tensor is not skipped.
std::optional<SkipReason> WhySkipped(const Layout& layout, std::string_view name);

// Of the part of a vision-language model that is not text.
bool IsOfAnotherModality(std::string_view name);

}  // namespace wintserve
