#include "tests/accuracy/model_under_test.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/runner/step_runner.h"
#include "engine_worker/weights/checkpoint.h"
#include "kernels/cpu/cpu_backend.h"
#ifdef WINTSERVE_HAS_CUDA
#include "engine_worker/collectives/nccl/nccl_collective.h"
#include "kernels/cuda/cuda_backend.h"
#endif

namespace wintserve::accuracy {
namespace {

using kernels::Batch;
using kernels::Buffer;
using kernels::DeviceBatch;

constexpr int kMaxBatchTokens = 512;
constexpr int kMaxRows = 256;

int64_t BlocksFor(size_t num_tokens) {
  return (static_cast<int64_t>(num_tokens) + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
}

// Block tables of sequences of these lengths, no block in two of them. Blocks fall from the pool's
// end, so that a block's index never passes for its place.
std::vector<std::vector<int32_t>> BlockTables(std::span<const size_t> lengths,
                                              int64_t* num_blocks) {
  *num_blocks = 0;
  for (const size_t length : lengths) *num_blocks += BlocksFor(length);
  std::vector<std::vector<int32_t>> tables(lengths.size());
  auto next = static_cast<int32_t>(*num_blocks);
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int64_t i = 0; i < BlocksFor(lengths[s]); ++i) tables[s].push_back(--next);
  }
  return tables;
}

absl::StatusOr<std::unique_ptr<kernels::Backend>> CreateBackend(
    const ModelUnderTestOptions& options) {
  if (options.device == "cpu") {
    return kernels::cpu::CreateCpuBackend(
        {.num_threads = options.num_threads, .rounding = options.rounding});
  }
#ifdef WINTSERVE_HAS_CUDA
  if (options.device == "cuda") return kernels::cuda::CreateCudaBackend({.device = options.rank});
#endif
  return absl::UnavailableError(
      fmt::format("--device {}: this build has no backend for it", options.device));
}

constexpr int64_t kHostSlotBytes = 4096;
constexpr int64_t kCpuSlotBytes = 64 << 10;

std::shared_ptr<MappedMemory> NewMemory(int world_size, int64_t slot_bytes) {
  auto memory = MappedMemory::Create("accuracy", ShmGroupMemoryBytes(world_size, slot_bytes));
  CHECK(memory.ok(), "{}", memory.status().ToString());
  return std::make_shared<MappedMemory>(*std::move(memory));
}

}  // namespace

MeetingPlace::MeetingPlace(int world_size)
    : world_size_(world_size), host_memory_(NewMemory(world_size, kHostSlotBytes)) {}

std::shared_ptr<MappedMemory> MeetingPlace::group_memory(int64_t slot_bytes) {
  MutexLock lock(&mutex_);
  if (group_memory_ == nullptr) group_memory_ = NewMemory(world_size_, slot_bytes);
  return group_memory_;
}

absl::Status ModelUnderTest::Join(MeetingPlace* meeting_place) {
  if (meeting_place == nullptr) {
    group_.Bind(MakeSingleRankCollective());
    return absl::OkStatus();
  }
  const auto join = [&](std::shared_ptr<MappedMemory> memory, int64_t slot_bytes) {
    return ShmCollective::Create(std::move(memory), {.group_epoch = 1,
                                                     .rank = group_.rank(),
                                                     .world_size = group_.world_size(),
                                                     .slot_bytes = slot_bytes});
  };
  ASSIGN_OR_RETURN(host_group_, join(meeting_place->host_memory(), kHostSlotBytes));
#ifdef WINTSERVE_HAS_CUDA
  if (!backend_->uses_host_memory()) {
    ASSIGN_OR_RETURN(auto control, join(meeting_place->group_memory(kNcclControlSlotBytes),
                                        kNcclControlSlotBytes));
    ASSIGN_OR_RETURN(
        auto group,
        NcclCollective::Create(std::move(control), {.stream = kernels::cuda::StreamOf(*backend_)}));
    group_.Bind(std::move(group));
    return absl::OkStatus();
  }
#endif
  ASSIGN_OR_RETURN(auto group, join(meeting_place->group_memory(kCpuSlotBytes), kCpuSlotBytes));
  group_.Bind(std::move(group));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ModelUnderTest>> ModelUnderTest::Load(
    const ModelUnderTestOptions& options) {
  const int world_size = options.meeting_place == nullptr ? 1 : options.meeting_place->world_size();
  std::unique_ptr<ModelUnderTest> loaded(new ModelUnderTest(options.rank, world_size));
  ASSIGN_OR_RETURN(loaded->backend_, CreateBackend(options));
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                   Checkpoint::Open(options.model_dir, config, KOrderChoice::kAuto));
  ASSIGN_OR_RETURN(loaded->model_,
                   LoadErnie45(config, *checkpoint, loaded->backend_.get(),
                               world_size == 1 ? nullptr : &loaded->group_,
                               {.max_batch_tokens = kMaxBatchTokens, .max_logit_rows = kMaxRows}));
  RETURN_IF_ERROR(loaded->Join(options.meeting_place.get()));
  return loaded;
}

// Every number in it is a NaN, so that whatever reads a place that nothing was written to shows.
absl::StatusOr<std::unique_ptr<Buffer>> ModelUnderTest::MakePool(int64_t num_blocks) {
  const std::vector<uint8_t> poison(model_->kv_block_bytes(), 0xFF);
  ASSIGN_OR_RETURN(std::unique_ptr<Buffer> pool,
                   backend_->Allocate(num_blocks * model_->kv_block_bytes()));
  for (int64_t block = 0; block < num_blocks; ++block) {
    backend_->CopyFromHost(static_cast<uint8_t*>(pool->data()) + block * model_->kv_block_bytes(),
                           poison.data(), model_->kv_block_bytes());
  }
  return pool;
}

// Logits [rows that want them, vocab_size]; none on other ranks than 0.
absl::StatusOr<std::vector<float>> ModelUnderTest::Forward(const Batch& batch,
                                                           DeviceBatch* device_batch, void* pool) {
  backend_->SetBatch(batch, device_batch);
  ASSIGN_OR_RETURN(const kernels::ConstRows logits, model_->Forward(*device_batch, pool));
  const int64_t num_rows = device_batch->num_logit_rows();
  if (group_.rank() != 0) return std::vector<float>();
  std::vector<float> host(num_rows * vocab_size());
  if (num_rows == 0) return host;
  CHECK(logits.stride == vocab_size(), "stride={}", logits.stride);
  RETURN_IF_ERROR(backend_->CopyToHost(host.data(), logits.data,
                                       std::ssize(host) * static_cast<int64_t>(sizeof(float))));
  RETURN_IF_ERROR(group_.DeviceStatus());
  return host;
}

absl::StatusOr<int> ModelUnderTest::TeacherForce(const std::vector<TokenIds>& sequences,
                                                 const LogitSink& sink) {
  std::vector<size_t> lengths;
  for (const TokenIds& ids : sequences) lengths.push_back(ids.size());
  int64_t num_blocks = 0;
  const auto tables = BlockTables(lengths, &num_blocks);
  const size_t longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  ASSIGN_OR_RETURN(const std::unique_ptr<DeviceBatch> device_batch,
                   backend_->CreateBatch({.max_tokens = kMaxBatchTokens,
                                          .max_rows = kMaxRows,
                                          .max_blocks_per_row = BlocksFor(longest),
                                          .num_slots = kMaxRows}));
  std::vector<std::vector<float>> last(sequences.size());
  const auto vocab = static_cast<size_t>(vocab_size());
  {
    ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> pool, MakePool(num_blocks));
    for (size_t begin = 0; begin < sequences.size(); begin += kMaxRows) {
      const size_t end = std::min(sequences.size(), begin + kMaxRows);
      for (size_t position = 0;; ++position) {
        Batch batch;
        std::vector<size_t> of_row;
        for (size_t s = begin; s < end; ++s) {
          if (position >= lengths[s]) continue;
          batch.tokens.push_back(sequences[s][position]);
          batch.rows.push_back({.position = static_cast<int32_t>(position),
                                .length = 1,
                                .block_table = tables[s],
                                .want_logits = true,
                                .slot = static_cast<int32_t>(of_row.size())});
          of_row.push_back(s);
        }
        if (of_row.empty()) break;
        ASSIGN_OR_RETURN(const std::vector<float> logits,
                         Forward(batch, device_batch.get(), pool->data()));
        if (logits.empty()) continue;
        for (size_t row = 0; row < of_row.size(); ++row) {
          const size_t s = of_row[row];
          const std::span<const float> of_position = std::span(logits).subspan(row * vocab, vocab);
          sink(s, position, of_position);
          if (position + 1 == lengths[s]) last[s].assign(of_position.begin(), of_position.end());
        }
      }
    }
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> pool, MakePool(num_blocks));
  int num_same = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::vector<float> logits;
    for (size_t position = 0; position < lengths[s]; position += kMaxBatchTokens) {
      const size_t end = std::min<size_t>(lengths[s], position + kMaxBatchTokens);
      Batch batch;
      batch.tokens.assign(sequences[s].begin() + static_cast<int64_t>(position),
                          sequences[s].begin() + static_cast<int64_t>(end));
      batch.rows.push_back({.position = static_cast<int32_t>(position),
                            .length = static_cast<int32_t>(end - position),
                            .block_table = tables[s],
                            .want_logits = true});
      ASSIGN_OR_RETURN(logits, Forward(batch, device_batch.get(), pool->data()));
    }
    const size_t bytes = vocab * sizeof(float);
    num_same += !logits.empty() && std::memcmp(logits.data(), last[s].data(), bytes) == 0 ? 1 : 0;
  }
  return num_same;
}

absl::StatusOr<std::vector<TokenIds>> ModelUnderTest::Greedy(
    const std::vector<GreedyRequest>& requests, int32_t stop_id) {
  if (requests.empty()) return std::vector<TokenIds>();
  std::vector<size_t> lengths;
  size_t prompt_tokens = 0;
  for (const GreedyRequest& request : requests) {
    lengths.push_back(request.prompt.size() + request.max_tokens);
    prompt_tokens += request.prompt.size();
  }
  int64_t num_blocks = 0;
  const auto tables = BlockTables(lengths, &num_blocks);
  ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> pool, MakePool(num_blocks));
  const size_t longest = *std::max_element(lengths.begin(), lengths.end());
  ASSIGN_OR_RETURN(const std::unique_ptr<StepRunner> runner,
                   StepRunner::Create({.num_blocks = static_cast<uint32_t>(num_blocks),
                                       .max_slots = static_cast<uint32_t>(requests.size()),
                                       .max_tokens = static_cast<uint32_t>(prompt_tokens),
                                       .max_sequence_tokens = static_cast<uint32_t>(longest),
                                       .sampled_vocab_size = static_cast<uint32_t>(vocab_size())},
                                      model_.get(), &group_, pool->data(), nullptr));
  std::vector<TokenIds> continuations(requests.size());
  StepPlan plan;
  for (uint32_t slot = 0; slot < requests.size(); ++slot) {
    const TokenIds& prompt = requests[slot].prompt;
    std::vector<BlockId> blocks;
    for (const int32_t block : tables[slot]) blocks.push_back(BlockId{block});
    plan.slot_init.push_back({slot, {.temperature = 0}, blocks});
    plan.rows.push_back({slot, 0, static_cast<uint32_t>(prompt.size()), true, prompt});
  }
  while (!plan.rows.empty()) {
    ++plan.step;
    ASSIGN_OR_RETURN(const StepDone done, runner->Apply(plan, /*plan_hash=*/0));
    TokenIds sampled(plan.rows.size());
    for (size_t row = 0; row < done.sampled.size(); ++row) sampled[row] = done.sampled[row].token;
    if (host_group_ != nullptr) {
      RETURN_IF_ERROR(host_group_->Broadcast(
          sampled.data(), std::ssize(sampled) * static_cast<int64_t>(sizeof(int32_t))));
    }
    StepPlan next = {.step = plan.step};
    for (size_t row = 0; row < plan.rows.size(); ++row) {
      const uint32_t slot = plan.rows[row].slot;
      TokenIds& ids = continuations[slot];
      ids.push_back(sampled[row]);
      const GreedyRequest& request = requests[slot];
      if (sampled[row] == stop_id || std::ssize(ids) == request.max_tokens) continue;
      const size_t position = request.prompt.size() + ids.size() - 1;
      next.rows.push_back({slot, static_cast<uint32_t>(position), 1, true, {}});
    }
    plan = std::move(next);
  }
  return continuations;
}

}  // namespace wintserve::accuracy
