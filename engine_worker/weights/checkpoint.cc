#include "engine_worker/weights/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xxhash.h>

#include <algorithm>
#include <set>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/weights/k_order.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/matrix_loader.h"
#include "engine_worker/weights/tensor_set.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::KOrder;

constexpr int kMaxExpertsForKOrder = 64;

// What is wrong with a checkpoint: the first finding in full, the others counted.
class Findings {
 public:
  void Add(std::string text) {
    if (count_++ == 0) first_ = std::move(text);
  }
  absl::Status ToStatus() const {
    if (count_ == 0) return absl::OkStatus();
    return absl::DataLossError(count_ == 1 ? first_
                                           : fmt::format("{} (and {} more)", first_, count_ - 1));
  }

 private:
  std::string first_;
  int64_t count_ = 0;
};

std::string ShowTypes(const std::vector<TensorType>& types) {
  std::vector<std::string_view> names;
  for (TensorType type : types) names.push_back(TensorTypeName(type));
  return fmt::format("{}", fmt::join(names, " or "));
}

std::string ShowShapes(const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<std::string> texts;
  for (const auto& shape : shapes) texts.push_back(fmt::format("[{}]", fmt::join(shape, ", ")));
  return fmt::format("{}", fmt::join(texts, " or "));
}

void CheckTensor(const TensorSet& set, const ExpectedTensor& expected, Findings& findings) {
  const TensorSet::Entry* entry = set.Find(expected.name);
  if (entry == nullptr) {
    findings.Add(fmt::format("{}: tensor {}: found none, expected {} {}", set.dir().string(),
                             expected.name, ShowTypes(expected.types),
                             ShowShapes(expected.shapes)));
    return;
  }
  const TensorView& view = *entry->view;
  const auto contains = [](const auto& allowed, const auto& value) {
    return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
  };
  if (!contains(expected.types, view.type) || !contains(expected.shapes, view.shape)) {
    findings.Add(fmt::format("{}: tensor {}: found {} {}, expected {} {}",
                             entry->file->path().string(), expected.name, TensorTypeName(view.type),
                             ShowShapes({view.shape}), ShowTypes(expected.types),
                             ShowShapes(expected.shapes)));
  }
}

// The packed layouts come in whole tiles; a shard of a pre-sharded checkpoint might not.
void CheckTiles(const TensorSet& set, const StoredMatrix& stored, Findings& findings) {
  const auto [k_multiple, n_multiple] = [&]() -> std::pair<int64_t, int64_t> {
    switch (stored.format) {
      case StoredFormat::kPlain:
        return {1, 1};
      case StoredFormat::kWint8:
        return {64, 2};
      case StoredFormat::kWint4:
        return {64, 4};
      case StoredFormat::kWint2:
        return {2 * formats::kWint2GroupSize, 1};
    }
    return {1, 1};
  }();
  if (stored.k % k_multiple != 0 || stored.n % n_multiple != 0) {
    findings.Add(
        fmt::format("{}: tensor {}: found a matrix of {} x {}, expected multiples of {} "
                    "and {}",
                    set.dir().string(), stored.name, stored.k, stored.n, k_multiple, n_multiple));
  }
}

std::vector<ExpectedTensor> ExpectedVectors(const Layout& layout, const ModelConfig& config) {
  std::vector<ExpectedTensor> expected;
  const auto add = [&](VectorRole role, int layer, std::vector<std::vector<int64_t>> shapes) {
    expected.push_back(
        {VectorTensorName(layout, role, layer), FloatTensorTypes(), std::move(shapes)});
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    add(VectorRole::kInputNorm, layer, {{config.hidden_size}});
    add(VectorRole::kPostAttentionNorm, layer, {{config.hidden_size}});
    if (layout.has_router_bias && config.IsMoeLayer(layer)) {
      add(VectorRole::kRouterBias, layer, {{1, config.num_experts}, {config.num_experts}});
    }
  }
  add(VectorRole::kFinalNorm, 0, {{config.hidden_size}});
  return expected;
}

// Every tensor that the model needs is there as it must be, and no other but the known skipped
// ones.
absl::Status Verify(const TensorSet& set, const Layout& layout, const ModelConfig& config) {
  Findings findings;
  std::set<std::string> needed;
  const auto check = [&](const ExpectedTensor& expected) {
    if (needed.insert(expected.name).second) CheckTensor(set, expected, findings);
  };
  for (const MatrixRef& ref : AllMatrices(config)) {
    if (ref.role == MatrixRole::kHead && layout.head_is_tied) continue;  // no tensors of its own
    for (const MatrixPart& part : DescribeMatrix(layout, config, ref).parts) {
      CheckTiles(set, part.stored, findings);
      for (const ExpectedTensor& expected : ExpectedTensors(part.stored)) check(expected);
    }
  }
  for (const ExpectedTensor& expected : ExpectedVectors(layout, config)) check(expected);
  int64_t num_skipped = 0;
  for (const auto& [name, entry] : set.tensors()) {
    if (needed.contains(name)) continue;
    if (IsSkippedTensor(layout, name)) {
      ++num_skipped;
      continue;
    }
    findings.Add(fmt::format("{}: tensor {}: found {} {}, expected no tensor of this name",
                             entry.file->path().string(), name, TensorTypeName(entry.view->type),
                             ShowShapes({entry.view->shape})));
  }
  if (num_skipped > 0) {
    LOG_INFO("{}: skipped {} tensors that are not used (MTP, KV scales, a tied head)",
             set.dir().string(), num_skipped);
  }
  return findings.ToStatus();
}

// The directories to open: the checkpoint's own, or rank0 … of a pre-sharded one.
absl::StatusOr<std::vector<std::filesystem::path>> FindShardDirs(const std::filesystem::path& dir) {
  std::error_code error;
  if (!std::filesystem::is_directory(dir, error)) {
    return absl::NotFoundError(fmt::format("{}: no such directory", dir.string()));
  }
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("rank") && entry.is_directory(error)) names.insert(name);
  }
  if (names.size() <= 1) return std::vector{dir};
  std::vector<std::filesystem::path> dirs;
  for (size_t rank = 0; rank < names.size(); ++rank) {
    const std::string name = fmt::format("rank{}", rank);
    if (!names.contains(name)) {
      return absl::DataLossError(
          fmt::format("{}: found {} directories named rank*, expected {} among them", dir.string(),
                      names.size(), name));
    }
    dirs.push_back(dir / name);
  }
  return dirs;
}

// Header and size do not tell two trainings of one model apart, so samples of the data go in too:
// evenly spread, few enough for a model of many gigabytes on a cold disk.
void HashFile(const SafetensorsFile& file, XXH3_state_t* state) {
  constexpr size_t kSamples = 64;
  constexpr size_t kSampleBytes = 4096;
  const int64_t size_bytes = file.size_bytes();
  XXH3_64bits_update(state, &size_bytes, sizeof(size_bytes));
  XXH3_64bits_update(state, file.header().data(), file.header().size());
  const std::span<const uint8_t> data = file.data();
  if (data.size() <= kSamples * kSampleBytes) {
    XXH3_64bits_update(state, data.data(), data.size());
    return;
  }
  for (size_t i = 0; i < kSamples; ++i) {
    const size_t offset = (data.size() - kSampleBytes) / (kSamples - 1) * i;
    XXH3_64bits_update(state, data.data() + offset, kSampleBytes);
  }
}

class CheckpointFiles : public Checkpoint {
 public:
  CheckpointFiles(std::vector<TensorSet> sets, Layout layout, const ModelConfig& config)
      : sets_(std::move(sets)),
        layout_(std::move(layout)),
        config_(config),
        stored_config_(ConfigOfShard(config, num_shards())) {
    XXH3_state_t* state = XXH3_createState();
    XXH3_64bits_reset(state);
    for (const TensorSet& set : sets_) {
      for (const SafetensorsFile& file : set.files()) {
        HashFile(file, state);
        total_bytes_ += file.size_bytes();
      }
    }
    digest_ = XXH3_64bits_digest(state);
    XXH3_freeState(state);
  }

  absl::StatusOr<HostMatrix> LoadMatrix(const MatrixRef& ref, int rank,
                                        int world_size) const override;
  absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const override;

  bool head_is_tied() const override { return layout_.head_is_tied; }
  bool has_router_bias() const override { return layout_.has_router_bias; }
  KOrder k_order() const override { return k_order_; }
  uint64_t digest() const override { return digest_; }
  int64_t total_bytes() const override { return total_bytes_; }
  void ReleasePages() const override {
    for (const TensorSet& set : sets_) {
      for (const SafetensorsFile& file : set.files()) file.ReleasePages();
    }
  }

  absl::Status DecideKOrder(KOrderChoice choice);

 private:
  int num_shards() const { return static_cast<int>(sets_.size()); }
  absl::StatusOr<HostMatrix> LoadEmbedding() const;
  void CheckRef(const MatrixRef& ref) const;

  const std::vector<TensorSet> sets_;  // one, or one a rank
  const Layout layout_;
  const ModelConfig config_;         // of the whole model
  const ModelConfig stored_config_;  // of one element of sets_
  KOrder k_order_ = KOrder::kMma64;
  uint64_t digest_ = 0;
  int64_t total_bytes_ = 0;
};

void CheckpointFiles::CheckRef(const MatrixRef& ref) const {
  if (ref.role == MatrixRole::kEmbedding || ref.role == MatrixRole::kHead) return;
  CHECK(ref.layer >= 0 && ref.layer < config_.num_layers, "layer={}", ref.layer);
  const bool is_moe = config_.IsMoeLayer(ref.layer);
  if (ref.role == MatrixRole::kRouter) CHECK(is_moe, "layer={}", ref.layer);
  if (ref.role != MatrixRole::kGateUp && ref.role != MatrixRole::kDown) return;
  CHECK(ref.expert == kDenseMlp ? !is_moe
        : ref.expert == kSharedExperts
            ? is_moe && config_.num_shared_experts > 0
            : is_moe && ref.expert >= 0 && ref.expert < config_.num_experts,
        "layer={} expert={}", ref.layer, ref.expert);
}

absl::StatusOr<HostMatrix> CheckpointFiles::LoadEmbedding() const {
  const LogicalMatrix described = DescribeMatrix(layout_, stored_config_, {MatrixRole::kEmbedding});
  HostMatrix whole;
  for (const TensorSet& set : sets_) {
    ASSIGN_OR_RETURN(HostMatrix rows, LoadMatrixSlice(set, described, 0, 1, k_order_, false));
    if (whole.k == 0) {
      whole = std::move(rows);
      continue;
    }
    if (rows.format != whole.format) {
      return absl::DataLossError(
          fmt::format("{}: tensor {}.weight: found another type than in the other rank* "
                      "directories, expected the same",
                      set.dir().string(), described.parts.front().stored.name));
    }
    whole.k += rows.k;
    whole.values_bf16.insert(whole.values_bf16.end(), rows.values_bf16.begin(),
                             rows.values_bf16.end());
    whole.values_f32.insert(whole.values_f32.end(), rows.values_f32.begin(), rows.values_f32.end());
  }
  return whole;
}

absl::StatusOr<HostMatrix> CheckpointFiles::LoadMatrix(const MatrixRef& ref, int rank,
                                                       int world_size) const {
  CheckRef(ref);
  CHECK(rank >= 0 && rank < world_size, "rank={} world_size={}", rank, world_size);
  RETURN_IF_ERROR(CheckTensorParallel(config_, world_size));
  const bool is_presharded = num_shards() > 1;
  if (is_presharded && world_size != num_shards()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: the checkpoint is split for tensor parallel size {}; it cannot be loaded "
                    "with {}",
                    sets_.front().dir().parent_path().string(), num_shards(), world_size));
  }
  if (ref.role == MatrixRole::kEmbedding) return LoadEmbedding();
  const LogicalMatrix matrix = DescribeMatrix(layout_, stored_config_, ref);
  const bool as_float32 = ref.role == MatrixRole::kRouter;
  if (is_presharded) return LoadMatrixSlice(sets_[rank], matrix, 0, 1, k_order_, as_float32);
  return LoadMatrixSlice(sets_.front(), matrix, rank, world_size, k_order_, as_float32);
}

absl::StatusOr<std::vector<float>> CheckpointFiles::LoadVector(VectorRole role, int layer) const {
  const TensorSet::Entry* entry = sets_.front().Find(VectorTensorName(layout_, role, layer));
  CHECK(entry != nullptr, "role={} layer={}", static_cast<int>(role), layer);
  return ReadFloats(*entry->view);
}

absl::Status CheckpointFiles::DecideKOrder(KOrderChoice choice) {
  if (choice != KOrderChoice::kAuto) {
    k_order_ = choice == KOrderChoice::kNatural ? KOrder::kNatural : KOrder::kMma64;
    return absl::OkStatus();
  }
  if (config_.expert_quantization != ExpertQuantization::kW4W2) return absl::OkStatus();
  int layer = config_.last_wint4_layer + 1;
  while (layer < config_.num_layers && !config_.IsMoeLayer(layer)) ++layer;
  if (layer >= config_.num_layers) return absl::OkStatus();
  KOrderVote vote;
  for (int expert = 0; expert < std::min(config_.num_experts, kMaxExpertsForKOrder); ++expert) {
    ASSIGN_OR_RETURN(const HostMatrix gate_up,
                     LoadMatrix({MatrixRole::kGateUp, layer, expert}, 0, num_shards()));
    ASSIGN_OR_RETURN(const HostMatrix down,
                     LoadMatrix({MatrixRole::kDown, layer, expert}, 0, num_shards()));
    vote.AddExpert(gate_up, down);
  }
  k_order_ = vote.Decide();
  LOG_INFO(
      "K order of the WINT2 experts: {} (correlation of layer {}: mma64 {:.3f}, natural "
      "{:.3f})",
      k_order_ == KOrder::kMma64 ? "mma64" : "natural", layer, vote.mma64_correlation(),
      vote.natural_correlation());
  return absl::OkStatus();
}

}  // namespace

std::vector<MatrixRef> AllMatrices(const ModelConfig& config) {
  std::vector<MatrixRef> refs = {{MatrixRole::kEmbedding}};
  const auto add_mlp = [&](int layer, int expert) {
    refs.push_back({MatrixRole::kGateUp, layer, expert});
    refs.push_back({MatrixRole::kDown, layer, expert});
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    refs.push_back({MatrixRole::kQkv, layer});
    refs.push_back({MatrixRole::kOutput, layer});
    if (!config.IsMoeLayer(layer)) {
      add_mlp(layer, kDenseMlp);
      continue;
    }
    refs.push_back({MatrixRole::kRouter, layer});
    for (int expert = 0; expert < config.num_experts; ++expert) add_mlp(layer, expert);
    if (config.num_shared_experts > 0) add_mlp(layer, kSharedExperts);
  }
  refs.push_back({MatrixRole::kHead});
  return refs;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::filesystem::path& dir,
                                                             const ModelConfig& config,
                                                             KOrderChoice k_order) {
  ASSIGN_OR_RETURN(const std::vector<std::filesystem::path> dirs, FindShardDirs(dir));
  const int num_shards = static_cast<int>(dirs.size());
  if (absl::Status fits = CheckTensorParallel(config, num_shards); !fits.ok()) {
    return absl::DataLossError(fmt::format("{}: found {} directories named rank*, but {}",
                                           dir.string(), num_shards, std::string(fits.message())));
  }
  const ModelConfig stored_config = ConfigOfShard(config, num_shards);
  std::vector<TensorSet> sets;
  Layout layout;
  for (const std::filesystem::path& shard_dir : dirs) {
    ASSIGN_OR_RETURN(TensorSet set, TensorSet::Open(shard_dir));
    if (sets.empty()) {
      ASSIGN_OR_RETURN(layout, DetectLayout(set, stored_config));
    }
    RETURN_IF_ERROR(Verify(set, layout, stored_config));
    sets.push_back(std::move(set));
  }
  auto checkpoint = std::make_unique<CheckpointFiles>(std::move(sets), std::move(layout), config);
  RETURN_IF_ERROR(checkpoint->DecideKOrder(k_order));
  return checkpoint;
}

}  // namespace wintserve
