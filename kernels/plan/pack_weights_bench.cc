// Packing the weights of an expert with the shapes of the 300B model for CUDA; bytes are packed
// ones.
//   build/cpu/bench/pack_weights_bench
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/code_line.h"
#include "kernels/plan/pack_weights.h"
#include "kernels/plan/random_weights_test_util.h"

namespace wintserve::kernels::plan {
namespace {

using formats::HostMatrix;
using formats::KOrder;
using formats::WeightFormat;

constexpr int64_t kHidden = 8192;
constexpr int64_t kExpertWidth = 3584;

void Pack(benchmark::State& state, WeightFormat format, bool gate_up) {
  std::mt19937 rng(1);
  const HostMatrix matrix =
      gate_up ? RandomWeights(format, kHidden, 2 * kExpertWidth, KOrder::kMma64, &rng)
              : RandomWeights(format, kExpertWidth, kHidden, KOrder::kMma64, &rng);
  const auto layout = LayOutWeights(matrix, gate_up);
  CHECK(layout.ok(), "{}", layout.status().ToString());
  std::vector<uint8_t> bytes(layout->size_bytes());
  cpu::ThreadPool pool(static_cast<int>(state.range(0)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(PackWeights(matrix, *layout, bytes.data(), &pool));
  }
  state.SetBytesProcessed(state.iterations() * layout->size_bytes());
}

#define PACK_BENCHMARK(format)                                             \
  BENCHMARK_CAPTURE(Pack, format##_gate_up, WeightFormat::k##format, true) \
      ->ArgName("threads")                                                 \
      ->Arg(1)                                                             \
      ->Arg(2)                                                             \
      ->UseRealTime()                                                      \
      ->Unit(benchmark::kMillisecond);                                     \
  BENCHMARK_CAPTURE(Pack, format##_down, WeightFormat::k##format, false)   \
      ->ArgName("threads")                                                 \
      ->Arg(1)                                                             \
      ->Arg(2)                                                             \
      ->UseRealTime()                                                      \
      ->Unit(benchmark::kMillisecond)
PACK_BENCHMARK(Wint2);
PACK_BENCHMARK(Wint4);
PACK_BENCHMARK(Wint8);
PACK_BENCHMARK(Bfloat16);

void FindLine(benchmark::State& state) {
  std::mt19937 rng(1);
  const HostMatrix matrix = RandomWeights(WeightFormat::kWint2, 64, 8192, KOrder::kMma64, &rng);
  int64_t column = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(FindCodeLine(matrix.code_scale[column], matrix.code_zp[column]));
    column = (column + 1) % matrix.n;
  }
}
BENCHMARK(FindLine);

}  // namespace
}  // namespace wintserve::kernels::plan

BENCHMARK_MAIN();
