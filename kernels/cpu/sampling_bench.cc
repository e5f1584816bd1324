// Time to sample one token, by vocabulary and path.
//   build/cpu/bench/sampling_bench
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "kernels/cpu/logprobs.h"
#include "kernels/cpu/sampling.h"

namespace wintserve::kernels::cpu {
namespace {

void Sample(benchmark::State& state, const SampleRequest& request) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(state.range(0));
  for (float& logit : logits) logit = normal(random);
  Sampler sampler;
  SampleRequest draw = request;
  for (auto _ : state) {
    ++draw.position;
    benchmark::DoNotOptimize(sampler.Sample(logits, draw));
  }
}

#define SAMPLING_BENCHMARK(name, ...) \
  BENCHMARK_CAPTURE(Sample, name, SampleRequest{__VA_ARGS__})->Arg(8192)->Arg(103424)
SAMPLING_BENCHMARK(greedy, .temperature = 0);
SAMPLING_BENCHMARK(all, .temperature = 1);
SAMPLING_BENCHMARK(top_p_0_8, .top_p = 0.8f);
SAMPLING_BENCHMARK(top_k_50, .top_p = 0.95f, .top_k = 50);
SAMPLING_BENCHMARK(min_p_0_05, .min_p = 0.05f);

// A sequence of 2,048 different tokens, each generated once.
void SampleWithPenalties(benchmark::State& state) {
  std::vector<TokenOccurrence> occurrences;
  for (int32_t i = 0; i < 2048; ++i) occurrences.push_back({.id = 4 * i, .occurrence = 1});
  Sample(state, {.top_p = 0.8f,
                 .penalties = {.repetition = 1.1f, .presence = 0.5f, .frequency = 0.1f},
                 .occurrences = occurrences});
}
BENCHMARK(SampleWithPenalties)->Arg(8192)->Arg(103424);

void ReadLogprobs(benchmark::State& state) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(state.range(0));
  for (float& logit : logits) logit = normal(random);
  LogprobReader reader;
  for (auto _ : state) benchmark::DoNotOptimize(reader.Read(logits, 5, /*num_top=*/20));
}
BENCHMARK(ReadLogprobs)->Arg(8192)->Arg(103424);

}  // namespace
}  // namespace wintserve::kernels::cpu

BENCHMARK_MAIN();
