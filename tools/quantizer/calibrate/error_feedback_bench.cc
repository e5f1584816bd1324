// Times of calibrated encoding, on one thread unless THREADS says otherwise.
#include <benchmark/benchmark.h>

#include <cstdlib>

#include "tools/quantizer/calibrate/calibration_test_util.h"
#include "tools/quantizer/calibrate/error_feedback.h"
#include "tools/quantizer/calibrate/target.h"

namespace wintserve::quantizer {
namespace {

int NumThreads() {
  const char* text = std::getenv("THREADS");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

// A hessian that costs little to make: correlation falls with the distance of the inputs.
Moments NearbyInputsCorrelate(int64_t k) {
  Moments moments = MakeMoments(k, false);
  moments.num_rows = k;
  moments.weight = static_cast<double>(k);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      moments.hessian[i * k + j] = std::exp(-static_cast<float>(std::abs(i - j)) / 20.0f);
    }
  }
  return moments;
}

void Factor(benchmark::State& state) {
  kernels::cpu::ThreadPool pool(NumThreads());
  const Moments moments = NearbyInputsCorrelate(state.range(0));
  for (auto _ : state) benchmark::DoNotOptimize(FeedbackFactor::Make(moments, {}, pool));
}
BENCHMARK(Factor)
    ->Arg(384)
    ->Arg(2048)
    ->Arg(4096)
    ->Arg(8192)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void Wint2(benchmark::State& state) {
  kernels::cpu::ThreadPool pool(NumThreads());
  std::mt19937 rng(1);
  const Moments moments = NearbyInputsCorrelate(state.range(0));
  const FloatArray w = GaussianMatrix(state.range(0), state.range(1), rng);
  const auto factor = FeedbackFactor::Make(moments, {}, pool);
  FeedbackOptions options = {.num_sweeps = static_cast<int>(state.range(2)), .least_gain = 0};
  FeedbackResult result;
  for (auto _ : state) result = *EncodeWint2WithFeedback(View(w), *factor, options, pool);
  state.counters["error"] = result.errors.back() / result.zero_error;
}
BENCHMARK(Wint2)
    ->ArgNames({"k", "n", "sweeps"})
    ->Args({384, 512, 0})
    ->Args({384, 512, 4})
    ->Args({256, 384, 4})
    ->Args({2048, 512, 0})
    ->Args({2048, 512, 4})
    ->Args({8192, 64, 0})
    ->Args({3584, 256, 4})
    ->Args({8192, 64, 4})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void PerChannel(benchmark::State& state, formats::WeightFormat format) {
  kernels::cpu::ThreadPool pool(NumThreads());
  std::mt19937 rng(1);
  const Moments moments = NearbyInputsCorrelate(state.range(0));
  const FloatArray w = GaussianMatrix(state.range(0), state.range(1), rng);
  const auto factor = FeedbackFactor::Make(moments, {.format = format}, pool);
  FeedbackResult result;
  for (auto _ : state) result = *EncodePerChannelWithFeedback(format, View(w), *factor, {}, pool);
  state.counters["error"] = result.errors.back() / result.zero_error;
}
BENCHMARK_CAPTURE(PerChannel, wint4, formats::WeightFormat::kWint4)
    ->Args({384, 512})
    ->Args({2048, 512})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();
BENCHMARK_CAPTURE(PerChannel, wint8, formats::WeightFormat::kWint8)
    ->Args({384, 512})
    ->Args({2048, 512})
    ->Args({8192, 256})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void Target(benchmark::State& state) {
  kernels::cpu::ThreadPool pool(NumThreads());
  std::mt19937 rng(1);
  Moments moments = NearbyInputsCorrelate(state.range(0));
  moments.cross = moments.hessian;
  const FloatArray w = GaussianMatrix(state.range(0), state.range(1), rng);
  for (auto _ : state) benchmark::DoNotOptimize(SolveTarget(View(w), moments, {}, pool));
}
BENCHMARK(Target)
    ->Args({384, 512})
    ->Args({2048, 512})
    ->Args({4096, 512})
    ->Args({8192, 64})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace wintserve::quantizer

BENCHMARK_MAIN();
