// Rotary embedding and the way into the cache on an emulated GPU, bit by bit.
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "kernels/cuda/attention/append_kv_kernel.cuh"
#include "kernels/cuda/attention/attention_test_util.h"
#include "kernels/cuda/emulation/emulated_device.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::KvCacheKind;

template <KvCacheKind kKind, int kHeadDim>
void RunAppend(const AppendKvParams& params) {
  const int64_t warps =
      int64_t{params.sequences.num_tokens} * (params.num_heads + 2 * params.num_kv_heads);
  Emulate({.num_blocks = static_cast<int>((warps + kAppendWarps - 1) / kAppendWarps),
           .threads_per_block = 32 * kAppendWarps},
          [&] { RopeAndAppendKvKernel<kKind, kHeadDim>(params); });
}

class EmulatedAppendKv : public testing::TestWithParam<TestShape> {};

TEST_P(EmulatedAppendKv, WritesEveryTokenToItsPlaceAndNothingElse) {
  const TestShape shape = GetParam();
  std::mt19937 rng(1);
  AttentionProblem problem(shape, {{0, 3}, {62, 4}, {0, 0}, {127, 1}, {200, 70}}, &rng);
  problem.FillNewKeysAndValues(&rng);
  const std::vector<float> cos_sin = problem.RandomCosSin(&rng);
  AlignedBytes pool(problem.pool().size());
  std::memcpy(pool.data(), problem.pool().data(), pool.size());
  AlignedBytes qkv(problem.qkv().size());
  std::memcpy(qkv.data(), problem.qkv().data(), qkv.size());

  AppendKvParams params;
  params.sequences = problem.arrays();
  params.kv = {pool.data(), problem.block_stride_bytes(), problem.layer_offset_bytes()};
  params.num_heads = shape.num_heads;
  params.num_kv_heads = shape.num_kv_heads;
  params.cos_sin = cos_sin.data();
  params.cos_sin_stride = shape.head_dim;
  params.qkv = reinterpret_cast<float*>(qkv.data());
  params.qkv_stride = problem.qkv_stride();
  const bool is_int8 = shape.kind == KvCacheKind::kInt8;
  if (shape.head_dim == 128) {
    is_int8 ? RunAppend<KvCacheKind::kInt8, 128>(params)
            : RunAppend<KvCacheKind::kBfloat16, 128>(params);
  } else {
    is_int8 ? RunAppend<KvCacheKind::kInt8, 64>(params)
            : RunAppend<KvCacheKind::kBfloat16, 64>(params);
  }
  problem.ExpectPool(problem.PoolWithNewTokens(cos_sin), pool);
  problem.ExpectQkv(problem.QkvWithRotatedQueries(cos_sin), qkv);
}

INSTANTIATE_TEST_SUITE_P(Shapes, EmulatedAppendKv,
                         testing::Values(TestShape{KvCacheKind::kBfloat16, 5, 1, 128},
                                         TestShape{KvCacheKind::kBfloat16, 4, 2, 64},
                                         TestShape{KvCacheKind::kInt8, 5, 1, 128},
                                         TestShape{KvCacheKind::kInt8, 4, 2, 64}),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace wintserve::kernels::cuda
