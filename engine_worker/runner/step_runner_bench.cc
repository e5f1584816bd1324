// What a decode step costs beside the model: checks, batch, sampling, digest.
//   build/cpu/bench/step_runner_bench
#include <benchmark/benchmark.h>

#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/step_runner.h"

namespace wintserve {
namespace {

// Takes no time.
class IdleModel : public Model {
 public:
  explicit IdleModel(int vocab_size) : vocab_size_(vocab_size), logits_(16 * vocab_size) {
    for (size_t i = 0; i < logits_.size(); ++i) {
      logits_[i] = static_cast<float>(i * 2654435761u % 4096) / 256.0f;
    }
  }
  int vocab_size() const override { return vocab_size_; }
  int num_layers() const override { return 1; }
  int max_position() const override { return 1 << 30; }
  int64_t kv_block_bytes() const override { return 1; }
  uint64_t kv_layout_digest() const override { return 1; }
  uint64_t weights_digest() const override { return 1; }
  int max_batch_tokens() const override { return 256; }
  absl::StatusOr<std::span<const float>> Forward(const Batch& batch, void* /*kv_pool*/) override {
    return std::span<const float>(logits_).first(batch.rows.size() * vocab_size_);
  }

 private:
  const int vocab_size_;
  std::vector<float> logits_;
};

void DecodeStep(benchmark::State& state, const SamplingParams& sampling) {
  const auto num_rows = static_cast<uint32_t>(state.range(0));
  const int vocab_size = static_cast<int>(state.range(1));
  IdleModel model(vocab_size);
  const auto collective = MakeSingleRankCollective();
  constexpr uint32_t kMaxTokens = 1 << 28;
  auto runner = StepRunner::Create({.num_blocks = 1,
                                    .block_size_tokens = kMaxTokens,
                                    .max_slots = num_rows,
                                    .max_tokens = 256,
                                    .max_sequence_tokens = kMaxTokens,
                                    .sampled_vocab_size = static_cast<uint32_t>(vocab_size)},
                                   &model, collective.get(), nullptr, nullptr);
  CHECK(runner.ok(), "{}", runner.status().ToString());
  StepPlan plan;
  for (uint32_t slot = 0; slot < num_rows; ++slot) {
    plan.slot_init.push_back({slot, sampling, {BlockId{0}}});
    plan.rows.push_back({slot, 0, 1, true, {1}});
  }
  for (auto _ : state) {
    ++plan.step;
    CHECK((*runner)->Apply(plan, 0).ok());
    plan.slot_init.clear();
    for (PlanRow& row : plan.rows) {
      row.tokens.clear();
      ++row.position;
    }
  }
}
BENCHMARK_CAPTURE(DecodeStep, greedy, SamplingParams{.temperature = 0})
    ->ArgNames({"rows", "vocabulary"})
    ->ArgsProduct({{1, 8, 16}, {64, 8192}});
BENCHMARK_CAPTURE(DecodeStep, top_p, SamplingParams{.temperature = 0.8f, .top_p = 0.8f})
    ->ArgNames({"rows", "vocabulary"})
    ->ArgsProduct({{8}, {8192}});

}  // namespace
}  // namespace wintserve

BENCHMARK_MAIN();
