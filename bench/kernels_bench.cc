// Matrix products per format and whole forward steps of the demo model on the CPU backend.
//
// Times are the best of many runs, because a shared machine only ever makes one slower; cpu_ms is
// the mean processor time of all threads. share_of_peak compares with the measured multiply-add
// peak, and share_of_read with the measured memory bandwidth, of one core times the threads used.
// Run from the repository root. --model=DIR names another checkpoint, --threads=N the threads,
// --simd=NAME (AVX3, AVX2, SCALAR) another instruction set than the best.
#include <benchmark/benchmark.h>
#include <fmt/core.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "bench/machine_peak.h"
#include "common/check.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/weights/checkpoint.h"
#include "hwy/highway.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve::bench {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;
using kernels::Backend;

std::string model_dir = "models/poet";
int num_threads = 2;
double peak_gflops = 0;
double read_gigabytes_per_second = 0;

double ThreadsCpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Runs fn under `state` and reports the best time, and rates for the work of one run.
template <typename Fn>
void Measure(benchmark::State& state, double required_bytes, double multiply_adds, const Fn& fn) {
  fn();  // first touch
  double best_seconds = 1e30;
  const double cpu_begin = ThreadsCpuSeconds();
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    fn();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best_seconds = std::min(best_seconds, took.count());
  }
  const double cpu_seconds = ThreadsCpuSeconds() - cpu_begin;
  const double gigabytes = 1e-9 * required_bytes / best_seconds;
  const double gflops = 2e-9 * multiply_adds / best_seconds;
  state.counters["best_ms"] = best_seconds * 1e3;
  state.counters["cpu_ms"] = cpu_seconds * 1e3 / static_cast<double>(state.iterations());
  state.counters["GB/s"] = gigabytes;
  state.counters["GFLOP/s"] = gflops;
  state.counters["share_of_peak"] = gflops / (peak_gflops * num_threads);
  state.counters["share_of_read"] = gigabytes / (read_gigabytes_per_second * num_threads);
}

HostMatrix RandomMatrix(WeightFormat format, int64_t k, int64_t n) {
  std::mt19937 rng(1);
  HostMatrix m = formats::MakeHostMatrix(format, k, n);
  const float scale = 0x1p-10f;
  for (float& value : m.values_f32) value = static_cast<float>(rng() % 255) * scale;
  for (uint16_t& value : m.values_bf16) value = static_cast<uint16_t>(0x3C00 + rng() % 255);
  const int codes = format == WeightFormat::kWint8 ? 255 : 15;
  for (int8_t& code : m.codes_i8) code = static_cast<int8_t>(rng() % codes - codes / 2);
  for (uint8_t& code : m.codes_u8) code = static_cast<uint8_t>(rng());
  for (uint8_t& local : m.local_scale) local = static_cast<uint8_t>(1 + rng() % 15);
  std::fill(m.channel_scale.begin(), m.channel_scale.end(), scale);
  std::fill(m.code_scale.begin(), m.code_scale.end(), 121.7f);
  std::fill(m.code_zp.begin(), m.code_zp.end(), 3.3f);
  return m;
}

void BM_Linear(benchmark::State& state, WeightFormat format, int64_t k, int64_t n) {
  const int64_t rows = state.range(0);
  const auto backend = kernels::cpu::CreateCpuBackend({.num_threads = num_threads});
  const auto w = *backend->Pack(RandomMatrix(format, k, n), kernels::MatrixUse::kLinear);
  std::vector<float> x(rows * kernels::PaddedStride(k), 0.5f);
  std::vector<float> y(rows * kernels::PaddedStride(n));
  Measure(state, static_cast<double>(w->size_bytes()), static_cast<double>(rows * k * n), [&] {
    backend->Linear({x.data(), kernels::PaddedStride(k)}, rows, *w,
                    {y.data(), kernels::PaddedStride(n)});
  });
}

struct Loaded {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Model> model;
};

Loaded& TheModel() {
  static Loaded* loaded = [] {
    auto* l = new Loaded;
    auto config = LoadModelConfig(model_dir);
    CHECK(config.ok(), "{}", config.status().ToString());
    l->config = *config;
    auto checkpoint = Checkpoint::Open(model_dir, l->config, KOrderChoice::kAuto);
    CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
    l->checkpoint = *std::move(checkpoint);
    l->backend = kernels::cpu::CreateCpuBackend({.num_threads = num_threads});
    auto model = LoadErnie45(l->config, *l->checkpoint, l->backend.get(), nullptr, {});
    CHECK(model.ok(), "{}", model.status().ToString());
    l->model = *std::move(model);
    return l;
  }();
  return *loaded;
}

// Multiply-adds a token with its weights, without attention scores and without the head.
double TokenMultiplyAdds(const ModelConfig& c) {
  const double attention =
      double(c.hidden_size) * c.head_dim * (2.0 * c.num_heads + 2.0 * c.num_kv_heads);
  double sum = 0;
  for (int i = 0; i < c.num_layers; ++i) {
    sum += attention + 3.0 * c.hidden_size *
                           (c.IsMoeLayer(i) ? c.moe_intermediate_size *
                                                  (c.num_experts_per_token + c.num_shared_experts)
                                            : c.intermediate_size);
  }
  return sum;
}

// `sequences` rows at `position`, each of `length` tokens; every row wants logits.
// Packed weights that a step of `tokens` rows has to read: every dense matrix, and the experts that
// independent uniform routing would touch. Column scales, norms and the KV cache are left out.
double StepWeightBytes(const ModelConfig& config, double tokens) {
  const double hidden = config.hidden_size;
  const double dense_bytes = config.dense_is_wint8 ? 1 : 2;
  const double attention =
      hidden * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads);
  const double distinct_experts =
      config.num_experts *
      (1 - std::pow(1 - double(config.num_experts_per_token) / config.num_experts, tokens));
  const double expert = 3 * hidden * config.moe_intermediate_size;
  double bytes = 2 * hidden * config.vocab_size;  // the head
  for (int layer = 0; layer < config.num_layers; ++layer) {
    bytes += attention * dense_bytes;
    if (!config.IsMoeLayer(layer)) {
      bytes += 3 * hidden * config.intermediate_size * dense_bytes;
      continue;
    }
    const bool wint2 =
        config.expert_quantization == ExpertQuantization::kW4W2 && layer > config.last_wint4_layer;
    const double expert_bits = wint2 ? 2 + 4.0 / 64 : 4;
    bytes += 4 * hidden * config.num_experts + distinct_experts * expert * expert_bits / 8;
  }
  return bytes;
}

void BM_Forward(benchmark::State& state) {
  const auto sequences = static_cast<int>(state.range(0));
  const auto length = static_cast<int32_t>(state.range(1));
  const auto position = static_cast<int32_t>(state.range(2));
  Loaded& loaded = TheModel();
  Model& model = *loaded.model;
  const int blocks = (position + length + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
  const auto pool = *loaded.backend->Allocate(sequences * blocks * model.kv_block_bytes());
  const auto device_batch = *loaded.backend->CreateBatch({.max_tokens = model.max_batch_tokens(),
                                                          .max_rows = sequences,
                                                          .max_blocks_per_row = blocks,
                                                          .num_slots = 1});
  std::vector<std::vector<int32_t>> tables(sequences);
  for (int i = 0; i < sequences * blocks; ++i) tables[i % sequences].push_back(i);

  // A prompt longer than the batch limit runs in chunks, as the scheduler cuts it.
  std::mt19937 rng(7);
  std::vector<kernels::Batch> batches;
  for (int32_t done = 0; done < length;) {
    const int32_t count = std::min(length - done, model.max_batch_tokens() / sequences);
    kernels::Batch& batch = batches.emplace_back();
    for (int s = 0; s < sequences; ++s) {
      for (int32_t t = 0; t < count; ++t) {
        batch.tokens.push_back(static_cast<int32_t>(rng() % model.vocab_size()));
      }
      batch.rows.push_back({position + done, count, tables[s], done + count == length});
    }
    done += count;
  }
  const double head = double(loaded.config.hidden_size) * loaded.config.vocab_size;
  const double multiply_adds = sequences * (length * TokenMultiplyAdds(loaded.config) + head);
  const double bytes = StepWeightBytes(loaded.config, sequences * length / double(batches.size())) *
                       static_cast<double>(batches.size());
  Measure(state, bytes, multiply_adds, [&] {
    for (const kernels::Batch& batch : batches) {
      loaded.backend->SetBatch(batch, device_batch.get());
      CHECK(model.Forward(*device_batch, pool->data()).ok());
    }
  });
  state.counters["tokens/s"] =
      sequences * length / (static_cast<double>(state.counters["best_ms"]) * 1e-3);
}

void UseSimdTarget(std::string_view name) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name == hwy::TargetName(target)) {
      hwy::SetSupportedTargetsForTest(target);
      return;
    }
  }
  CHECK(false, "--simd={}: this machine or this build has no such target", name);
}

void RegisterAll() {
  struct Shape {
    const char* name;
    int64_t k;
    int64_t n;
  };
  struct Format {
    const char* name;
    WeightFormat format;
    std::vector<Shape> shapes;
  };
  const std::vector<Format> table = {
      {"wint2", WeightFormat::kWint2, {{"demo", 384, 512}, {"21B", 2560, 3072}}},
      {"wint4", WeightFormat::kWint4, {{"demo", 384, 512}, {"21B", 2560, 3072}}},
      {"wint8", WeightFormat::kWint8, {{"demo", 384, 1024}, {"21B", 2560, 3584}}},
      {"bf16", WeightFormat::kBfloat16, {{"demo", 384, 8192}, {"21B", 2560, 4096}}},
      {"float32", WeightFormat::kFloat32, {{"demo", 384, 512}, {"21B", 2560, 4096}}},
  };
  for (const Format& format : table) {
    for (const Shape& shape : format.shapes) {
      benchmark::RegisterBenchmark(
          fmt::format("linear/{}/{}_{}x{}", format.name, shape.name, shape.k, shape.n).c_str(),
          [=, f = format.format](benchmark::State& state) {
            BM_Linear(state, f, shape.k, shape.n);
          })
          ->ArgName("rows")
          ->Arg(1)
          ->Arg(8)
          ->Arg(64)
          ->Arg(256)
          ->MinTime(0.2)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
    }
  }
  benchmark::RegisterBenchmark("forward", BM_Forward)
      ->ArgNames({"sequences", "tokens", "position"})
      ->Args({1, 1, 32})
      ->Args({1, 1, 256})
      ->Args({8, 1, 32})
      ->Args({8, 1, 256})
      ->Args({1, 512, 0})
      ->MinTime(1.0)
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

}  // namespace
}  // namespace wintserve::bench

int main(int argc, char** argv) {
  using namespace wintserve::bench;
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    constexpr std::string_view kModel = "--model=";
    constexpr std::string_view kThreads = "--threads=";
    constexpr std::string_view kSimd = "--simd=";
    if (flag.starts_with(kModel)) {
      model_dir = flag.substr(kModel.size());
    } else if (flag.starts_with(kThreads)) {
      num_threads = std::stoi(std::string(flag.substr(kThreads.size())));
    } else if (flag.starts_with(kSimd)) {
      UseSimdTarget(flag.substr(kSimd.size()));
    } else {
      CHECK(false, "unknown flag {}; allowed are --model=DIR, --threads=N and --simd=NAME", flag);
    }
  }
  peak_gflops = MeasurePeakGflops();
  read_gigabytes_per_second = MeasureReadGigabytesPerSecond();
  fmt::print("{}: one core reaches {:.1f} GFLOP/s and reads {:.1f} GB/s\n",
             wintserve::kernels::cpu::CreateCpuBackend({.num_threads = num_threads})->name(),
             peak_gflops, read_gigabytes_per_second);
  RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
}
