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
  if (options.device == "cuda") return kernels::cuda::CreateCudaBackend({});
#endif
  return absl::UnavailableError(
      fmt::format("--device {}: this build has no backend for it", options.device));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelUnderTest>> ModelUnderTest::Load(
    const ModelUnderTestOptions& options) {
  std::unique_ptr<ModelUnderTest> loaded(new ModelUnderTest());
  ASSIGN_OR_RETURN(loaded->backend_, CreateBackend(options));
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                   Checkpoint::Open(options.model_dir, config, KOrderChoice::kAuto));
  ASSIGN_OR_RETURN(loaded->model_,
                   LoadErnie45(config, *checkpoint, loaded->backend_.get(), /*collective=*/nullptr,
                               {.max_batch_tokens = kMaxBatchTokens, .max_logit_rows = kMaxRows}));
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

// Logits [rows that want them, vocab_size].
absl::StatusOr<std::vector<float>> ModelUnderTest::Forward(const Batch& batch,
                                                           DeviceBatch* device_batch, void* pool) {
  backend_->SetBatch(batch, device_batch);
  ASSIGN_OR_RETURN(const kernels::ConstRows logits, model_->Forward(*device_batch, pool));
  const int64_t num_rows = device_batch->num_logit_rows();
  std::vector<float> host(num_rows * vocab_size());
  if (num_rows == 0) return host;
  CHECK(logits.stride == vocab_size(), "stride={}", logits.stride);
  RETURN_IF_ERROR(backend_->CopyToHost(host.data(), logits.data,
                                       std::ssize(host) * static_cast<int64_t>(sizeof(float))));
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
  const std::unique_ptr<Collective> collective = MakeSingleRankCollective();
  const size_t longest = *std::max_element(lengths.begin(), lengths.end());
  ASSIGN_OR_RETURN(const std::unique_ptr<StepRunner> runner,
                   StepRunner::Create({.num_blocks = static_cast<uint32_t>(num_blocks),
                                       .max_slots = static_cast<uint32_t>(requests.size()),
                                       .max_tokens = static_cast<uint32_t>(prompt_tokens),
                                       .max_sequence_tokens = static_cast<uint32_t>(longest),
                                       .sampled_vocab_size = static_cast<uint32_t>(vocab_size())},
                                      model_.get(), collective.get(), pool->data(), nullptr));
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
    StepPlan next = {.step = plan.step};
    for (const SampledToken& sampled : done.sampled) {
      TokenIds& ids = continuations[sampled.slot];
      ids.push_back(sampled.token);
      const GreedyRequest& request = requests[sampled.slot];
      if (sampled.token == stop_id || std::ssize(ids) == request.max_tokens) continue;
      const size_t position = request.prompt.size() + ids.size() - 1;
      next.rows.push_back({sampled.slot, static_cast<uint32_t>(position), 1, true, {}});
    }
    plan = std::move(next);
  }
  return continuations;
}

}  // namespace wintserve::accuracy
