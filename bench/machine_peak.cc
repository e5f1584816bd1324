#include "bench/machine_peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/machine_peak.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "hwy/aligned_allocator.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

// Returns the number of multiply-adds done; *result keeps them from being optimised away.
int64_t MultiplyAddLoop(int64_t rounds, float* result) {
  constexpr int kChains = 12;
  const D d;
  V sum[kChains];
  WINTSERVE_UNROLL
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  V x = hn::Set(d, 0.5f);
  for (int64_t round = 0; round < rounds; ++round) {
    WINTSERVE_UNROLL
    for (int i = 0; i < kChains; ++i) sum[i] = hn::MulAdd(sum[i], x, x);
  }
  V total = hn::Zero(d);
  WINTSERVE_UNROLL
  for (int i = 0; i < kChains; ++i) total = hn::Add(total, sum[i]);
  *result = hn::GetLane(hn::SumOfLanes(d, total));
  return rounds * kChains * kLanes;
}

float SumLoop(const float* data, int64_t count) {
  constexpr int kChains = 8;
  const D d;
  V sum[kChains];
  WINTSERVE_UNROLL
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Zero(d);
  for (int64_t c = 0; c + kChains * kLanes <= count; c += kChains * kLanes) {
    WINTSERVE_UNROLL
    for (int i = 0; i < kChains; ++i) {
      sum[i] = hn::Add(sum[i], hn::LoadU(d, data + c + i * kLanes));
    }
  }
  V total = hn::Zero(d);
  WINTSERVE_UNROLL
  for (int i = 0; i < kChains; ++i) total = hn::Add(total, sum[i]);
  return hn::GetLane(hn::SumOfLanes(d, total));
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::kernels::cpu {
HWY_EXPORT(MultiplyAddLoop);
HWY_EXPORT(SumLoop);
}  // namespace wintserve::kernels::cpu

namespace wintserve::bench {
namespace {

// The best of many short runs: other processes only ever make one slower.
template <typename Fn>
double BestSeconds(int runs, const Fn& fn) {
  double best = 1e30;
  for (int i = 0; i < runs; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    fn();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, took.count());
  }
  return best;
}

volatile float sink;

}  // namespace

double MeasurePeakGflops() {
  using namespace kernels::cpu;  // HWY_EXPORT's tables
  int64_t multiply_adds = 0;
  const double seconds = BestSeconds(50, [&] {
    float result = 0;
    multiply_adds = HWY_DYNAMIC_DISPATCH(MultiplyAddLoop)(200'000, &result);
    sink = result;
  });
  return 2e-9 * static_cast<double>(multiply_adds) / seconds;
}

double MeasureReadGigabytesPerSecond() {
  using namespace kernels::cpu;
  constexpr int64_t kCount = int64_t{64} << 20;
  const auto data = hwy::AllocateAligned<float>(kCount);
  std::fill_n(data.get(), kCount, 1.0f);
  const double seconds =
      BestSeconds(10, [&] { sink = HWY_DYNAMIC_DISPATCH(SumLoop)(data.get(), kCount); });
  return 1e-9 * static_cast<double>(kCount) * sizeof(float) / seconds;
}

}  // namespace wintserve::bench
#endif
