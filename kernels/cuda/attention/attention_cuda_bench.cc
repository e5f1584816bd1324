// Attention on the GPU against a plain read of as many bytes in the same run.
//
// A case is a captured graph of launches on different layers, together larger than the second-level
// cache, replayed; the time is the median of the replays over their launches. required_GB/s counts
// every key and value that a query sees once, and q and out; share_of_read compares with a graph of
// plain reads of as many bytes a launch. TFLOP/s counts the products of queries with the keys that
// they see and of weights with values.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/bench_kernels.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"

namespace wintserve::kernels::cuda {
namespace {

using plan::KvCacheKind;

constexpr int64_t kRotatedBytes = int64_t{256} << 20;  // several times the second-level cache
constexpr int kMaxLayers = 512;
constexpr int kReplays = 15;

struct Case {
  KvCacheKind kind;
  int num_heads, num_kv_heads, head_dim;
  int batch;
  int32_t position, length;  // of every sequence
};

DeviceBuffer Allocate(int64_t size_bytes) {
  absl::StatusOr<DeviceBuffer> buffer = DeviceBuffer::Allocate(size_bytes);
  CHECK(buffer.ok(), "{}", buffer.status().ToString());
  return *std::move(buffer);
}

template <typename T>
DeviceBuffer ToDevice(const std::vector<T>& host) {
  DeviceBuffer buffer = Allocate(static_cast<int64_t>(host.size() * sizeof(T)));
  CUDA_CALL(cudaMemcpy, buffer.data(), host.data(), host.size() * sizeof(T),
            cudaMemcpyHostToDevice);
  return buffer;
}

// Median milliseconds of replays of what `launch` launches.
double MedianMilliseconds(cudaStream_t stream, const std::function<void()>& launch) {
  cudaGraph_t graph = nullptr;
  CUDA_CALL(cudaStreamBeginCapture, stream, cudaStreamCaptureModeGlobal);
  launch();
  CUDA_CALL(cudaStreamEndCapture, stream, &graph);
  cudaGraphExec_t executable = nullptr;
  CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
  const auto begin = CreateEvent(EventTiming::kOn);
  const auto end = CreateEvent(EventTiming::kOn);
  CHECK(begin.ok() && end.ok());
  std::vector<float> times;
  for (int i = 0; i < kReplays + 3; ++i) {
    CUDA_CALL(cudaEventRecord, begin->get(), stream);
    CUDA_CALL(cudaGraphLaunch, executable, stream);
    CUDA_CALL(cudaEventRecord, end->get(), stream);
    CUDA_CALL(cudaEventSynchronize, end->get());
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds, begin->get(), end->get());
    if (i >= 3) times.push_back(milliseconds);
  }
  CUDA_CALL(cudaGraphExecDestroy, executable);
  CUDA_CALL(cudaGraphDestroy, graph);
  std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
  return times[kReplays / 2];
}

void Attend(benchmark::State& state, const Case& c) {
  const int32_t context = c.position + c.length;
  const int blocks_per_sequence = (context + plan::kKvTileTokens - 1) / plan::kKvTileTokens;
  const int64_t num_blocks = int64_t{c.batch} * blocks_per_sequence;
  const int64_t layer_bytes = plan::KvLayerBytes(c.kind, c.num_kv_heads, c.head_dim);
  const auto num_layers = static_cast<int>(
      std::clamp<int64_t>(kRotatedBytes / (num_blocks * layer_bytes) + 1, 1, kMaxLayers));
  const int64_t block_bytes = num_layers * layer_bytes;

  const auto stream_or = CreateStream();
  CHECK(stream_or.ok());
  cudaStream_t stream = stream_or->get();
  const AttentionSetup setup = PrepareAttention(c.kind, c.head_dim);
  const DeviceBuffer pool = Allocate(num_blocks * block_bytes);
  LaunchFillTiles(c.kind, c.head_dim, pool.data<unsigned char>(),
                  pool.size_bytes() / plan::KvTileBytes(c.kind, c.head_dim), stream);
  const int32_t num_tokens = c.batch * c.length;
  const int64_t qkv_stride = (c.num_heads + 2 * c.num_kv_heads) * int64_t{c.head_dim} + 16;
  const int64_t out_stride = int64_t{c.num_heads} * c.head_dim + 16;
  const DeviceBuffer qkv = Allocate(num_tokens * qkv_stride * 4);
  const DeviceBuffer out = Allocate(num_tokens * out_stride * 4);
  LaunchFillFloats(qkv.data<float>(), num_tokens * qkv_stride, stream);

  std::vector<int32_t> tables(num_blocks);
  std::iota(tables.begin(), tables.end(), 0);
  std::shuffle(tables.begin(), tables.end(), std::mt19937(1));
  std::vector<int32_t> first(c.batch), token_sequence(num_tokens);
  for (int i = 0; i < c.batch; ++i) first[i] = i * c.length;
  for (int32_t t = 0; t < num_tokens; ++t) token_sequence[t] = t / c.length;
  const DeviceBuffer first_device = ToDevice(first);
  const DeviceBuffer position_device = ToDevice(std::vector<int32_t>(c.batch, c.position));
  const DeviceBuffer length_device = ToDevice(std::vector<int32_t>(c.batch, c.length));
  const DeviceBuffer token_sequence_device = ToDevice(token_sequence);
  const DeviceBuffer tables_device = ToDevice(tables);
  const DeviceBuffer partials = Allocate(kAttentionPartialsBytes);
  const int32_t num_arrivals = NumAttentionArrivals(kAttentionPartialsBytes, c.head_dim);
  const DeviceBuffer arrivals = ToDevice(std::vector<int32_t>(num_arrivals, 0));

  AttentionArgs args;
  args.sequences = {.num_sequences = c.batch,
                    .num_tokens = num_tokens,
                    .first_token = first_device.data<int32_t>(),
                    .position = position_device.data<int32_t>(),
                    .length = length_device.data<int32_t>(),
                    .token_sequence = token_sequence_device.data<int32_t>(),
                    .block_tables = tables_device.data<int32_t>(),
                    .block_table_stride = blocks_per_sequence};
  args.max_length = c.length;
  args.num_heads = c.num_heads;
  args.num_kv_heads = c.num_kv_heads;
  args.qkv = qkv.data<float>();
  args.qkv_stride = qkv_stride;
  args.out = out.data<float>();
  args.out_stride = out_stride;
  args.scratch = {partials.data<float>(), kAttentionPartialsBytes, arrivals.data<int32_t>(),
                  num_arrivals};

  const double key_bytes = static_cast<double>(plan::KvTileBytes(c.kind, c.head_dim)) /
                           plan::kKvTileTokens;  // of one head, scale included
  const double required_bytes = 2.0 * c.batch * context * c.num_kv_heads * key_bytes +
                                8.0 * num_tokens * c.num_heads * c.head_dim;
  const double keys_seen =
      c.batch * (static_cast<double>(c.position) * c.length + 0.5 * c.length * (c.length + 1.0));
  const double flop = 4.0 * keys_seen * c.num_heads * c.head_dim;

  CUDA_CALL(cudaStreamSynchronize, stream);
  for (auto _ : state) {
    const double attention_ms = MedianMilliseconds(stream, [&] {
      for (int layer = 0; layer < num_layers; ++layer) {
        args.kv = {pool.data<unsigned char>(), block_bytes, layer * layer_bytes};
        LaunchAttention(setup, args, stream);
      }
    });
    const auto read_bytes = static_cast<int64_t>(required_bytes) / 16 * 16;
    const double read_ms = MedianMilliseconds(stream, [&] {
      for (int layer = 0; layer < num_layers; ++layer) {
        const int64_t last = std::max<int64_t>(0, pool.size_bytes() - read_bytes);
        const int64_t offset = std::min(layer * read_bytes, last) / 16 * 16;
        LaunchRead(pool.data<unsigned char>() + offset, std::min(read_bytes, pool.size_bytes()),
                   arrivals.data<uint32_t>() + num_arrivals - 1, setup.num_multiprocessors, stream);
      }
    });
    const double seconds = 1e-3 * attention_ms / num_layers;
    state.SetIterationTime(seconds);
    state.counters["us"] = 1e6 * seconds;
    state.counters["required_GB/s"] = 1e-9 * required_bytes / seconds;
    state.counters["read_us"] = 1e3 * read_ms / num_layers;
    state.counters["share_of_read"] = read_ms / attention_ms;
    state.counters["TFLOP/s"] = 1e-12 * flop / seconds;
    state.counters["launches"] = num_layers;
  }
}

void Register(const std::string& name, const Case& c) {
  const std::string full =
      fmt::format("{}/{}/{}x{}x{}/batch:{}/context:{}/new:{}", name,
                  c.kind == KvCacheKind::kInt8 ? "int8" : "bfloat16", c.num_heads, c.num_kv_heads,
                  c.head_dim, c.batch, c.position + c.length, c.length);
  benchmark::RegisterBenchmark(full.c_str(), [c](benchmark::State& state) { Attend(state, c); })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

void RegisterAll() {
  struct Model {
    int num_heads, num_kv_heads;
  };
  for (const KvCacheKind kind : {KvCacheKind::kBfloat16, KvCacheKind::kInt8}) {
    for (const Model model : {Model{64, 8}, Model{20, 4}}) {
      for (const int batch : {1, 8, 64}) {
        for (const int32_t context : {128, 1024, 8192, 32768}) {
          Register("decode",
                   {kind, model.num_heads, model.num_kv_heads, 128, batch, context - 1, 1});
        }
      }
      for (const int32_t length : {2048, 8192}) {
        Register("prefill", {kind, model.num_heads, model.num_kv_heads, 128, 1, 0, length});
      }
      // A question behind a cached prefix.
      for (const int32_t length : {20, 128}) {
        Register("prefill", {kind, model.num_heads, model.num_kv_heads, 128, 1, 8064, length});
      }
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda

int main(int argc, char** argv) {
  wintserve::kernels::cuda::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 64;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
