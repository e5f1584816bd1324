// Everything about the files of a quantised checkpoint that is known before a weight is: tensors
// with names, types, shapes and places, so that each can be written when it is made.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/safetensors.h"

namespace wintserve::quantizer {

struct PlannedTensor {
  std::string name;  // "ernie.layers.3.mlp.experts.17.down_proj.quant_weight"
  TensorType type = TensorType::kU8;
  std::vector<int64_t> shape;
  int64_t size_bytes = 0;
  int file = 0;        // index in OutputPlan::files
  int64_t offset = 0;  // from the file's first byte
};

struct VectorRef {
  VectorRole role;
  int layer = 0;
};

// What is made and written at once: a matrix with its scales, or a vector.
struct PlannedStep {
  std::variant<MatrixRef, VectorRef> ref;
  std::string name;  // "ernie.layers.3.mlp.experts.17.down_proj"
  int layer = -1;    // -1: before all layers; the number of layers: after them
  StoredFormat format = StoredFormat::kPlain;
  int64_t k = 0;  // of the matrix; a vector is [1, n]
  int64_t n = 0;
  std::vector<PlannedTensor> tensors;
};

struct PlannedFile {
  std::string name;
  std::string header;  // the file begins with it: length, JSON, blanks; a multiple of 64 bytes
  int64_t size_bytes = 0;
};

struct OutputPlan {
  // In the order in which a model is passed through: those of matrices are StoredMatrices().
  std::vector<PlannedStep> steps;
  std::vector<PlannedFile> files;
  int64_t tensor_bytes = 0;  // without headers

  int64_t file_bytes() const;
  // Of model.safetensors.index.json; empty for a single file, which needs none.
  std::string IndexJson() const;
};

// Names, types and shapes are those of the published 2-bit checkpoint, which FastDeploy's loader
// asks for literally. A file has at most max_file_bytes of tensors, but for a step that alone has
// more; one file alone is model.safetensors, several are model-00001-of-00003.safetensors …
// INVALID_ARGUMENT: a matrix does not come in the tiles of its format.
// REQUIRES: `target` says whether the head is tied and whether routers have a bias.
absl::StatusOr<OutputPlan> PlanOutput(const ModelConfig& target, int64_t max_file_bytes);

}  // namespace wintserve::quantizer
