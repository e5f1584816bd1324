// Attention, every index, barrier and fragment of its kernel, on an emulated GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/cuda/attention/attention_kernel.cuh"
#include "kernels/cuda/attention/attention_test_util.h"
#include "kernels/cuda/emulation/emulated_device.h"

namespace wintserve::kernels::cuda {
namespace {

struct EmulationOptions {
  int num_blocks = 3;
  int32_t max_partials = 256;
  int tile_warps = 4;
  bool all_in_tiles = false;  // decodes, too
  int32_t item_segments = 1;
  uint32_t seed = 1;
  CopyTiming copy_timing = CopyTiming::kLate;
};

template <KvCacheKind kKind, int kHeadDim, int kWarps>
void RunKernel(const AttentionParams& params, const EmulationOptions& options) {
  using Config = AttentionConfig<kKind, kHeadDim, kWarps>;
  Emulate({.num_blocks = options.num_blocks,
           .threads_per_block = Config::kThreads,
           .shared_bytes = Config::kSharedBytes,
           .seed = options.seed,
           .copy_timing = options.copy_timing},
          [&] { AttentionKernel<kKind, kHeadDim, kWarps>(params); });
}

template <KvCacheKind kKind, int kHeadDim>
void RunKernelOfSize(int num_warps, const AttentionParams& params,
                     const EmulationOptions& options) {
  if (num_warps == 1) RunKernel<kKind, kHeadDim, 1>(params, options);
  if (num_warps == 4) RunKernel<kKind, kHeadDim, 4>(params, options);
  if (num_warps == 8) RunKernel<kKind, kHeadDim, 8>(params, options);
}

AlignedBytes RunAttention(const AttentionProblem& problem, const EmulationOptions& options) {
  const TestShape& shape = problem.shape();
  AlignedBytes out = problem.PoisonedOut();
  plan::AttentionLaunches planned = plan::PlanAttention(
      static_cast<int32_t>(problem.sequences().size()), problem.num_tokens(), problem.max_length(),
      shape.num_heads, shape.num_kv_heads, /*num_multiprocessors=*/132, /*decode_slots=*/528);
  planned.launches[0].work.item_segments = options.item_segments;
  if (planned.count > 1) {
    planned.launches[1].num_warps = options.tile_warps;
    planned.launches[1].work.tile_rows = 16 * options.tile_warps;
  }
  if (options.all_in_tiles) {
    planned.launches[0].num_warps = options.tile_warps;
    planned.launches[0].work.tile_rows = 16 * options.tile_warps;
  }
  for (int i = 0; i < planned.count; ++i) {
    const auto& [num_warps, work] = planned.launches[i];
    AlignedBytes partials(int64_t{options.max_partials} * PartialFloats(shape.head_dim, num_warps) *
                          4);
    AlignedBytes arrivals(options.max_partials * 4, 0);
    AttentionParams params;
    params.sequences = problem.arrays();
    params.kv = {problem.pool().data(), problem.block_stride_bytes(), problem.layer_offset_bytes()};
    params.qkv = reinterpret_cast<const float*>(problem.qkv().data());
    params.qkv_stride = problem.qkv_stride();
    params.out = reinterpret_cast<float*>(out.data());
    params.out_stride = problem.out_stride();
    params.query_scale = plan::QueryScale(shape.head_dim);
    params.work = work;
    params.work.max_partials = options.max_partials;
    params.partials = reinterpret_cast<float*>(partials.data());
    params.arrivals = reinterpret_cast<int32_t*>(arrivals.data());
    const bool is_int8 = shape.kind == KvCacheKind::kInt8;
    if (shape.head_dim == 128) {
      if (is_int8) RunKernelOfSize<KvCacheKind::kInt8, 128>(num_warps, params, options);
      if (!is_int8) RunKernelOfSize<KvCacheKind::kBfloat16, 128>(num_warps, params, options);
    } else {
      if (is_int8) RunKernelOfSize<KvCacheKind::kInt8, 64>(num_warps, params, options);
      if (!is_int8) RunKernelOfSize<KvCacheKind::kBfloat16, 64>(num_warps, params, options);
    }
    for (int64_t a = 0; a < arrivals.size(); ++a) {
      EXPECT_EQ(arrivals.data()[a], 0) << "arrivals are left behind";
    }
  }
  return out;
}

AttentionRunner With(const EmulationOptions& options) {
  return [options](const AttentionProblem& problem) { return RunAttention(problem, options); };
}

class EmulatedAttention : public testing::TestWithParam<TestShape> {};

TEST_P(EmulatedAttention, DecodesOfEveryContextStayWithinTheirBounds) {
  std::mt19937 rng(1);
  std::vector<TestSequence> sequences;
  for (int32_t position = 0; position < 130; ++position) sequences.push_back({position, 1});
  ExpectExact(With({}), AttentionProblem(GetParam(), sequences, &rng), 1);
}

TEST_P(EmulatedAttention, ChunksAndDecodesTogetherStayWithinTheirBounds) {
  std::mt19937 rng(2);
  const std::vector<TestSequence> sequences = {{0, 37},  {129, 1}, {0, 0},   {60, 9},
                                               {127, 3}, {300, 1}, {200, 40}};
  const AttentionProblem problem(GetParam(), sequences, &rng);
  for (const int tile_warps : {4, 8}) ExpectExact(With({.tile_warps = tile_warps}), problem, 1);
}

TEST_P(EmulatedAttention, TheOrderOfThreadsBlocksAndCopiesChangesNothing) {
  std::mt19937 rng(3);
  const AttentionProblem problem(GetParam(), {{140, 20}, {260, 1}, {64, 1}}, &rng);
  const AlignedBytes expected = RunAttention(problem, {});
  for (uint32_t seed = 2; seed < 6; ++seed) {
    const EmulationOptions options = {
        .num_blocks = static_cast<int>(seed),
        .seed = seed,
        .copy_timing = seed % 2 == 0 ? CopyTiming::kEarly : CopyTiming::kLate};
    const AlignedBytes out = RunAttention(problem, options);
    for (int sequence = 0; sequence < 3; ++sequence) {
      ExpectSameRows(problem, expected, out, sequence, fmt::format("seed {}", seed));
    }
  }
}

// Alone, in a chunk, in either size of block, cut at its segments or whole.
TEST_P(EmulatedAttention, ARowHasTheSameBitsInAnyBatch) {
  std::mt19937 rng(4);
  const AttentionProblem problem(GetParam(), {{100, 70}, {20, 1}, {135, 1}}, &rng);
  const AlignedBytes expected = RunAttention(problem, {});
  for (const int tile_warps : {4, 8}) {
    for (const int32_t max_partials : {0, 16, 256}) {
      const AlignedBytes out = RunAttention(
          problem, {.max_partials = max_partials, .tile_warps = tile_warps, .all_in_tiles = true});
      for (int sequence = 0; sequence < 3; ++sequence) {
        ExpectSameRows(problem, expected, out, sequence,
                       fmt::format("{} warps, {} partials", tile_warps, max_partials));
      }
    }
  }
  for (const int32_t first : {0, 27, 28, 69}) {
    for (const int32_t length : {1, 5, 41}) {
      if (first + length > 70) continue;
      const AttentionProblem part = problem.Part(0, first, length);
      ExpectSameBits(problem, expected, 0, first, part, RunAttention(part, {}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EmulatedAttention,
                         testing::Values(TestShape{KvCacheKind::kBfloat16, 8, 1, 128},
                                         TestShape{KvCacheKind::kBfloat16, 10, 2, 128},
                                         TestShape{KvCacheKind::kBfloat16, 2, 2, 64},
                                         TestShape{KvCacheKind::kBfloat16, 16, 1, 64},
                                         TestShape{KvCacheKind::kInt8, 8, 1, 128},
                                         TestShape{KvCacheKind::kInt8, 6, 2, 64}),
                         [](const auto& info) { return TestName(info.param); });

TEST(EmulatedAttentionOfLongSequences, MergesSegmentsOfEveryLength) {
  std::mt19937 rng(5);
  const TestShape shape = {KvCacheKind::kBfloat16, 2, 1, 64};
  // Beyond 8192 keys segments have their largest length.
  const AttentionProblem problem(shape, {{2046, 4}, {4095, 1}, {8255, 1}, {4200, 20}}, &rng);
  ExpectExact(With({.max_partials = 512}), problem, 3);
  const AlignedBytes split = RunAttention(problem, {.max_partials = 512});
  const AlignedBytes whole = RunAttention(problem, {.max_partials = 0});
  const AlignedBytes some = RunAttention(problem, {.max_partials = 512, .item_segments = 8});
  for (int sequence = 0; sequence < 4; ++sequence) {
    ExpectSameRows(problem, split, whole, sequence, "not cut");
    ExpectSameRows(problem, some, whole, sequence, "cut into several segments each");
  }
}

TEST(EmulatedAttentionOfManySequences, FindsTheWorkOfMoreThanAWarpsLanes) {
  std::mt19937 rng(6);
  const TestShape shape = {KvCacheKind::kBfloat16, 1, 1, 64};
  std::vector<TestSequence> sequences;
  for (int i = 0; i < 100; ++i) {
    sequences.push_back({static_cast<int32_t>(rng() % 150), static_cast<int32_t>(rng() % 3)});
  }
  sequences[70].length = 30;
  ExpectExact(With({.num_blocks = 7, .max_partials = 20}), AttentionProblem(shape, sequences, &rng),
              1);
}

}  // namespace
}  // namespace wintserve::kernels::cuda
