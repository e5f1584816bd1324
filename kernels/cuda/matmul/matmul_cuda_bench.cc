// Times of the weight products on a GPU: median of graph replays by events, over weights that
// rotate through more memory than the L2 cache holds. The launches of the resident and the cached
// kernel overlap the ones before them here as in a model, where those are of other kernels.
//
// GB/s counts the bytes of the packed weights that a product must read, once. read: a kernel that
// only reads as many bytes, in the same run. fd: the WINT2 product with FastDeploy's arithmetic in
// the skeletons of the resident, the cached and the stream kernel; what is "x fastdeploy" is
// compared with the fastest of them. Prints a table, and with --json=FILE writes the same as JSON;
// --filter=TEXT runs the tables whose name contains it, --min-tokens=NUMBER and
// --max-tokens=NUMBER only their rows of at least and at most as many tokens (of an expert).
#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/matmul/baselines_bench.h"
#include "kernels/cuda/matmul/device_array_test_util.h"
#include "kernels/cuda/matmul/launches.h"
#include "kernels/cuda/matmul/matmul.h"
#include "kernels/cuda/matmul/variants_bench.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::WeightFormat;
using plan::ProductKernel;
using plan::ProductPlan;
using plan::ProductShape;

struct Bench {
  DeviceProperties gpu;
  Stream stream;
  std::string filter;
  int64_t min_tokens = 0;  // of an expert or a linear layer
  int64_t max_tokens = INT64_MAX;
  nlohmann::json results = nlohmann::json::array();

  bool Wants(const std::string& name) const { return name.find(filter) != std::string::npos; }
};

// Median microseconds of one of `launches` launches, fn(i) for i = 0 … launches - 1 in one graph.
double MedianMicroseconds(const Bench& bench, int launches, const std::function<void(int)>& fn) {
  constexpr int kWarmups = 2;
  constexpr int kReplays = 11;
  cudaStream_t stream = bench.stream.get();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_CALL(cudaStreamBeginCapture, stream, cudaStreamCaptureModeThreadLocal);
  for (int i = 0; i < launches; ++i) fn(i);
  CUDA_CALL(cudaStreamEndCapture, stream, &graph);
  CUDA_CALL(cudaGraphInstantiate, &executable, graph, 0ull);
  auto begin = CreateEvent(EventTiming::kOn);
  auto end = CreateEvent(EventTiming::kOn);
  CHECK(begin.ok() && end.ok());
  std::vector<double> times;
  for (int replay = 0; replay < kWarmups + kReplays; ++replay) {
    CUDA_CALL(cudaEventRecord, begin->get(), stream);
    CUDA_CALL(cudaGraphLaunch, executable, stream);
    CUDA_CALL(cudaEventRecord, end->get(), stream);
    CUDA_CALL(cudaStreamSynchronize, stream);
    float milliseconds = 0;
    CUDA_CALL(cudaEventElapsedTime, &milliseconds, begin->get(), end->get());
    if (replay >= kWarmups) times.push_back(1000.0 * milliseconds / launches);
  }
  CUDA_CALL(cudaGraphExecDestroy, executable);
  CUDA_CALL(cudaGraphDestroy, graph);
  std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
  return times[kReplays / 2];
}

void Report(Bench* bench, const std::string& name, const std::string& variant, double microseconds,
            double required_bytes, double multiply_adds, double read_microseconds,
            double baseline_microseconds) {
  const double gigabytes = 1e-3 * required_bytes / microseconds;
  const double teraflops = 2e-6 * multiply_adds / microseconds;
  fmt::print("{:<34} {:<14} {:>9.1f} us {:>7.0f} GB/s {:>6.1f} TFLOP/s", name, variant,
             microseconds, gigabytes, teraflops);
  nlohmann::json result = {{"name", name},           {"variant", variant},
                           {"us", microseconds},     {"gigabytes_per_second", gigabytes},
                           {"teraflops", teraflops}, {"required_bytes", required_bytes}};
  if (read_microseconds > 0) {
    fmt::print("  {:>5.2f} of read", read_microseconds / microseconds);
    result["share_of_read"] = read_microseconds / microseconds;
  }
  if (baseline_microseconds > 0) {
    fmt::print("  {:>5.2f}x fastdeploy", baseline_microseconds / microseconds);
    result["times_fastdeploy"] = baseline_microseconds / microseconds;
  }
  fmt::print("\n");
  std::fflush(stdout);
  bench->results.push_back(result);
}

// Random matrices of one layout, and how to make a product's arguments for some of them.
class Matrices {
 public:
  Matrices(Bench* bench, const plan::WeightLayout& layout, int count)
      : bench_(bench), layout_(layout), count_(count), bytes_(layout.size_bytes() * count) {
    Fill(false);
  }

  void Fill(bool float_maps) {
    for (int i = 0; i < count_; ++i) {
      LaunchFillWeights(layout_, 1000 + i, float_maps, data(i), bench_->stream.get());
    }
    CUDA_CALL(cudaStreamSynchronize, bench_->stream.get());
  }

  const plan::WeightLayout& layout() const { return layout_; }
  int count() const { return count_; }
  uint8_t* data(int i) const { return bytes_.data() + layout_.size_bytes() * (i % count_); }
  int64_t size_bytes() const { return bytes_.count(); }

  ProductParams Params() const {
    ProductParams params;
    params.records_offset = layout_.records_offset();
    params.tiles = static_cast<int>(layout_.tiles());
    params.chunks = static_cast<int>(layout_.chunks());
    params.columns = static_cast<int>(layout_.width());
    params.epilogue = layout_.gate_up ? Epilogue::kSwiGlu : Epilogue::kStore;
    params.y_stride = layout_.width();
    return params;
  }

 private:
  Bench* const bench_;
  const plan::WeightLayout layout_;
  const int count_;
  const DeviceArray<uint8_t> bytes_;
};

// Prepared random rows.
class PreparedInput {
 public:
  PreparedInput(Bench* bench, const plan::WeightLayout& layout, int64_t num_rows,
                plan::OperandOrder order = plan::OperandOrder::kMma)
      : x_(num_rows * layout.k),
        values_(num_rows * layout.chunks() * plan::kChunkRows),
        inverse_scale_(num_rows),
        corrections_(num_rows * layout.chunks()) {
    cudaStream_t stream = bench->stream.get();
    LaunchFillRows(x_.data(), x_.count(), 7, stream);
    PrepareParams params;
    params.x = x_.data();
    params.x_stride = layout.k;
    params.k = static_cast<int>(layout.k);
    params.chunks = static_cast<int>(layout.chunks());
    params.k_order = layout.k_order;
    params.offsets = plan::OffsetsOf(layout.format);
    params.order = order;
    params.out = rows();
    LaunchPrepareRows(params, num_rows, stream);
    CUDA_CALL(cudaStreamSynchronize, stream);
  }

  PreparedRows rows() const { return {values_.data(), inverse_scale_.data(), corrections_.data()}; }
  int64_t num_values() const { return values_.count(); }

 private:
  DeviceArray<float> x_;
  DeviceArray<uint16_t> values_;
  DeviceArray<float> inverse_scale_;
  DeviceArray<ChunkCorrections> corrections_;
};

int LaunchesFor(double required_bytes) {
  return required_bytes > 400e6 ? 4 : required_bytes > 50e6 ? 12 : 32;
}

// Microseconds to read as many bytes as a product must, in rotation.
double ReadMicroseconds(Bench* bench, const Matrices& matrices, int64_t required_bytes) {
  DeviceArray<float> sink(1);
  const int64_t size = required_bytes / 512 * 512;
  const int64_t places = std::max<int64_t>(1, matrices.size_bytes() / size);
  double best = 1e30;
  for (const int blocks_per_multiprocessor : {4, 8}) {
    const int blocks = blocks_per_multiprocessor * bench->gpu.num_multiprocessors;
    best = std::min(best, MedianMicroseconds(*bench, LaunchesFor(size), [&](int i) {
                      LaunchRead(matrices.data(0) + i % places * size, size, blocks, sink.data(),
                                 bench->stream.get());
                    }));
  }
  return best;
}

// `active` of `count` experts, each with `tokens` tokens.
void BenchExperts(Bench* bench, const std::string& name, const plan::WeightLayout& layout,
                  int active) {
  constexpr int kExperts = 64;
  if (!bench->Wants(name)) return;
  Matrices matrices(bench, layout, kExperts);
  const int64_t required = layout.size_bytes() * active;
  const double read = ReadMicroseconds(bench, matrices, required);
  Report(bench, name, "read", read, static_cast<double>(required), 0, 0, 0);
  const int launches = LaunchesFor(static_cast<double>(required));
  std::mt19937 rng(1);
  std::vector<std::vector<bool>> chosen(launches, std::vector<bool>(kExperts));
  for (auto& set : chosen) {
    std::vector<int> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (int i = 0; i < active; ++i) set[order[i]] = true;
  }
  for (const int64_t tokens : {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024}) {
    if (tokens < bench->min_tokens || tokens > bench->max_tokens) continue;
    const int64_t num_tokens = tokens * active;
    std::vector<int32_t> first;
    for (const auto& set : chosen) {
      int32_t next = 0;
      for (int e = 0; e < kExperts; ++e) {
        first.push_back(next);
        next += set[e] ? static_cast<int32_t>(tokens) : 0;
      }
      first.push_back(next);
    }
    const DeviceArray<int32_t> first_token(first);
    const PreparedInput input(bench, layout, num_tokens);
    const PreparedInput wgmma_input(bench, layout, num_tokens, plan::OperandOrder::kWgmma);
    DeviceArray<float> y(num_tokens * layout.width());
    ProductParams params = matrices.Params();
    params.num_experts = kExperts;
    for (int e = 0; e < kExperts; ++e) params.experts.weights[e] = matrices.data(e);
    params.x = input.rows();
    params.num_tokens = static_cast<int>(num_tokens);
    params.y = y.data();
    const ProductShape shape = {layout.format, layout.chunks(), layout.tiles(),
                                kExperts,      num_tokens,      tokens};
    const auto time = [&](const Variant& variant, const auto& launch) {
      ProductParams own = params;
      own.slices = variant.slices();
      own.token_slots = variant.plan.token_slots;
      own.groups = variant.plan.groups;
      return MedianMicroseconds(*bench, launches, [&](int i) {
        own.first_token = first_token.data() + int64_t{i} * (kExperts + 1);
        launch(own);
      });
    };
    const std::string row = fmt::format("{} M={}", name, tokens);
    const double multiply_adds = static_cast<double>(num_tokens * layout.k * layout.n);
    double baseline = 0;
    if (tokens <= 8 && layout.format == WeightFormat::kWint2) {
      matrices.Fill(true);
      const PreparedInput rounded(bench, layout, num_tokens);
      LaunchBfloat16Rows(rounded.rows(), rounded.num_values(), bench->stream.get());
      params.x = rounded.rows();
      for (const Variant& variant : BaselinesFor(bench->gpu, shape)) {
        const double us = time(variant, [&](const ProductParams& own) {
          LaunchFastDeployWint2(variant.plan, own, bench->stream.get());
        });
        Report(bench, row, "fd " + variant.name, us, static_cast<double>(required), multiply_adds,
               read, 0);
        baseline = baseline == 0 ? us : std::min(baseline, us);
      }
      matrices.Fill(false);
    }
    for (const Variant& variant : VariantsFor(bench->gpu, shape, tokens)) {
      params.x = variant.wgmma.has_value() ? wgmma_input.rows() : input.rows();
      const double us = time(variant, [&](const ProductParams& own) {
        variant.Launch(layout.format, own, bench->stream.get());
      });
      Report(bench, row, variant.name, us, static_cast<double>(required), multiply_adds, read,
             baseline);
    }
  }
}

void BenchLinear(Bench* bench, const std::string& name, WeightFormat format, int64_t n, int64_t k) {
  if (!bench->Wants(name)) return;
  plan::WeightLayout layout;
  layout.format = format;
  layout.k = k;
  layout.n = n;
  const int64_t required = layout.size_bytes();
  // 1 GB or more to rotate through.
  const Matrices matrices(bench, layout, static_cast<int>((int64_t{1} << 30) / required + 2));
  const double read = ReadMicroseconds(bench, matrices, required);
  Report(bench, name, "read", read, static_cast<double>(required), 0, 0, 0);
  for (const int64_t tokens : {1, 8, 16, 32, 64, 128, 256, 1024}) {
    if (tokens < bench->min_tokens || tokens > bench->max_tokens) continue;
    const ProductShape shape = {format, layout.chunks(), layout.tiles(), 1, tokens, tokens};
    const PreparedInput input(bench, layout, tokens);
    const PreparedInput wgmma_input(bench, layout, tokens, plan::OperandOrder::kWgmma);
    DeviceArray<float> y(tokens * n);
    for (const Variant& variant : VariantsFor(bench->gpu, shape, tokens)) {
      DeviceArray<float> sums(variant.split_sum_floats(shape) + 1);
      ProductParams params = matrices.Params();
      params.slices = variant.slices();
      params.x = variant.wgmma.has_value() ? wgmma_input.rows() : input.rows();
      params.num_tokens = static_cast<int>(tokens);
      params.y = y.data();
      params.split_sums = variant.split_slices() ? sums.data() : nullptr;
      const int count = std::max(LaunchesFor(static_cast<double>(required)), matrices.count());
      const double us = MedianMicroseconds(*bench, count, [&](int i) {
        params.experts.weights[0] = matrices.data(i);
        variant.Launch(format, params, bench->stream.get());
        if (variant.split_slices()) LaunchAddSlices(params, bench->stream.get());
      });
      Report(bench, fmt::format("{} M={}", name, tokens), variant.name, us,
             static_cast<double>(required), static_cast<double>(tokens * n * k), read, 0);
    }
  }
}

template <ProductKernel kKernel, int kTokenBlocks>
ProductPlan ForcedPlan(const ProductShape& shape, int num_multiprocessors) {
  ProductPlan plan;
  plan.kernel = kKernel;
  plan.token_blocks = kTokenBlocks;
  plan.tiles_per_warp = kKernel == ProductKernel::kTile ? 2 : 1;
  return plan::FinishPlan(shape, num_multiprocessors, plan);
}

struct NamedPlanner {
  const char* name;
  decltype(MatmulOptions::planner) planner;
  int64_t least_rows;
  int64_t most_rows;
  plan::WgmmaPlanner wgmma_planner = nullptr;
};
template <int kTokens>
std::optional<plan::WgmmaPlan> ForcedWgmma(const ProductShape& shape, int num_multiprocessors) {
  plan::WgmmaPlan plan;
  plan.tokens = kTokens;
  return plan::FinishWgmmaPlan(shape, num_multiprocessors, plan);
}
constexpr NamedPlanner kMoePlanners[] = {
    {"chosen *", nullptr, 1, INT64_MAX, plan::PlanWgmmaProduct},
    {"portable", plan::PlanProduct, 32, INT64_MAX},
    {"resident", ForcedPlan<ProductKernel::kStream, 1>, 32, 128},
    {"tile 16", ForcedPlan<ProductKernel::kTile, 2>, 32, 256},
    {"tile 32", ForcedPlan<ProductKernel::kTile, 4>, 32, 512},
    {"tile 64", ForcedPlan<ProductKernel::kTile, 8>, 32, 512},
    {"wgmma 32", plan::PlanProduct, 32, 512, ForcedWgmma<plan::kSmallTokens>},
    {"wgmma 64", plan::PlanProduct, 64, INT64_MAX, ForcedWgmma<plan::kNarrowTokens>},
    {"wgmma 128", plan::PlanProduct, 256, INT64_MAX, ForcedWgmma<plan::kWideTokens>},
};

// Whole MoE blocks: sort, preparations, both products, combination; experts by sampled routing.
void BenchMoe(Bench* bench, const std::string& name, int64_t hidden, int64_t width, int top_k) {
  if (!bench->Wants(name)) return;
  constexpr int kExperts = 64;
  plan::WeightLayout up;
  up.gate_up = true;
  up.k = hidden;
  up.n = 2 * width;
  plan::WeightLayout down;
  down.k = width;
  down.n = hidden;
  const Matrices ups(bench, up, kExperts);
  const Matrices downs(bench, down, kExperts);
  std::vector<DeviceMlp> mlps;
  std::vector<const DeviceMlp*> experts;
  for (int e = 0; e < kExperts; ++e) mlps.push_back({{up, ups.data(e)}, {down, downs.data(e)}});
  for (const DeviceMlp& mlp : mlps) experts.push_back(&mlp);
  std::mt19937 rng(2);
  for (const int64_t rows : {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}) {
    if (rows < bench->min_tokens || rows > bench->max_tokens) continue;
    constexpr int kLaunches = 8;
    std::vector<int32_t> ids;
    double distinct = 0;
    for (int launch = 0; launch < kLaunches; ++launch) {
      std::vector<bool> used(kExperts);
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<int32_t> order(kExperts);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), rng);
        for (int i = 0; i < top_k; ++i) {
          ids.push_back(order[i]);
          used[order[i]] = true;
        }
      }
      distinct += static_cast<double>(std::count(used.begin(), used.end(), true)) / kLaunches;
    }
    const DeviceArray<int32_t> expert_ids(ids);
    const DeviceArray<float> weights(std::vector<float>(rows * top_k, 0.125f));
    DeviceArray<float> x(rows * hidden);
    LaunchFillRows(x.data(), x.count(), 3, bench->stream.get());
    DeviceArray<float> y(rows * hidden);
    MoeMlpArgs args;
    args.x = {x.data(), hidden};
    args.num_rows = rows;
    args.experts = experts;
    args.top_k = top_k;
    args.expert_weights = weights.data();
    args.y = {y.data(), hidden};
    for (const NamedPlanner& named : kMoePlanners) {
      if (rows < named.least_rows || rows > named.most_rows) continue;
      MatmulOptions options =
          MatmulOptionsFor(bench->gpu.num_multiprocessors, bench->gpu.compute_capability());
      if (named.planner != nullptr) options.planner = named.planner;
      if (options.wgmma_planner != nullptr) options.wgmma_planner = named.wgmma_planner;
      DeviceArray<uint8_t> workspace(
          MoeMlpWorkspaceBytes(options, mlps[0], kExperts, top_k, nullptr, rows));
      const double us = MedianMicroseconds(*bench, kLaunches, [&](int i) {
        args.expert_ids = expert_ids.data() + i * rows * top_k;
        LaunchMoeMlp(options, args, workspace.data(), bench->stream.get());
      });
      Report(bench, fmt::format("{} rows={} experts={:.1f}", name, rows, distinct), named.name, us,
             distinct * static_cast<double>(up.size_bytes() + down.size_bytes()),
             static_cast<double>(rows * top_k * hidden * width * 3), 0, 0);
    }
  }
}

void RunAll(Bench* bench) {
  const auto experts = [&](const char* name, WeightFormat format, bool gate_up, int64_t n,
                           int64_t k, int active) {
    plan::WeightLayout layout;
    layout.format = format;
    layout.gate_up = gate_up;
    layout.k = k;
    layout.n = n;
    BenchExperts(bench, name, layout, active);
  };
  experts("300B gate-up wint2", WeightFormat::kWint2, true, 7168, 8192, 8);
  experts("300B down wint2", WeightFormat::kWint2, false, 8192, 3584, 8);
  experts("300B TP2 gate-up wint2", WeightFormat::kWint2, true, 3584, 8192, 8);
  experts("300B TP2 down wint2", WeightFormat::kWint2, false, 8192, 1792, 8);
  experts("21B gate-up wint2", WeightFormat::kWint2, true, 3072, 2560, 6);
  experts("21B down wint2", WeightFormat::kWint2, false, 2560, 1536, 6);
  experts("300B gate-up wint4", WeightFormat::kWint4, true, 7168, 8192, 8);
  BenchLinear(bench, "300B qkv wint8", WeightFormat::kWint8, 10240, 8192);
  BenchLinear(bench, "300B o_proj wint8", WeightFormat::kWint8, 8192, 8192);
  BenchLinear(bench, "300B dense gate-up wint8", WeightFormat::kWint8, 57344, 8192);
  BenchLinear(bench, "300B dense down wint8", WeightFormat::kWint8, 8192, 28672);
  BenchLinear(bench, "300B head bfloat16", WeightFormat::kBfloat16, 103424, 8192);
  BenchLinear(bench, "21B qkv wint8", WeightFormat::kWint8, 3584, 2560);
  BenchMoe(bench, "300B moe", 8192, 3584, 8);
  BenchMoe(bench, "21B moe", 2560, 1536, 6);
}

// The number behind `begin` characters of an argument; says what is wrong with it.
bool ParseTokens(const char* program, std::string_view argument, size_t begin, int64_t* tokens) {
  const std::string_view number = argument.substr(begin);
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), *tokens);
  if (error == std::errc() && end == number.data() + number.size() && *tokens >= 0) return true;
  fmt::print(stderr, "{}: '{}'; allowed is a number of 0 or more\n", program, argument);
  return false;
}

int Main(int argc, char** argv) {
  Bench bench;
  std::string json_path;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("--json=")) {
      json_path = argument.substr(7);
    } else if (argument.starts_with("--filter=")) {
      bench.filter = argument.substr(9);
    } else if (argument.starts_with("--min-tokens=")) {
      if (!ParseTokens(argv[0], argument, 13, &bench.min_tokens)) return 64;
    } else if (argument.starts_with("--max-tokens=")) {
      if (!ParseTokens(argv[0], argument, 13, &bench.max_tokens)) return 64;
    } else {
      fmt::print(stderr,
                 "{}: unknown argument '{}'; allowed are --json=FILE, --filter=TEXT, "
                 "--min-tokens=NUMBER and --max-tokens=NUMBER\n",
                 argv[0], argument);
      return 64;
    }
  }
  auto gpu = UseDevice(0);
  if (!gpu.ok()) {
    fmt::print(stderr, "{}\n", gpu.status().ToString());
    return 69;
  }
  bench.gpu = *std::move(gpu);
  auto stream = CreateStream();
  CHECK(stream.ok(), "{}", stream.status().ToString());
  bench.stream = *std::move(stream);
  InitMatmul();
  fmt::print("{}, {} multiprocessors\n", bench.gpu.name, bench.gpu.num_multiprocessors);
  RunAll(&bench);
  if (!json_path.empty()) {
    std::ofstream(json_path) << nlohmann::json{
        {"device", bench.gpu.name},
        {"results", bench.results}}.dump(1);
  }
  return 0;
}

}  // namespace
}  // namespace wintserve::kernels::cuda

int main(int argc, char** argv) { return wintserve::kernels::cuda::Main(argc, argv); }
