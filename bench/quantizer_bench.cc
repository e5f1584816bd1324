// Encoding float32 weights without calibration: weights a second, and the share of the measured
// multiply-add peak that the search of codewords reaches.
//
// Times are the best of several runs, because a shared machine only ever makes one slower;
// weights/core_s goes by the processor time of all threads and all runs. The work of WINT2 is what
// the search cannot do without: for four weights, each of 256 codewords and each code map, four
// multiply-adds for the product with the weights and one for each scale tried. What refits add is
// not counted.
//   build/cpu/bench/quantizer_bench
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "bench/machine_peak.h"
#include "bench/provenance.h"
#include "common/check.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::bench {
namespace {

using formats::WeightFormat;
using quantizer::FloatMatrix;

double peak_gflops = 0;

std::vector<float> NormalWeights(int64_t k, int64_t n) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> weights(k * n);
  for (float& weight : weights) weight = normal(rng);
  return weights;
}

double ThreadsCpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double MultiplyAddsOfWeight(const quantizer::Wint2Options& options) {
  const double scales = 2.0 * options.local_scale_radius + 1;
  return quantizer::kNumBytes * static_cast<double>(options.maps.size()) *
         (1 + scales / quantizer::kWeightsOfByte);
}

// Arguments: threads, rows, columns.
template <typename Fn>
void Measure(benchmark::State& state, double multiply_adds_of_weight, const Fn& encode) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t k = state.range(1);
  const int64_t n = state.range(2);
  const std::vector<float> weights = NormalWeights(k, n);
  kernels::cpu::ThreadPool pool(threads);
  double best_seconds = 1e30;
  const double cpu_begin = ThreadsCpuSeconds();
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    const auto matrix = encode(FloatMatrix{weights.data(), k, n}, pool);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    CHECK(matrix.ok(), "{}", matrix.status().ToString());
    best_seconds = std::min(best_seconds, took.count());
  }
  const double cpu_seconds = ThreadsCpuSeconds() - cpu_begin;
  const double weights_per_second = static_cast<double>(k * n) / best_seconds;
  state.counters["best_ms"] = best_seconds * 1e3;
  state.counters["weights/s"] = weights_per_second;
  state.counters["weights/core_s"] = static_cast<double>(k * n * state.iterations()) / cpu_seconds;
  if (multiply_adds_of_weight > 0) {
    state.counters["share_of_peak"] =
        2e-9 * multiply_adds_of_weight * weights_per_second / (peak_gflops * threads);
  }
}

void BM_Wint2(benchmark::State& state, quantizer::Wint2Options options, bool has_importance) {
  const std::vector<float> importance(has_importance ? state.range(1) : 0, 0.5f);
  Measure(state, MultiplyAddsOfWeight(options), [&](FloatMatrix w, kernels::cpu::ThreadPool& pool) {
    return quantizer::EncodeWint2(w, importance, options, pool);
  });
}

void BM_PerChannel(benchmark::State& state, WeightFormat format) {
  Measure(state, 0, [format](FloatMatrix w, kernels::cpu::ThreadPool& pool) {
    return quantizer::EncodePerChannel(format, w, pool);
  });
}

void ForShapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "k", "n"})->Unit(benchmark::kMillisecond)->UseRealTime()->Iterations(5);
  const int num_cores = static_cast<int>(std::max(2u, std::thread::hardware_concurrency()));
  for (int threads = 1; threads <= num_cores; threads *= 2) {
    b->Args({threads, 1024, 512});
    b->Args({threads, 3584, 2048});  // a quarter of the 300B model's down_proj
  }
}

const quantizer::Wint2Options kDefault;
const quantizer::Wint2Options kOneMap = {.maps = quantizer::DefaultCodeMaps().first(1),
                                         .num_refits = 0};
const quantizer::Wint2Options kFourMaps = {.maps = quantizer::DefaultCodeMaps().first(4)};
BENCHMARK_CAPTURE(BM_Wint2, one_map_no_refit, kOneMap, false)->Apply(ForShapes);
BENCHMARK_CAPTURE(BM_Wint2, four_maps, kFourMaps, false)->Apply(ForShapes);
BENCHMARK_CAPTURE(BM_Wint2, default, kDefault, false)->Apply(ForShapes);
BENCHMARK_CAPTURE(BM_Wint2, default_importance, kDefault, true)->Apply(ForShapes);
BENCHMARK_CAPTURE(BM_PerChannel, wint4, WeightFormat::kWint4)->Apply(ForShapes);
BENCHMARK_CAPTURE(BM_PerChannel, wint8, WeightFormat::kWint8)->Apply(ForShapes);

}  // namespace
}  // namespace wintserve::bench

int main(int argc, char** argv) {
  using namespace wintserve::bench;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  peak_gflops = MeasurePeakGflops();
  benchmark::AddCustomContext("device", DeviceDescription());
  benchmark::AddCustomContext("peak_gflops_per_core", std::to_string(peak_gflops));
  benchmark::RunSpecifiedBenchmarks();
}
