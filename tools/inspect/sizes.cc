#include "tools/inspect/sizes.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "common/check.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/matrix_loader.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/formats/format_name.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::inspect {
namespace {

using formats::WeightFormat;
using kernels::plan::WeightLayout;

Part PartOf(const MatrixRef& ref) {
  switch (ref.role) {
    case MatrixRole::kEmbedding:
      return Part::kEmbedding;
    case MatrixRole::kHead:
      return Part::kHead;
    case MatrixRole::kQkv:
    case MatrixRole::kOutput:
      return Part::kAttention;
    case MatrixRole::kRouter:
      return Part::kRouter;
    case MatrixRole::kGateUp:
    case MatrixRole::kDown:
      break;
  }
  if (ref.expert == kDenseMlp) return Part::kDenseMlp;
  return ref.expert == kSharedExperts ? Part::kSharedExperts : Part::kExperts;
}

Layout LayoutOf(const ModelConfig& config, const CheckpointFiles* files) {
  return files == nullptr ? CanonicalLayout(config) : files->layout;
}

// Of a matrix that is not quantised.
TensorType PlainType(const CheckpointFiles* files, const StoredMatrix& stored, MatrixRole role) {
  const TensorSet::Entry* entry =
      files == nullptr ? nullptr : files->sets.front().Find(stored.name + ".weight");
  if (entry != nullptr) return entry->view->type;
  return role == MatrixRole::kRouter ? TensorType::kF32 : TensorType::kBF16;
}

int64_t NominalDiskBytes(StoredFormat format, int64_t k, int64_t n, TensorType plain) {
  constexpr int64_t kScaleBytes = 2;  // bf16
  switch (format) {
    case StoredFormat::kPlain:
      return k * n * TensorTypeBytes(plain);
    case StoredFormat::kWint8:
      return k * n + n * kScaleBytes;
    case StoredFormat::kWint4:
      return k * n / 2 + n * kScaleBytes;
    case StoredFormat::kWint2:
      return k * n / 4 + k * n / 128 + n * (kScaleBytes + 2 * 4);  // two float32 of the code map
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

int64_t CpuBytes(WeightFormat format, int64_t k, int64_t n, MatrixRole role) {
  if (role == MatrixRole::kEmbedding) {
    return k * n * (format == WeightFormat::kBfloat16 ? 2 : 4);  // the table as it is
  }
  return kernels::cpu::PackedMatrix::SizeBytes(format, k, n, UseOf(role));
}

int64_t CudaBytes(WeightFormat format, int64_t k, int64_t n, MatrixRole role) {
  if (role == MatrixRole::kEmbedding) return k * n * 2;
  if (role == MatrixRole::kRouter) return k * n * 4;
  WeightLayout layout;
  layout.format = format;
  layout.gate_up = role == MatrixRole::kGateUp;
  layout.k = k;
  layout.n = n;
  return layout.size_bytes();
}

// Bytes of the tensors of each part in all files.
std::map<Part, int64_t> DiskBytes(const ModelConfig& config, const CheckpointFiles& files) {
  std::map<Part, int64_t> bytes;
  for (const TensorSet& set : files.sets) {
    std::set<std::string> counted;
    const auto add = [&](Part part, const std::string& name) {
      const TensorSet::Entry* entry = set.Find(name);
      if (entry == nullptr || !counted.insert(name).second) return;
      bytes[part] += static_cast<int64_t>(entry->view->data.size());
    };
    for (const MatrixRef& ref : AllMatrices(config)) {
      for (const MatrixPart& part : DescribeMatrix(files.layout, files.stored_config, ref).parts) {
        for (const ExpectedTensor& tensor : ExpectedTensors(part.stored)) {
          add(PartOf(ref), tensor.name);
        }
      }
    }
    for (int layer = 0; layer < config.num_layers; ++layer) {
      for (const VectorRole role : {VectorRole::kInputNorm, VectorRole::kPostAttentionNorm}) {
        add(Part::kNorms, VectorTensorName(files.layout, role, layer));
      }
      add(Part::kRouter, VectorTensorName(files.layout, VectorRole::kRouterBias, layer));
    }
    add(Part::kNorms, VectorTensorName(files.layout, VectorRole::kFinalNorm, 0));
  }
  return bytes;
}

void AddMatrix(const ModelConfig& config, const CheckpointFiles* files, const MatrixRef& ref,
               int rank, int world_size, ModelSizes& sizes) {
  const Layout layout = LayoutOf(config, files);
  const LogicalMatrix matrix = DescribeMatrix(layout, config, ref);
  int64_t k = 0, n = 0, on_disk = 0;
  bool is_float32 = ref.role == MatrixRole::kRouter;
  for (const MatrixPart& part : matrix.parts) {
    const formats::MatrixSlice slice = SliceOf(part, matrix.split, rank, world_size);
    k = slice.num_rows();
    n += slice.num_columns();
    const TensorType plain = PlainType(files, part.stored, ref.role);
    on_disk += NominalDiskBytes(part.stored.format, k, slice.num_columns(), plain);
    is_float32 |= plain != TensorType::kBF16;  // one part makes all of them so
  }
  const WeightFormat format =
      QuantizedFormat(matrix.parts.front().stored.format)
          .value_or(is_float32 ? WeightFormat::kFloat32 : WeightFormat::kBfloat16);
  Size size;
  const bool is_tied = ref.role == MatrixRole::kHead && layout.head_is_tied;
  if (!is_tied) {
    size.num_parameters = k * n;
    size.on_disk = on_disk;
  }
  size.on_cpu = CpuBytes(format, k, n, ref.role);
  if (format == WeightFormat::kFloat32 && ref.role != MatrixRole::kRouter) {
    sizes.has_float32_matrices = true;
  } else {
    size.on_cuda = CudaBytes(format, k, n, ref.role);
  }
  sizes.parts[PartOf(ref)] += size;
}

void AddVectors(const ModelConfig& config, const Layout& layout, ModelSizes& sizes) {
  const auto add = [&](Part part, int64_t count, int64_t disk_bytes_each) {
    sizes.parts[part] += {count, count * disk_bytes_each, count * 4, count * 4};  // as float32
  };
  add(Part::kNorms, (int64_t{2} * config.num_layers + 1) * config.hidden_size, 2);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    if (config.IsMoeLayer(layer) && layout.has_router_bias) {
      add(Part::kRouter, config.num_experts, 4);
    }
  }
}

}  // namespace

std::string_view PartName(Part part) {
  switch (part) {
    case Part::kEmbedding:
      return "embedding";
    case Part::kAttention:
      return "attention";
    case Part::kDenseMlp:
      return "dense MLP";
    case Part::kExperts:
      return "experts";
    case Part::kSharedExperts:
      return "shared experts";
    case Part::kRouter:
      return "router";
    case Part::kNorms:
      return "norms";
    case Part::kHead:
      return "head";
  }
  CHECK(false, "part={}", static_cast<int>(part));
}

Size& Size::operator+=(const Size& other) {
  num_parameters += other.num_parameters;
  on_disk += other.on_disk;
  on_cpu += other.on_cpu;
  on_cuda += other.on_cuda;
  return *this;
}

Size ModelSizes::total() const {
  Size sum;
  for (const auto& [part, size] : parts) sum += size;
  return sum;
}

ModelSizes SizesOf(const ModelConfig& config, const CheckpointFiles* files, int rank,
                   int world_size) {
  ModelSizes sizes;
  for (const MatrixRef& ref : AllMatrices(config)) {
    AddMatrix(config, files, ref, rank, world_size, sizes);
  }
  AddVectors(config, LayoutOf(config, files), sizes);
  if (files == nullptr || world_size != 1) return sizes;
  const std::map<Part, int64_t> disk = DiskBytes(config, *files);
  for (auto& [part, size] : sizes.parts) {
    const auto it = disk.find(part);
    size.on_disk = it == disk.end() ? 0 : it->second;
  }
  // Its tensor, if there is one, is skipped; the embedding's is counted there.
  if (files->layout.head_is_tied) sizes.parts[Part::kHead].on_disk = 0;
  return sizes;
}

int64_t ActiveParameters(const ModelConfig& config, const ModelSizes& whole) {
  int64_t active = whole.total().num_parameters;
  if (const auto experts = whole.parts.find(Part::kExperts); experts != whole.parts.end()) {
    const int64_t all = experts->second.num_parameters;
    active -= all - all / config.num_experts * config.num_experts_per_token;
  }
  const bool is_tied = whole.parts.at(Part::kHead).num_parameters == 0;
  return is_tied ? active : active - whole.parts.at(Part::kEmbedding).num_parameters;
}

bool LayerRange::IsLike(const LayerRange& other) const {
  return attention == other.attention && mlp == other.mlp && num_experts == other.num_experts &&
         shared_experts == other.shared_experts;
}

std::vector<LayerRange> LayerRanges(const ModelConfig& config, const CheckpointFiles* files) {
  const Layout layout = LayoutOf(config, files);
  // Of all tensors of some matrices: "BF16", or "BF16 and F32" where they differ.
  const auto formats_of = [&](const std::vector<MatrixRef>& refs) {
    std::set<std::string_view> names;
    for (const MatrixRef& ref : refs) {
      for (const MatrixPart& part : DescribeMatrix(layout, config, ref).parts) {
        const auto quantized = QuantizedFormat(part.stored.format);
        names.insert(quantized ? formats::FormatName(*quantized)
                               : TensorTypeName(PlainType(files, part.stored, ref.role)));
      }
    }
    return fmt::format("{}", fmt::join(names, " and "));
  };
  const auto mlp = [&](int layer, int expert) {
    return formats_of({{MatrixRole::kGateUp, layer, expert}, {MatrixRole::kDown, layer, expert}});
  };
  std::vector<LayerRange> ranges;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const bool is_moe = config.IsMoeLayer(layer);
    LayerRange range = {layer,
                        layer,
                        formats_of({{MatrixRole::kQkv, layer}, {MatrixRole::kOutput, layer}}),
                        mlp(layer, is_moe ? 0 : kDenseMlp),
                        is_moe ? config.num_experts : 0,
                        ""};
    if (is_moe && config.num_shared_experts > 0) {
      range.shared_experts = mlp(layer, kSharedExperts);
    }
    if (!ranges.empty() && ranges.back().IsLike(range)) {
      ranges.back().last = layer;
    } else {
      ranges.push_back(std::move(range));
    }
  }
  return ranges;
}

int64_t CpuKvBytesPerToken(const ModelConfig& config, int world_size) {
  const int64_t kv_heads = std::max(1, config.num_kv_heads / world_size);
  return int64_t{2} * config.num_layers * kv_heads * config.head_dim *
         static_cast<int64_t>(sizeof(float));  // 2: K and V
}

int64_t CudaKvBytesPerToken(const ModelConfig& config, int world_size,
                            kernels::plan::KvCacheKind kind) {
  const int kv_heads = std::max(1, config.num_kv_heads / world_size);
  return kernels::plan::KvBlockBytes(kind, config.num_layers, kv_heads, config.head_dim) /
         kernels::plan::kKvTileTokens;
}

}  // namespace wintserve::inspect
