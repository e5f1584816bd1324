#include "tools/quantizer/output/tensor_plan.h"

#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "tools/quantizer/matrix_quantizer.h"

namespace wintserve::quantizer {
namespace {

constexpr size_t kHeaderAlignment = 64;

PlannedTensor MakeTensor(std::string name, TensorType type, std::vector<int64_t> shape) {
  PlannedTensor tensor{std::move(name), type, std::move(shape), TensorTypeBytes(type)};
  for (const int64_t size : tensor.shape) tensor.size_bytes *= size;
  return tensor;
}

std::vector<PlannedTensor> TensorsOf(const StoredMatrix& stored, bool is_router) {
  const auto [k, n] = std::pair(stored.k, stored.n);
  const auto tensor = [&](const char* suffix, TensorType type, std::vector<int64_t> shape) {
    return MakeTensor(stored.name + "." + suffix, type, std::move(shape));
  };
  switch (stored.format) {
    case StoredFormat::kPlain:
      return {tensor("weight", is_router ? TensorType::kF32 : TensorType::kBF16, {k, n})};
    case StoredFormat::kWint8:
      return {tensor("quant_weight", TensorType::kI8, {n, k}),
              tensor("weight_scale", TensorType::kBF16, {n})};
    case StoredFormat::kWint4:
      return {tensor("quant_weight", TensorType::kI8, {n / 2, k}),
              tensor("weight_scale", TensorType::kBF16, {n})};
    case StoredFormat::kWint2:
      return {tensor("quant_weight", TensorType::kU8, {k / 4, n}),
              tensor("weight_scale", TensorType::kU8, {k / 128, n}),
              tensor("super_scales", TensorType::kBF16, {n}),
              tensor("code_scale", TensorType::kF32, {n}),
              tensor("code_zp", TensorType::kF32, {n})};
  }
  CHECK(false, "format={}", static_cast<int>(stored.format));
}

absl::Status CheckTiles(const StoredMatrix& stored) {
  const auto [scheme, k_tile, n_tile] = [&]() -> std::tuple<const char*, int64_t, int64_t> {
    switch (stored.format) {
      case StoredFormat::kPlain:
        return {"bf16", 1, 1};
      case StoredFormat::kWint8:
        return {"wint8", 64, 2};
      case StoredFormat::kWint4:
        return {"wint4", 64, 4};
      case StoredFormat::kWint2:
        return {"wint2", 128, 1};
    }
    return {"", 1, 1};
  }();
  if (stored.k % k_tile == 0 && stored.n % n_tile == 0) return absl::OkStatus();
  const std::string outputs = n_tile == 1 ? "" : fmt::format(" and of {} outputs", n_tile);
  return absl::InvalidArgumentError(
      fmt::format("{} is a matrix of {} inputs and {} outputs, which cannot be stored as {}; "
                  "allowed: multiples of {} inputs{}",
                  stored.name, stored.k, stored.n, scheme, k_tile, outputs));
}

class Planner {
 public:
  explicit Planner(const ModelConfig& target) : target_(target), layout_(CanonicalLayout(target)) {}

  absl::StatusOr<std::vector<PlannedStep>> Steps() {
    for (const MatrixRef& ref : StoredMatrices(target_, target_.tie_word_embeddings)) {
      if (ref.role == MatrixRole::kQkv) AddVector(VectorRole::kInputNorm, ref.layer);
      if (ref.role == MatrixRole::kHead) AddVector(VectorRole::kFinalNorm, target_.num_layers);
      RETURN_IF_ERROR(AddMatrix(ref));
      if (ref.role == MatrixRole::kOutput) AddVector(VectorRole::kPostAttentionNorm, ref.layer);
      if (ref.role == MatrixRole::kRouter && target_.has_router_bias) {
        AddVector(VectorRole::kRouterBias, ref.layer);
      }
    }
    if (target_.tie_word_embeddings) AddVector(VectorRole::kFinalNorm, target_.num_layers);
    return std::move(steps_);
  }

 private:
  absl::Status AddMatrix(const MatrixRef& ref) {
    const LogicalMatrix described = DescribeMatrix(layout_, target_, ref);
    // Fused parts are of one stored matrix.
    const StoredMatrix& stored = described.parts.front().stored;
    RETURN_IF_ERROR(CheckTiles(stored));
    PlannedStep step{ref, stored.name, ref.layer, stored.format, stored.k, stored.n, {}};
    if (ref.role == MatrixRole::kEmbedding) step.layer = -1;
    if (ref.role == MatrixRole::kHead) step.layer = target_.num_layers;
    step.tensors = TensorsOf(stored, ref.role == MatrixRole::kRouter);
    steps_.push_back(std::move(step));
    return absl::OkStatus();
  }

  void AddVector(VectorRole role, int layer) {
    const bool is_bias = role == VectorRole::kRouterBias;
    const int64_t size = is_bias ? target_.num_experts : target_.hidden_size;
    const std::string name = VectorTensorName(layout_, role, layer);
    PlannedStep step{VectorRef{role, layer}, name, layer, StoredFormat::kPlain, 1, size, {}};
    step.tensors = {is_bias ? MakeTensor(name, TensorType::kF32, {1, size})
                            : MakeTensor(name, TensorType::kBF16, {size})};
    steps_.push_back(std::move(step));
  }

  const ModelConfig& target_;
  const Layout layout_;
  std::vector<PlannedStep> steps_;
};

int64_t BytesOf(const PlannedStep& step) {
  int64_t bytes = 0;
  for (const PlannedTensor& tensor : step.tensors) bytes += tensor.size_bytes;
  return bytes;
}

// Shares the steps out among files; offsets are still from the first byte of data.
int AssignFiles(int64_t max_file_bytes, std::vector<PlannedStep>* steps) {
  int file = 0;
  int64_t file_bytes = 0;
  for (PlannedStep& step : *steps) {
    if (file_bytes > 0 && file_bytes + BytesOf(step) > max_file_bytes) {
      ++file;
      file_bytes = 0;
    }
    for (PlannedTensor& tensor : step.tensors) {
      tensor.file = file;
      tensor.offset = file_bytes;
      file_bytes += tensor.size_bytes;
    }
  }
  return file + 1;
}

std::string Header(const nlohmann::ordered_json& json) {
  std::string text = json.dump();
  const size_t unpadded = sizeof(uint64_t) + text.size();
  text.append((kHeaderAlignment - unpadded % kHeaderAlignment) % kHeaderAlignment, ' ');
  const uint64_t length = text.size();
  std::string header(sizeof(length), '\0');
  std::memcpy(header.data(), &length, sizeof(length));
  return header + text;
}

}  // namespace

int64_t OutputPlan::file_bytes() const {
  int64_t bytes = 0;
  for (const PlannedFile& file : files) bytes += file.size_bytes;
  return bytes;
}

std::string OutputPlan::IndexJson() const {
  if (files.size() == 1) return "";
  nlohmann::json weight_map;
  for (const PlannedStep& step : steps) {
    for (const PlannedTensor& tensor : step.tensors) {
      weight_map[tensor.name] = files[tensor.file].name;
    }
  }
  const nlohmann::json index = {{"metadata", {{"total_size", tensor_bytes}}},
                                {"weight_map", std::move(weight_map)}};
  return index.dump(2) + "\n";
}

absl::StatusOr<OutputPlan> PlanOutput(const ModelConfig& target, int64_t max_file_bytes) {
  OutputPlan plan;
  ASSIGN_OR_RETURN(plan.steps, Planner(target).Steps());
  const int num_files = AssignFiles(max_file_bytes, &plan.steps);
  std::vector<nlohmann::ordered_json> headers(num_files);
  for (nlohmann::ordered_json& header : headers) header = {{"__metadata__", {{"format", "np"}}}};
  plan.files.resize(num_files);
  for (const PlannedStep& step : plan.steps) {
    for (const PlannedTensor& tensor : step.tensors) {
      const int64_t end = tensor.offset + tensor.size_bytes;
      headers[tensor.file][tensor.name] = {{"dtype", TensorTypeName(tensor.type)},
                                           {"shape", tensor.shape},
                                           {"data_offsets", {tensor.offset, end}}};
      plan.files[tensor.file].size_bytes = end;
      plan.tensor_bytes += tensor.size_bytes;
    }
  }
  for (int i = 0; i < num_files; ++i) {
    PlannedFile& file = plan.files[i];
    file.name = num_files == 1 ? "model.safetensors"
                               : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, num_files);
    file.header = Header(headers[i]);
    file.size_bytes += static_cast<int64_t>(file.header.size());
  }
  for (PlannedStep& step : plan.steps) {
    for (PlannedTensor& tensor : step.tensors) {
      tensor.offset += static_cast<int64_t>(plan.files[tensor.file].header.size());
    }
  }
  return plan;
}

}  // namespace wintserve::quantizer
