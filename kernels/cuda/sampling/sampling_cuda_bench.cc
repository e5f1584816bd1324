// Time to sample a batch of rows of 103,424 logits on the device, by request and shape of the
// logits. The first argument is the number of rows, the second the most blocks a row.
//   build/cuda/bench/sampling_cuda_bench
// GB/s counts every logit once. One logit row is 0.4 MB: few rows stay in the L2 cache, as they do
// behind the matrix product that makes them.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/sampling/sampling.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kVocabulary = 103'424;
constexpr int64_t kStride = kVocabulary + 16;
constexpr int kMaxRows = 256;
constexpr int kLaunches = 20;  // between two events

template <typename T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) {
    auto memory = DeviceBuffer::Allocate(static_cast<int64_t>(values.size() * sizeof(T)));
    if (!memory.ok()) {
      std::fprintf(stderr, "%s\n", memory.status().ToString().c_str());
      std::exit(1);
    }
    memory_ = *std::move(memory);
    CUDA_CALL(cudaMemcpy, data(), values.data(), values.size() * sizeof(T), cudaMemcpyDefault);
  }
  T* data() const { return memory_.data<T>(); }

 private:
  DeviceBuffer memory_;
};

// Logits of a model that knows what it wants: few large ones above a wide bulk.
std::vector<float> PeakedLogits() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 2.5f);
  std::vector<float> logits(kMaxRows * kStride);
  for (float& logit : logits) logit = normal(random);
  for (int row = 0; row < kMaxRows; ++row) {
    for (int i = 0; i < 200; ++i) {
      logits[row * kStride + random() % kVocabulary] =
          22 - 4 * std::log2(1.0f + static_cast<float>(i));
    }
  }
  return logits;
}

// Logits of dummy weights.
std::vector<float> FlatLogits() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 0.5f);
  std::vector<float> logits(kMaxRows * kStride);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

struct Inputs {
  Array<float> peaked{PeakedLogits()};
  Array<float> flat{FlatLogits()};
  Array<float> equal{std::vector<float>(kMaxRows * kStride, 1.0f)};
  Array<int32_t> ids{std::vector<int32_t>(kMaxRows, 7)};
  Array<int32_t> last_ids{std::vector<int32_t>(kMaxRows)};
  Array<sampling::Occurrence> counts{std::vector<sampling::Occurrence>(kMaxRows * kStride)};
  Array<float> logprobs{std::vector<float>(kMaxRows)};
  Array<int32_t> top_ids{std::vector<int32_t>(kMaxRows * sampling::kMaxTopLogprobs)};
  Array<float> top_logprobs{std::vector<float>(kMaxRows * sampling::kMaxTopLogprobs)};
};

const Inputs& AllInputs() {
  static const Inputs* const inputs = new Inputs;  // never freed: the runtime may be gone at exit
  return *inputs;
}

plan::SamplingDevice DeviceOf(const benchmark::State& state) {
  plan::SamplingDevice device = PrepareSampling();
  device.max_blocks_per_row = std::min(device.max_blocks_per_row, static_cast<int>(state.range(1)));
  return device;
}

std::vector<SamplingRow> Rows(const SamplingRow& row) {
  std::vector<SamplingRow> rows(kMaxRows, row);
  for (int i = 0; i < kMaxRows; ++i) {
    rows[i].slot = i;
    rows[i].seed = i;
  }
  return rows;
}

template <typename Launch>
void Measure(benchmark::State& state, const Launch& launch) {
  auto begin = CreateEvent(EventTiming::kOn);
  auto end = CreateEvent(EventTiming::kOn);
  if (!begin.ok() || !end.ok()) {
    state.SkipWithError("no event");
    return;
  }
  launch();
  for (auto _ : state) {
    CUDA_CALL(cudaEventRecord, begin->get(), nullptr);
    for (int i = 0; i < kLaunches; ++i) launch();
    CUDA_CALL(cudaEventRecord, end->get(), nullptr);
    CUDA_CALL(cudaEventSynchronize, end->get());
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds, begin->get(), end->get());
    state.SetIterationTime(milliseconds * 1e-3 / kLaunches);
  }
  state.SetBytesProcessed(state.iterations() * state.range(0) * kVocabulary * sizeof(float));
}

void Sample(benchmark::State& state, float* (*logits)(const Inputs&), const SamplingRow& row) {
  const plan::SamplingDevice device = DeviceOf(state);
  const Inputs& inputs = AllInputs();
  const Array<SamplingRow> rows(Rows(row));
  const SamplingArgs args = {.logits = logits(inputs),
                             .logits_stride = kStride,
                             .num_rows = static_cast<int32_t>(state.range(0)),
                             .vocabulary = kVocabulary,
                             .rows = rows.data(),
                             .token_counts = inputs.counts.data(),
                             .token_counts_stride = kStride,
                             .ids = inputs.ids.data(),
                             .last_ids = inputs.last_ids.data()};
  Measure(state, [&] { LaunchSampling(args, device, /*stream=*/nullptr); });
}

void Logprobs(benchmark::State& state, float* (*logits)(const Inputs&), const SamplingRow& row) {
  const plan::SamplingDevice device = DeviceOf(state);
  const Inputs& inputs = AllInputs();
  const Array<SamplingRow> rows(Rows(row));
  const LogprobArgs args = {.logits = logits(inputs),
                            .logits_stride = kStride,
                            .num_rows = static_cast<int32_t>(state.range(0)),
                            .vocabulary = kVocabulary,
                            .rows = rows.data(),
                            .ids = inputs.ids.data(),
                            .logprobs = inputs.logprobs.data(),
                            .top_ids = inputs.top_ids.data(),
                            .top_logprobs = inputs.top_logprobs.data(),
                            .top_stride = sampling::kMaxTopLogprobs};
  Measure(state, [&] { LaunchLogprobs(args, device, /*stream=*/nullptr); });
}

float* Peaked(const Inputs& inputs) { return inputs.peaked.data(); }
float* Flat(const Inputs& inputs) { return inputs.flat.data(); }
float* Equal(const Inputs& inputs) { return inputs.equal.data(); }

#define SAMPLING_BENCHMARK(function, name, logits, ...)                     \
  BENCHMARK_CAPTURE(function, name, logits, SamplingRow{__VA_ARGS__})       \
      ->ArgsProduct({{1, 8, 64, 256}, {1, plan::kMaxSamplingBlocksPerRow}}) \
      ->ArgNames({"rows", "blocks"})                                        \
      ->UseManualTime()                                                     \
      ->Iterations(20)                                                      \
      ->Unit(benchmark::kMicrosecond)
SAMPLING_BENCHMARK(Sample, greedy, Peaked, .temperature = 0);
SAMPLING_BENCHMARK(Sample, all, Peaked, .temperature = 1);
SAMPLING_BENCHMARK(Sample, top_p_0_8, Peaked, .top_p = 0.8f);
SAMPLING_BENCHMARK(Sample, top_k_50, Peaked, .top_p = 0.95f, .top_k = 50);
SAMPLING_BENCHMARK(Sample, penalties, Peaked, .top_p = 0.8f, .penalties = {.frequency = 0.1f});
SAMPLING_BENCHMARK(Sample, top_p_0_8_flat, Flat, .top_p = 0.8f);
SAMPLING_BENCHMARK(Sample, top_p_0_8_equal, Equal, .top_p = 0.8f);
SAMPLING_BENCHMARK(Logprobs, top_20, Peaked, .num_top_logprobs = 20);

}  // namespace
}  // namespace wintserve::kernels::cuda

BENCHMARK_MAIN();
