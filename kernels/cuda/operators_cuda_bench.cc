// Times of the operators that are neither products nor attention (which have benchmarks of their
// own) at the published models' shapes, through the backend, each against a plain read of as many
// bytes in the same run.
//   build/cuda/bench/operators_cuda_bench
//
// A time is the median of replays of a captured graph over its launches, "alone" where no kernel
// may begin before the one before it has ended. Weights rotate through more memory than the
// second-level cache holds, activations stay in it, as they do in a model.
#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/backend.h"
#include "kernels/cuda/attention/bench_kernels.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/kernel_overlap.h"
#include "kernels/formats/bf16.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr int kNumLayers = 64;  // whose weights and keys rotate
constexpr int64_t kReadBytes = int64_t{1} << 30;
constexpr int kVocabRows = 8192;
constexpr int kVocabSize = 103'424;
constexpr int kTokens[] = {1, 8, 64, 2048};

struct ModelShape {
  std::string name;
  int64_t hidden;
  AttentionShape attention;
  RouterShape router;
};

const ModelShape kModels[] = {{"300B", 8192, {64, 8, 128}, {64, 8, 1e-12f}},
                              {"21B", 2560, {20, 4, 128}, {64, 6, 1e-12f}}};

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

class Bench {
 public:
  explicit Bench(plan::KvCacheKind kv_cache)
      : backend_(Must(CreateCudaBackend({.kv_cache = kv_cache}))),
        read_memory_(Must(backend_->Allocate(kReadBytes))) {
    CUDA_CALL(cudaDeviceGetAttribute, &num_multiprocessors_, cudaDevAttrMultiProcessorCount, 0);
  }

  Backend& backend() { return *backend_; }

  // [rows, columns] of numbers between -2 and 2, on the device.
  Rows RandomRows(int64_t rows, int64_t columns) {
    const int64_t stride = PaddedStride(columns);
    buffers_.push_back(Must(backend_->Allocate(rows * stride * 4)));
    auto* data = static_cast<float*>(buffers_.back()->data());
    LaunchFillFloats(data, rows * stride, stream());
    return {data, stride};
  }
  template <typename T>
  T* Allocate(int64_t count) {
    buffers_.push_back(Must(backend_->Allocate(count * static_cast<int64_t>(sizeof(T)))));
    return static_cast<T*>(buffers_.back()->data());
  }

  // One row of the table: fn(i) is one call of the operator, which has to read and write `bytes`.
  void Measure(const std::string& name, int64_t bytes, const std::function<void(int)>& fn) {
    const double us = Median(fn);
    kernels_may_overlap = false;
    const double alone_us = Median(fn);
    kernels_may_overlap = true;
    const int64_t size = std::min(kReadBytes, (bytes + 15) / 16 * 16);
    const int64_t places = kReadBytes / size;
    const double read_us = Median([&](int i) {
      LaunchRead(static_cast<unsigned char*>(read_memory_->data()) + i % places * size, size,
                 static_cast<uint32_t*>(read_memory_->data()), num_multiprocessors_, stream());
    });
    fmt::print(
        "{:<44} {:>8.2f} us, alone {:>8.2f} us {:>8.1f} GB/s   read {:>8.2f} us   {:>5.2f} of "
        "read\n",
        name, us, alone_us, 1e-3 * static_cast<double>(bytes) / us, read_us, read_us / us);
    std::fflush(stdout);
  }

 private:
  cudaStream_t stream() const { return StreamOf(*backend_); }

  // Microseconds of one of kNumLayers calls.
  double Median(const std::function<void(int)>& fn) {
    constexpr int kWarmups = 2;
    constexpr int kReplays = 11;
    for (int i = 0; i < kNumLayers; ++i) fn(i);  // scratch memory grows to its size
    CUDA_CALL(cudaStreamSynchronize, stream());
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    CUDA_CALL(cudaStreamBeginCapture, stream(), cudaStreamCaptureModeThreadLocal);
    for (int i = 0; i < kNumLayers; ++i) fn(i);
    CUDA_CALL(cudaStreamEndCapture, stream(), &graph);
    CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
    const auto begin = Must(CreateEvent(EventTiming::kOn));
    const auto end = Must(CreateEvent(EventTiming::kOn));
    std::vector<double> times;
    for (int replay = 0; replay < kWarmups + kReplays; ++replay) {
      CUDA_CALL(cudaEventRecord, begin.get(), stream());
      CUDA_CALL(cudaGraphLaunch, executable, stream());
      CUDA_CALL(cudaEventRecord, end.get(), stream());
      CUDA_CALL(cudaStreamSynchronize, stream());
      float milliseconds = 0;
      CUDA_CALL(cudaEventElapsedTime, &milliseconds, begin.get(), end.get());
      if (replay >= kWarmups) times.push_back(1000.0 * milliseconds / kNumLayers);
    }
    CUDA_CALL(cudaGraphExecDestroy, executable);
    CUDA_CALL(cudaGraphDestroy, graph);
    std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
    return times[kReplays / 2];
  }

  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<Buffer> read_memory_;
  int num_multiprocessors_ = 0;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

std::unique_ptr<WeightMatrix> RandomWeights(Bench* bench, formats::WeightFormat format, int64_t k,
                                            int64_t n, MatrixUse use) {
  formats::HostMatrix matrix = formats::MakeHostMatrix(format, k, n);
  std::minstd_rand rng(static_cast<unsigned>(k + n));
  const auto next = [&] { return static_cast<float>(rng()) * 0x1p-30f - 1.0f; };
  for (float& value : matrix.values_f32) value = next();
  for (uint16_t& value : matrix.values_bf16) value = formats::FloatToBfloat16(next());
  return Must(bench->backend().Pack(matrix, use));
}

// Sequences that are one token long behind `context`, or one prompt of that length.
std::unique_ptr<DeviceBatch> BatchOf(Bench* bench, int num_tokens, bool decode,
                                     const SampleParams& sample = {}) {
  constexpr int kBlocks = 4096 / kKvBlockTokens;
  std::vector<int32_t> table(kBlocks);
  for (int i = 0; i < kBlocks; ++i) table[i] = i;
  Batch batch;
  batch.tokens.resize(num_tokens);
  for (int i = 0; i < num_tokens; ++i) batch.tokens[i] = (i * 977) % kVocabRows;
  const int rows = decode ? num_tokens : 1;
  for (int slot = 0; slot < rows; ++slot) {
    // Each to a place of its own in the same blocks.
    batch.rows.push_back({.position = decode ? slot * 64 % 4032 : 0,
                          .length = decode ? 1 : num_tokens,
                          .block_table = table,
                          .want_logits = decode,
                          .slot = slot,
                          .sample = sample});
  }
  auto device = Must(bench->backend().CreateBatch({.max_tokens = num_tokens,
                                                   .max_rows = rows,
                                                   .max_blocks_per_row = kBlocks,
                                                   .num_slots = rows}));
  bench->backend().SetBatch(batch, device.get());
  return device;
}

void BenchRows(Bench* bench, const ModelShape& model) {
  Backend& backend = bench->backend();
  const int64_t hidden = model.hidden;
  const auto table = RandomWeights(bench, formats::WeightFormat::kBfloat16, kVocabRows, hidden,
                                   MatrixUse::kEmbedding);
  std::vector<std::unique_ptr<WeightMatrix>> routers;
  for (int i = 0; i < kNumLayers; ++i) {
    routers.push_back(RandomWeights(bench, formats::WeightFormat::kFloat32, hidden,
                                    model.router.num_experts, MatrixUse::kRouter));
  }
  const Rows gain = bench->RandomRows(1, hidden);
  const Rows bias = bench->RandomRows(1, model.router.num_experts);
  for (const int tokens : kTokens) {
    const auto batch = BatchOf(bench, tokens, tokens <= 64);
    const Rows x = bench->RandomRows(tokens, hidden);
    const Rows delta = bench->RandomRows(tokens, hidden);
    const Rows out = bench->RandomRows(tokens, hidden);
    const auto name = [&](const char* op) {
      return fmt::format("{} {} {} tokens", model.name, op, tokens);
    };
    bench->Measure(name("embed"), tokens * hidden * 6,
                   [&](int) { backend.Embed(*table, *batch, out); });
    bench->Measure(name("add + RMSNorm"), tokens * hidden * 16 + hidden * 4, [&](int) {
      backend.AddRmsNorm(x, delta, nullptr, tokens, hidden, gain.data, 1e-5f, out);
    });
    auto* ids = bench->Allocate<int32_t>(tokens * model.router.top_k);
    auto* weights = bench->Allocate<float>(tokens * model.router.top_k);
    bench->Measure(name("route"), (tokens + model.router.num_experts) * hidden * 4, [&](int i) {
      backend.Route(x, tokens, *routers[i], bias.data, model.router, ids, weights);
    });
  }
}

void BenchAppend(Bench* bench, const ModelShape& model, const char* kind) {
  Backend& backend = bench->backend();
  const AttentionShape& shape = model.attention;
  const int64_t layer_bytes = Must(backend.KvLayerBytes(shape));
  const int64_t block_bytes = layer_bytes * kNumLayers;
  auto* pool = bench->Allocate<unsigned char>(block_bytes * (4096 / kKvBlockTokens));
  for (const int tokens : kTokens) {
    const auto batch = BatchOf(bench, tokens, tokens <= 64);
    const Rows cos_sin = bench->RandomRows(tokens, shape.head_dim);
    const Rows qkv = bench->RandomRows(tokens, shape.qkv_columns());
    bench->Measure(fmt::format("{} rope angles {} tokens", model.name, tokens),
                   int64_t{tokens} * shape.head_dim * 4,
                   [&](int) { backend.RopeAngles(*batch, shape.head_dim, 5e5f, 1.0f, cos_sin); });
    const int64_t bytes =
        int64_t{tokens} *
            (shape.qkv_columns() + shape.num_heads * shape.head_dim + shape.head_dim) * 4 +
        tokens * layer_bytes / kKvBlockTokens;
    bench->Measure(fmt::format("{} rope + append {} {} tokens", model.name, kind, tokens), bytes,
                   [&](int i) {
                     backend.RopeAndAppendKv(shape, *batch, cos_sin, qkv,
                                             {pool, block_bytes, i * layer_bytes});
                   });
  }
}

void BenchSampling(Bench* bench) {
  struct Case {
    const char* name;
    SampleParams params;
  };
  const Case cases[] = {{"greedy", {.temperature = 0}},
                        {"top-p 0.8", {.temperature = 0.8f, .top_p = 0.8f, .seed = 1}},
                        {"top-k 50", {.temperature = 0.8f, .top_k = 50, .seed = 1}}};
  for (const int rows : {1, 8, 64}) {
    const Rows logits = bench->RandomRows(rows, kVocabSize);
    auto* ids = bench->Allocate<int32_t>(rows);
    for (const Case& c : cases) {
      const auto batch = BatchOf(bench, rows, true, c.params);
      bench->Measure(fmt::format("sample {} {} rows", c.name, rows), int64_t{rows} * kVocabSize * 4,
                     [&](int) { bench->backend().Sample(logits, kVocabSize, batch.get(), ids); });
    }
  }
}

int Main() {
  Bench bench(plan::KvCacheKind::kBfloat16);
  fmt::print("{}\n", bench.backend().name());
  for (const ModelShape& model : kModels) BenchRows(&bench, model);
  for (const ModelShape& model : kModels) BenchAppend(&bench, model, "bfloat16");
  Bench int8(plan::KvCacheKind::kInt8);
  for (const ModelShape& model : kModels) BenchAppend(&int8, model, "int8");
  BenchSampling(&bench);
  return 0;
}

}  // namespace
}  // namespace wintserve::kernels::cuda

int main() { return wintserve::kernels::cuda::Main(); }
