#include "engine_worker/weights/checkpoint.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/weights/checkpoint_files.h"
#include "engine_worker/weights/k_order.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/matrix_loader.h"
#include "engine_worker/weights/tensor_set.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::KOrder;

constexpr int kMaxExpertsForKOrder = 64;  // of all layers together

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
  AdviseReading(data, Reading::kSparse);
  for (size_t i = 0; i < kSamples; ++i) {
    const size_t offset = (data.size() - kSampleBytes) / (kSamples - 1) * i;
    XXH3_64bits_update(state, data.data() + offset, kSampleBytes);
  }
  AdviseReading(data, Reading::kWhole);
  DropPages(data);
}

class MappedCheckpoint : public Checkpoint {
 public:
  MappedCheckpoint(CheckpointFiles files, const ModelConfig& config)
      : sets_(std::move(files.sets)),
        layout_(std::move(files.layout)),
        config_(config),
        stored_config_(std::move(files.stored_config)) {
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
  MatrixBytes BytesOf(const MatrixRef& ref, int rank, int world_size) const override;
  absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const override;

  bool head_is_tied() const override { return layout_.head_is_tied; }
  bool has_router_bias() const override { return layout_.has_router_bias; }
  KOrder k_order() const override { return k_order_; }
  KOrderEvidence k_order_evidence() const override { return evidence_; }
  uint64_t digest() const override { return digest_; }
  int64_t total_bytes() const override { return total_bytes_; }

  absl::Status DecideKOrder(KOrderChoice choice);

 private:
  int num_shards() const { return static_cast<int>(sets_.size()); }
  absl::StatusOr<HostMatrix> LoadEmbedding() const;
  absl::StatusOr<KOrderVote> CollectVotes() const;
  void CheckRef(const MatrixRef& ref) const;

  const std::vector<TensorSet> sets_;  // one, or one a rank
  const Layout layout_;
  const ModelConfig config_;         // of the whole model
  const ModelConfig stored_config_;  // of one element of sets_
  KOrder k_order_ = KOrder::kMma64;
  KOrderEvidence evidence_;
  uint64_t digest_ = 0;
  int64_t total_bytes_ = 0;
};

void MappedCheckpoint::CheckRef(const MatrixRef& ref) const {
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

absl::StatusOr<HostMatrix> MappedCheckpoint::LoadEmbedding() const {
  const LogicalMatrix described = DescribeMatrix(layout_, stored_config_, {MatrixRole::kEmbedding});
  HostMatrix whole;
  for (const TensorSet& set : sets_) {
    ASSIGN_OR_RETURN(HostMatrix rows, LoadMatrixSlice(set, described, 0, 1, k_order_, false));
    if (whole.k == 0) {
      whole = std::move(rows);
      continue;
    }
    CHECK(rows.format == whole.format, "{}", set.dir().string());  // CheckRanksAgree
    whole.k += rows.k;
    whole.values_bf16.insert(whole.values_bf16.end(), rows.values_bf16.begin(),
                             rows.values_bf16.end());
    whole.values_f32.insert(whole.values_f32.end(), rows.values_f32.begin(), rows.values_f32.end());
  }
  return whole;
}

absl::StatusOr<HostMatrix> MappedCheckpoint::LoadMatrix(const MatrixRef& ref, int rank,
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
  if (is_presharded) {
    // Of what every rank has a copy of, all take the same: ranks that route otherwise compute
    // nonsense together.
    const TensorSet& set = matrix.split == Split::kNone ? sets_.front() : sets_[rank];
    return LoadMatrixSlice(set, matrix, 0, 1, k_order_, as_float32);
  }
  return LoadMatrixSlice(sets_.front(), matrix, rank, world_size, k_order_, as_float32);
}

MatrixBytes MappedCheckpoint::BytesOf(const MatrixRef& ref, int rank, int world_size) const {
  CheckRef(ref);
  CHECK(rank >= 0 && rank < world_size, "rank={} world_size={}", rank, world_size);
  const LogicalMatrix matrix = DescribeMatrix(layout_, stored_config_, ref);
  const bool as_float32 = ref.role == MatrixRole::kRouter;
  if (ref.role == MatrixRole::kEmbedding) {
    MatrixBytes bytes = BytesOfSlice(sets_.front(), matrix, 0, 1, as_float32);
    bytes.on_disk *= num_shards();
    bytes.on_host *= num_shards();
    return bytes;
  }
  const bool is_presharded = num_shards() > 1;
  if (is_presharded && rank >= num_shards()) return {};  // LoadMatrix says what is wrong
  return is_presharded ? BytesOfSlice(sets_[rank], matrix, 0, 1, as_float32)
                       : BytesOfSlice(sets_.front(), matrix, rank, world_size, as_float32);
}

absl::StatusOr<std::vector<float>> MappedCheckpoint::LoadVector(VectorRole role, int layer) const {
  const TensorSet::Entry* entry = sets_.front().Find(VectorTensorName(layout_, role, layer));
  CHECK(entry != nullptr, "role={} layer={}", static_cast<int>(role), layer);
  return ReadFloats(*entry->view);
}

// Experts of all WINT2 layers in turn, so that no layer's peculiarity decides.
absl::StatusOr<KOrderVote> MappedCheckpoint::CollectVotes() const {
  std::vector<int> layers;
  for (int layer = config_.last_wint4_layer + 1; layer < config_.num_layers; ++layer) {
    if (config_.IsMoeLayer(layer)) layers.push_back(layer);
  }
  KOrderVote vote;
  if (layers.empty()) return vote;
  const auto num_layers = static_cast<int>(layers.size());
  const int num_votes = static_cast<int>(
      std::min<int64_t>(int64_t{num_layers} * config_.num_experts, kMaxExpertsForKOrder));
  for (int i = 0; i < std::min(num_layers, num_votes); ++i) {
    // Evenly spread where there are more layers than votes.
    const int layer = layers[int64_t{i} * num_layers / std::min(num_layers, num_votes)];
    ASSIGN_OR_RETURN(const HostMatrix router,
                     LoadMatrix({MatrixRole::kRouter, layer}, 0, num_shards()));
    KOrderVote::Layer votes = vote.BeginLayer(router);
    for (int expert = 0; i + int64_t{expert} * num_layers < num_votes; ++expert) {
      ASSIGN_OR_RETURN(const HostMatrix gate_up,
                       LoadMatrix({MatrixRole::kGateUp, layer, expert}, 0, num_shards()));
      ASSIGN_OR_RETURN(const HostMatrix down,
                       LoadMatrix({MatrixRole::kDown, layer, expert}, 0, num_shards()));
      votes.AddExpert(gate_up, down);
    }
    vote.EndLayer(votes);
  }
  return vote;
}

absl::Status MappedCheckpoint::DecideKOrder(KOrderChoice choice) {
  if (choice != KOrderChoice::kAuto) {
    k_order_ = choice == KOrderChoice::kNatural ? KOrder::kNatural : KOrder::kMma64;
    return absl::OkStatus();
  }
  if (config_.expert_quantization != ExpertQuantization::kW4W2) return absl::OkStatus();
  ASSIGN_OR_RETURN(const KOrderVote vote, CollectVotes());
  evidence_ = vote.evidence();
  if (evidence_.num_experts == 0) return absl::OkStatus();
  k_order_ = evidence_.Decide();
  LOG_INFO("K order of the WINT2 experts: {}", evidence_.Describe());
  if (evidence_.contradicts_itself()) {
    LOG_WARNING(
        "the two checks of the K order contradict each other: if the model talks nonsense, "
        "try the other --k-order");
  } else if (!evidence_.is_conclusive()) {
    LOG_WARNING(
        "nothing tells the K order of the WINT2 experts: if the model talks nonsense, try "
        "--k-order natural");
  }
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
  ASSIGN_OR_RETURN(CheckpointFiles files, OpenCheckpointFiles(dir, config));
  for (const TensorSet& set : files.sets) {
    const TensorCheck check = CheckTensors(set, files.layout, files.stored_config);
    for (const SkippedTensors::Count& count : check.skipped.counts) {
      LOG_INFO("{}: skipped {} tensors: {}", set.dir().string(), count.num_tensors,
               SkipReasonName(count.reason));
    }
    RETURN_IF_ERROR(ToStatus(check.problems));
  }
  RETURN_IF_ERROR(ToStatus(CheckRanksAgree(files)));
  auto checkpoint = std::make_unique<MappedCheckpoint>(std::move(files), config);
  RETURN_IF_ERROR(checkpoint->DecideKOrder(k_order));
  return checkpoint;
}

}  // namespace wintserve
