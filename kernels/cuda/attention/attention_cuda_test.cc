// Attention and the way into the cache on the GPU: against float64, against FastDeploy's rounding,
// and bit by bit between batches.
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/attention_test_util.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::KvCacheKind;

DeviceBuffer Allocate(int64_t size_bytes) {
  absl::StatusOr<DeviceBuffer> buffer = DeviceBuffer::Allocate(std::max<int64_t>(size_bytes, 16));
  CHECK(buffer.ok(), "{}", buffer.status().ToString());
  return *std::move(buffer);
}

DeviceBuffer ToDevice(const void* host, int64_t size_bytes) {
  DeviceBuffer buffer = Allocate(size_bytes);
  if (size_bytes > 0) {
    CUDA_CALL(cudaMemcpy, buffer.data(), host, static_cast<size_t>(size_bytes),
              cudaMemcpyHostToDevice);
  }
  return buffer;
}

AlignedBytes ToHost(const DeviceBuffer& buffer, int64_t size_bytes) {
  AlignedBytes host(size_bytes);
  CUDA_CALL(cudaMemcpy, host.data(), buffer.data(), static_cast<size_t>(size_bytes),
            cudaMemcpyDeviceToHost);
  return host;
}

Stream NewStream() {
  absl::StatusOr<Stream> stream = CreateStream();
  CHECK(stream.ok(), "{}", stream.status().ToString());
  return *std::move(stream);
}

// A problem in device memory.
class OnDevice {
 public:
  explicit OnDevice(const AttentionProblem& problem)
      : problem_(problem),
        host_(problem.arrays()),
        first_token_(ToDevice(host_.first_token, host_.num_sequences * 4)),
        position_(ToDevice(host_.position, host_.num_sequences * 4)),
        length_(ToDevice(host_.length, host_.num_sequences * 4)),
        token_sequence_(ToDevice(host_.token_sequence, host_.num_tokens * 4)),
        block_tables_(
            ToDevice(host_.block_tables, host_.num_sequences * host_.block_table_stride * 4)),
        pool_(ToDevice(problem.pool().data(), problem.pool().size())),
        qkv_(ToDevice(problem.qkv().data(), problem.qkv().size())) {
    const AlignedBytes out = problem.PoisonedOut();
    out_bytes_ = out.size();
    out_ = ToDevice(out.data(), out_bytes_);
  }

  SequenceArrays arrays() const {
    SequenceArrays arrays = host_;
    arrays.first_token = first_token_.data<int32_t>();
    arrays.position = position_.data<int32_t>();
    arrays.length = length_.data<int32_t>();
    arrays.token_sequence = token_sequence_.data<int32_t>();
    arrays.block_tables = block_tables_.data<int32_t>();
    return arrays;
  }
  DeviceKvLayer kv() const {
    return {pool_.data<unsigned char>(), problem_.block_stride_bytes(),
            problem_.layer_offset_bytes()};
  }
  AttentionArgs args(const AttentionScratch& scratch) const {
    return {.sequences = arrays(),
            .max_length = problem_.max_length(),
            .num_heads = problem_.shape().num_heads,
            .num_kv_heads = problem_.shape().num_kv_heads,
            .kv = kv(),
            .qkv = qkv_.data<float>(),
            .qkv_stride = problem_.qkv_stride(),
            .out = out_.data<float>(),
            .out_stride = problem_.out_stride(),
            .scratch = scratch};
  }
  // Puts another problem of the same sizes in place, as a step does before a graph is replayed.
  void Replace(const AttentionProblem& problem) {
    const SequenceArrays from = problem.arrays();
    const auto copy = [](const DeviceBuffer& to, const void* host, int64_t size_bytes) {
      CHECK(size_bytes <= to.size_bytes());
      CUDA_CALL(cudaMemcpy, to.data(), host, static_cast<size_t>(size_bytes),
                cudaMemcpyHostToDevice);
    };
    CHECK(from.num_sequences == host_.num_sequences && from.num_tokens == host_.num_tokens);
    copy(first_token_, from.first_token, from.num_sequences * 4);
    copy(position_, from.position, from.num_sequences * 4);
    copy(length_, from.length, from.num_sequences * 4);
    copy(token_sequence_, from.token_sequence, from.num_tokens * 4);
    CHECK(from.block_table_stride == host_.block_table_stride);
    copy(block_tables_, from.block_tables, from.num_sequences * from.block_table_stride * 4);
    copy(pool_, problem.pool().data(), problem.pool().size());
    copy(qkv_, problem.qkv().data(), problem.qkv().size());
    const AlignedBytes out = problem.PoisonedOut();
    copy(out_, out.data(), out.size());
  }

  AlignedBytes Out() const { return ToHost(out_, out_bytes_); }
  const DeviceBuffer& pool() const { return pool_; }
  const DeviceBuffer& qkv() const { return qkv_; }

 private:
  const AttentionProblem& problem_;
  const SequenceArrays host_;
  const DeviceBuffer first_token_, position_, length_, token_sequence_, block_tables_, pool_, qkv_;
  int64_t out_bytes_ = 0;
  DeviceBuffer out_;
};

// Memory for partials, full of NaNs.
class Scratch {
 public:
  Scratch(int64_t partials_bytes, int head_dim) {
    const AlignedBytes poison(partials_bytes);
    partials_ = ToDevice(poison.data(), partials_bytes);
    const int32_t num_arrivals = NumAttentionArrivals(partials_bytes, head_dim);
    const AlignedBytes zeros(int64_t{num_arrivals} * 4, 0);
    arrivals_ = ToDevice(zeros.data(), zeros.size());
    scratch_ = {partials_.data<float>(), partials_bytes, arrivals_.data<int32_t>(), num_arrivals};
  }
  const AttentionScratch& get() const { return scratch_; }
  void ExpectClean() const {
    const AlignedBytes arrivals = ToHost(arrivals_, int64_t{scratch_.num_arrivals} * 4);
    for (int64_t i = 0; i < arrivals.size(); ++i) {
      ASSERT_EQ(arrivals.data()[i], 0) << "arrivals are left behind at " << i / 4;
    }
  }

 private:
  DeviceBuffer partials_;
  DeviceBuffer arrivals_;
  AttentionScratch scratch_;
};

AlignedBytes RunWith(const AttentionProblem& problem, int64_t partials_bytes) {
  const AttentionSetup setup = PrepareAttention(problem.shape().kind, problem.shape().head_dim);
  const Scratch scratch(partials_bytes, problem.shape().head_dim);
  const OnDevice device(problem);
  const Stream stream = NewStream();
  LaunchAttention(setup, device.args(scratch.get()), stream.get());
  CUDA_CALL(cudaStreamSynchronize, stream.get());
  scratch.ExpectClean();
  return device.Out();
}

AlignedBytes RunAttention(const AttentionProblem& problem) {
  return RunWith(problem, kAttentionPartialsBytes);
}

// --- Against float64 ---

class CudaAttention : public testing::TestWithParam<TestShape> {};

TEST_P(CudaAttention, DecodesOfEveryContextStayWithinTheirBounds) {
  std::mt19937 rng(std::random_device{}());
  std::vector<TestSequence> sequences;
  for (int32_t position = 0; position < 130; ++position) sequences.push_back({position, 1});
  ExpectExact(RunAttention, AttentionProblem(GetParam(), sequences, &rng), 1);
}

std::vector<TestShape> AllGroups() {
  std::vector<TestShape> shapes;
  for (const int head_dim : {64, 128}) {
    for (int group = 1; group <= 16; ++group) {
      shapes.push_back({KvCacheKind::kBfloat16, group, 1, head_dim});
    }
    for (const int group : {1, 2, 5, 8, 16}) {
      shapes.push_back({KvCacheKind::kInt8, group * 2, 2, head_dim});
    }
    // More heads than one warp has rows.
    shapes.push_back({KvCacheKind::kBfloat16, 20, 1, head_dim});
  }
  return shapes;
}
INSTANTIATE_TEST_SUITE_P(Groups, CudaAttention, testing::ValuesIn(AllGroups()),
                         [](const auto& info) { return TestName(info.param); });

class CudaAttentionOfModels : public testing::TestWithParam<TestShape> {};

TEST_P(CudaAttentionOfModels, LongContextsStayWithinTheirBounds) {
  std::mt19937 rng(std::random_device{}());
  for (const int32_t context : {1023, 1024, 1025, 2049, 8192, 8256}) {
    ExpectExact(RunAttention,
                AttentionProblem(GetParam(), {{context - 1, 1}, {context / 2, 1}}, &rng), 1);
  }
}

TEST_P(CudaAttentionOfModels, ChunksAndDecodesTogetherStayWithinTheirBounds) {
  std::mt19937 rng(std::random_device{}());
  std::vector<TestSequence> sequences = {{0, 37},   {129, 1},  {0, 0},   {60, 9},   {127, 3},
                                         {1000, 1}, {600, 40}, {63, 2},  {0, 1},    {0, 64},
                                         {64, 64},  {63, 65},  {700, 1}, {1300, 17}};
  ExpectExact(RunAttention, AttentionProblem(GetParam(), sequences, &rng), 5);
  // Enough rows for the largest blocks.
  sequences.push_back({100, 600});
  ExpectExact(RunAttention, AttentionProblem(GetParam(), sequences, &rng), 41);
}

TEST_P(CudaAttentionOfModels, ManySequencesStayWithinTheirBounds) {
  std::mt19937 rng(std::random_device{}());
  std::vector<TestSequence> sequences(200);
  for (TestSequence& s : sequences) {
    s = {static_cast<int32_t>(rng() % 400), static_cast<int32_t>(rng() % 8 == 0 ? rng() % 40 : 1)};
  }
  ExpectExact(RunAttention, AttentionProblem(GetParam(), sequences, &rng), 11);
}

// --- Bit by bit ---

TEST_P(CudaAttentionOfModels, ARowHasTheSameBitsInAnyBatch) {
  std::mt19937 rng(std::random_device{}());
  const std::vector<TestSequence> sequences = {{1000, 300}, {20, 1}, {2600, 1}, {135, 30}, {0, 90}};
  const AttentionProblem problem(GetParam(), sequences, &rng);
  const AlignedBytes expected = RunAttention(problem);
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (const int32_t length : {1, 2, 3, 17, 64, 299}) {
      for (const int32_t first : {0, 1, 23, 24, 29, 60, 255, 299}) {
        if (first + length > sequences[s].length) continue;
        const AttentionProblem part = problem.Part(static_cast<int>(s), first, length);
        ExpectSameBits(problem, expected, static_cast<int>(s), first, part, RunAttention(part));
      }
    }
  }
}

// So many that a block takes several segments at a time, and so long that they are cut all the
// same.
TEST_P(CudaAttentionOfModels, ManyLongSequencesHaveTheBitsOfEachAlone) {
  std::mt19937 rng(std::random_device{}());
  std::vector<TestSequence> sequences(200 / GetParam().num_kv_heads);
  for (TestSequence& s : sequences) s = {static_cast<int32_t>(1000 + rng() % 600), 1};
  const AttentionProblem problem(GetParam(), sequences, &rng);
  const AlignedBytes expected = RunAttention(problem);
  for (const size_t s : {size_t{0}, sequences.size() / 2, sequences.size() - 1}) {
    const AttentionProblem part = problem.Part(static_cast<int>(s), 0, 1);
    ExpectSameBits(problem, expected, static_cast<int>(s), 0, part, RunAttention(part));
  }
}

TEST_P(CudaAttentionOfModels, TheMemoryForPartialsChangesNoBits) {
  std::mt19937 rng(std::random_device{}());
  const std::vector<TestSequence> sequences = {{1000, 1}, {3000, 20}, {5000, 1}, {900, 2}};
  const AttentionProblem problem(GetParam(), sequences, &rng);
  const AlignedBytes expected = RunAttention(problem);
  for (const int64_t partials_bytes : {int64_t{0}, int64_t{1} << 19, int64_t{1} << 22}) {
    const AlignedBytes out = RunWith(problem, partials_bytes);
    for (size_t s = 0; s < sequences.size(); ++s) {
      ExpectSameRows(problem, expected, out, static_cast<int>(s),
                     fmt::format("there are {} bytes for partials", partials_bytes));
    }
  }
}

TEST_P(CudaAttentionOfModels, RunsGiveTheSameBits) {
  std::mt19937 rng(std::random_device{}());
  const AttentionProblem problem(GetParam(), {{4000, 1}, {900, 150}, {8000, 1}, {700, 9}}, &rng);
  const AlignedBytes expected = RunAttention(problem);
  for (int run = 0; run < 20; ++run) {
    const AlignedBytes out = RunAttention(problem);
    ASSERT_EQ(std::memcmp(expected.data(), out.data(), out.size()), 0) << "run " << run;
  }
}

TEST_P(CudaAttentionOfModels, AReplayedGraphReadsTheSequencesAnew) {
  std::mt19937 rng(std::random_device{}());
  const std::vector<TestSequence> first = {{700, 1}, {64, 20}, {1999, 1}};
  const std::vector<TestSequence> second = {{1980, 20}, {0, 1}, {130, 1}};
  const AttentionProblem captured(GetParam(), first, &rng);
  const AttentionProblem replayed(GetParam(), second, &rng);
  ASSERT_EQ(captured.arrays().block_table_stride, replayed.arrays().block_table_stride);

  const AttentionSetup setup = PrepareAttention(GetParam().kind, GetParam().head_dim);
  const Scratch scratch(kAttentionPartialsBytes, GetParam().head_dim);
  // Room for the blocks of either.
  const bool first_is_larger = captured.pool().size() >= replayed.pool().size();
  OnDevice device(first_is_larger ? captured : replayed);
  const Stream stream = NewStream();
  CUDA_CALL(cudaStreamBeginCapture, stream.get(), cudaStreamCaptureModeGlobal);
  LaunchAttention(setup, device.args(scratch.get()), stream.get());
  cudaGraph_t graph = nullptr;
  CUDA_CALL(cudaStreamEndCapture, stream.get(), &graph);
  cudaGraphExec_t executable = nullptr;
  CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
  for (const AttentionProblem* problem : {&captured, &replayed, &captured}) {
    device.Replace(*problem);
    CUDA_CALL(cudaGraphLaunch, executable, stream.get());
    CUDA_CALL(cudaStreamSynchronize, stream.get());
    SquaredErrors errors;
    CheckOut(*problem, device.Out(), 7, &errors);
    ExpectNoWorseThanFastDeploy(errors);
  }
  CUDA_CALL(cudaGraphExecDestroy, executable);
  CUDA_CALL(cudaGraphDestroy, graph);
}

// --- The way into the cache ---

TEST_P(CudaAttentionOfModels, NewTokensReachTheirPlacesAndNothingElseChanges) {
  std::mt19937 rng(std::random_device{}());
  const TestShape shape = GetParam();
  AttentionProblem problem(shape, {{0, 3}, {62, 4}, {0, 0}, {127, 1}, {200, 70}, {1000, 300}},
                           &rng);
  problem.FillNewKeysAndValues(&rng);
  const std::vector<float> cos_sin = problem.RandomCosSin(&rng);
  const OnDevice device(problem);
  const DeviceBuffer angles =
      ToDevice(cos_sin.data(), static_cast<int64_t>(cos_sin.size() * sizeof(float)));
  const Stream stream = NewStream();
  LaunchRopeAndAppendKv({.kind = shape.kind,
                         .sequences = device.arrays(),
                         .num_heads = shape.num_heads,
                         .num_kv_heads = shape.num_kv_heads,
                         .head_dim = shape.head_dim,
                         .kv = device.kv(),
                         .cos_sin = angles.data<float>(),
                         .cos_sin_stride = shape.head_dim,
                         .qkv = device.qkv().data<float>(),
                         .qkv_stride = problem.qkv_stride()},
                        stream.get());
  CUDA_CALL(cudaStreamSynchronize, stream.get());
  problem.ExpectPool(problem.PoolWithNewTokens(cos_sin),
                     ToHost(device.pool(), problem.pool().size()));
  problem.ExpectQkv(problem.QkvWithRotatedQueries(cos_sin),
                    ToHost(device.qkv(), problem.qkv().size()));
}

INSTANTIATE_TEST_SUITE_P(Models, CudaAttentionOfModels,
                         testing::Values(TestShape{KvCacheKind::kBfloat16, 16, 2, 128},  // 300B
                                         TestShape{KvCacheKind::kInt8, 16, 2, 128},
                                         TestShape{KvCacheKind::kBfloat16, 10, 2, 128},  // 21B
                                         TestShape{KvCacheKind::kInt8, 10, 2, 128},
                                         TestShape{KvCacheKind::kBfloat16, 8, 4, 64},  // poet
                                         TestShape{KvCacheKind::kInt8, 8, 4, 64}),
                         [](const auto& info) { return TestName(info.param); });

TEST(CudaAttentionOfBlocksOfEverySize, GivesTheSameBits) {
  std::mt19937 rng(std::random_device{}());
  for (const KvCacheKind kind : {KvCacheKind::kBfloat16, KvCacheKind::kInt8}) {
    // 64 heads: 600 tokens take the largest blocks, 70 the middle ones, 2 the smallest.
    const TestShape shape = {kind, 64, 8, 128};
    const AttentionProblem problem(shape, {{200, 600}}, &rng);
    const AlignedBytes expected = RunAttention(problem);
    SquaredErrors errors;
    CheckOut(problem, expected, 149, &errors);
    ExpectNoWorseThanFastDeploy(errors);
    for (const int32_t length : {1, 2, 3, 70, 599}) {
      const int32_t first = 600 - length;
      const AttentionProblem part = problem.Part(0, first, length);
      ExpectSameBits(problem, expected, 0, first, part, RunAttention(part));
    }
  }
}

TEST(CudaAttentionOfNothing, LaunchesNothing) {
  const AttentionSetup setup = PrepareAttention(KvCacheKind::kBfloat16, 128);
  const Stream stream = NewStream();
  LaunchAttention(setup, {.num_heads = 8, .num_kv_heads = 1}, stream.get());
  LaunchRopeAndAppendKv({.num_heads = 8, .num_kv_heads = 1, .head_dim = 128}, stream.get());
  EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
}

}  // namespace
}  // namespace wintserve::kernels::cuda
