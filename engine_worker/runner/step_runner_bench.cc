// What a decode step costs beside the model: checks, batch, sampling, digest.
//   build/cpu/bench/step_runner_bench
#include <benchmark/benchmark.h>

#include <vector>

#include "common/check.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/step_runner.h"
#include "kernels/cpu/cpu_backend.h"

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
  kernels::Backend* backend() const override { return backend_.get(); }
  int vocab_size() const override { return vocab_size_; }
  int num_layers() const override { return 1; }
  int max_position() const override { return 1 << 30; }
  int64_t kv_block_bytes() const override { return 1; }
  uint64_t kv_layout_digest() const override { return 1; }
  uint64_t weights_digest() const override { return 1; }
  int max_batch_tokens() const override { return 256; }
  int max_logit_rows() const override { return 16; }
  absl::StatusOr<kernels::ConstRows> Forward(const kernels::DeviceBatch& /*batch*/,
                                             void* /*kv_pool*/) override {
    return kernels::ConstRows(logits_.data(), vocab_size_);
  }

  absl::StatusOr<kernels::ConstRows> TokenLogits(int64_t /*first_token*/,
                                                 int64_t /*num_tokens*/) override {
    return kernels::ConstRows(logits_.data(), vocab_size_);
  }

 private:
  const std::unique_ptr<kernels::Backend> backend_ = kernels::cpu::CreateCpuBackend({});
  const int vocab_size_;
  std::vector<float> logits_;
};

void DecodeStep(benchmark::State& state, const SamplingParams& sampling) {
  const auto num_rows = static_cast<uint32_t>(state.range(0));
  const int vocab_size = static_cast<int>(state.range(1));
  IdleModel model(vocab_size);
  const auto collective = MakeSingleRankCollective();
  constexpr uint32_t kMaxTokens = 8192;
  auto runner = StepRunner::Create({.num_blocks = 1,
                                    .max_slots = num_rows,
                                    .max_tokens = 256,
                                    .max_sequence_tokens = kMaxTokens,
                                    .sampled_vocab_size = static_cast<uint32_t>(vocab_size)},
                                   &model, collective.get(), nullptr, nullptr);
  CHECK(runner.ok(), "{}", runner.status().ToString());
  const std::vector<BlockId> blocks(kMaxTokens / kernels::kKvBlockTokens);
  StepPlan plan;
  uint32_t position = 0;
  for (auto _ : state) {
    if (position == kMaxTokens) {  // once in 8192 steps
      StepPlan release = {.step = ++plan.step};
      for (uint32_t slot = 0; slot < num_rows; ++slot) release.slot_release.push_back(slot);
      CHECK((*runner)->Apply(release, 0).ok());
      position = 0;
    }
    plan.slot_init.clear();
    plan.rows.clear();
    for (uint32_t slot = 0; slot < num_rows; ++slot) {
      if (position == 0) plan.slot_init.push_back({slot, sampling, blocks});
      plan.rows.push_back({slot, position, 1, true, {}});
      if (position == 0) plan.rows.back().tokens = {1};
    }
    ++plan.step;
    ++position;
    CHECK((*runner)->Apply(plan, 0).ok());
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
