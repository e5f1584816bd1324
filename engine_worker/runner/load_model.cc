#include "engine_worker/runner/load_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cache_manager/memory/available_memory.h"
#include "common/check.h"
#include "common/heap.h"
#include "common/log.h"
#include "common/progress.h"
#include "common/status_macros.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/runner/memory_profile.h"
#include "engine_worker/runner/step_runner.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/dummy_source.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/cpu/cpu_backend.h"
#include "launcher/client/load_reporter.h"
#ifdef WINTSERVE_HAS_CUDA
#include "engine_worker/collectives/nccl/nccl_collective.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"
#endif

namespace wintserve {
namespace {

constexpr int64_t kLeastScratchBytes = int64_t{256} << 20;

KOrderChoice KOrderOf(const std::string& name) {
  if (name == "mma64") return KOrderChoice::kMma64;
  if (name == "natural") return KOrderChoice::kNatural;
  CHECK(name == "auto", "k_order={}", name);
  return KOrderChoice::kAuto;
}

Ernie45Options ModelOptionsOf(const ServeOptions& options) {
  // On a CPU so many rows are enough for matrix products to run at full speed; more would only grow
  // the model's scratch. Longer plans run as several passes.
  constexpr int kMaxCpuBatchTokens = 512;
  const int max_tokens = options.device == "cpu"
                             ? std::min(options.max_num_batched_tokens, kMaxCpuBatchTokens)
                             : options.max_num_batched_tokens;
  return {.max_batch_tokens = max_tokens,
          .max_logit_rows = std::min(options.max_num_seqs, max_tokens),
          .num_load_threads = CpuThreads(options)};
}

#ifdef WINTSERVE_HAS_CUDA
// Every rank has a device of its own, and what ranks need to compute together.
absl::Status CheckRankDevice(int rank, int world_size) {
  if (world_size == 1) return absl::OkStatus();
  const int num_devices = kernels::cuda::NumVisibleDevices();
  if (rank >= num_devices) {
    const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return absl::UnavailableError(fmt::format(
        "--tensor-parallel-size {} needs {} GPUs, this machine shows {} (CUDA_VISIBLE_DEVICES is "
        "{})",
        world_size, world_size, num_devices,
        visible == nullptr ? "not set" : fmt::format("'{}'", visible)));
  }
  return CheckNccl();
}
#endif

absl::StatusOr<std::unique_ptr<kernels::Backend>> CreateBackend(const ServeOptions& options,
                                                                [[maybe_unused]] int rank) {
  if (options.device == "cpu") {
    return kernels::cpu::CreateCpuBackend(
        {.num_threads = CpuThreads(options), .max_rows = ModelOptionsOf(options).max_batch_tokens});
  }
#ifdef WINTSERVE_HAS_CUDA
  if (options.device == "cuda") {
    RETURN_IF_ERROR(CheckRankDevice(rank, options.tensor_parallel_size));
    return kernels::cuda::CreateCudaBackend(
        {.device = rank,
         .kv_cache = options.kv_cache_dtype == "int8" ? kernels::plan::KvCacheKind::kInt8
                                                      : kernels::plan::KvCacheKind::kBfloat16,
         .num_host_threads = CpuThreads(options)});
  }
#endif
  return absl::UnavailableError(
      fmt::format("--device {}: this build has no backend for it", options.device));
}

// Stands for a group that the ranks have not joined yet, in a pass whose results nobody looks at.
class AbsentGroup final : public Collective {
 public:
  AbsentGroup(int rank, int world_size) : rank_(rank), world_size_(world_size) {}
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  absl::Status AllReduceSum(float* /*data*/, int64_t /*count*/) override {
    return absl::OkStatus();
  }
  absl::Status AllGather(const float* /*in*/, int64_t /*count*/, float* /*out*/) override {
    return absl::OkStatus();
  }
  absl::Status Broadcast(void* /*data*/, int64_t /*size_bytes*/) override {
    return absl::OkStatus();
  }

 private:
  const int rank_;
  const int world_size_;
};

// A pass as large as any that will come, so that what the device takes for itself is taken before
// the rest is given to the KV pool.
absl::Status RunLargestBatch(Model* model) {
  kernels::Backend& backend = *model->backend();
  const int max_tokens = model->max_batch_tokens();
  const int num_rows = model->max_logit_rows();
  const int row_tokens = max_tokens / num_rows;
  const int row_blocks = (row_tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
  // One sequence's blocks for all: nobody looks at the results, and a pool may not fit yet.
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Buffer> pool,
                   backend.Allocate(row_blocks * model->kv_block_bytes()));
  std::vector<int32_t> blocks;
  blocks.reserve(row_blocks);
  for (int i = 0; i < row_blocks; ++i) blocks.push_back(i);
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::DeviceBatch> device_batch,
                   backend.CreateBatch({.max_tokens = max_tokens,
                                        .max_rows = num_rows,
                                        .max_blocks_per_row = row_blocks,
                                        .num_slots = num_rows}));
  kernels::Batch batch;
  batch.tokens.resize(int64_t{num_rows} * row_tokens);
  for (int row = 0; row < num_rows; ++row) {
    batch.rows.push_back({.position = 0,
                          .length = row_tokens,
                          .block_table = blocks,
                          .want_logits = true,
                          .slot = row});
  }
  backend.SetBatch(batch, device_batch.get());
  RETURN_IF_ERROR(model->Forward(*device_batch, pool->data()).status());
  return backend.Record()->Wait();
}

// What the graphs of decode steps will take, which a worker captures once it has the KV pool:
// measured with those of a runner on a pool of its own.
absl::StatusOr<int64_t> MeasureGraphs(const ServeOptions& options, Collective* group,
                                      Model* model) {
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Buffer> pool,
                   model->backend()->Allocate(model->kv_block_bytes()));
  const StepRunnerConfig config = {.num_blocks = 1,
                                   .max_slots = static_cast<uint32_t>(options.max_num_seqs),
                                   .max_tokens = static_cast<uint32_t>(model->max_batch_tokens()),
                                   .max_sequence_tokens = 1,
                                   .sampled_vocab_size = static_cast<uint32_t>(model->vocab_size()),
                                   .use_graphs = true};
  ASSIGN_OR_RETURN(const std::unique_ptr<StepRunner> runner,
                   StepRunner::Create(config, model, group, pool->data(), nullptr));
  RETURN_IF_ERROR(runner->WarmUp());
  return runner->graphs().size_bytes();
}

// Of the device that the model is on.
struct DeviceMemory {
  int64_t free = 0;
  int64_t total = 0;
};

absl::StatusOr<DeviceMemory> QueryMemory([[maybe_unused]] const kernels::Backend& backend) {
#ifdef WINTSERVE_HAS_CUDA
  ASSIGN_OR_RETURN(const kernels::cuda::DeviceMemoryBytes memory,
                   kernels::cuda::QueryDeviceMemory());
  return DeviceMemory{.free = memory.free, .total = memory.total};
#else
  CHECK(false, "{} has memory of its own", backend.name());
#endif
}

// The same once nobody gives memory back any more: the driver may need seconds for that of an
// instance that has just ended. Room for the weights is waited for as long as that may take.
absl::StatusOr<DeviceMemory> QuerySteadyMemory(const kernels::Backend& backend, double utilization,
                                               int64_t weights) {
  using std::chrono::milliseconds;
  constexpr milliseconds kPatience(10000);
  constexpr milliseconds kPause(100);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  ASSIGN_OR_RETURN(DeviceMemory memory, QueryMemory(backend));
  bool told = false;
  while (std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(kPause);
    const DeviceMemory before = memory;
    ASSIGN_OR_RETURN(memory, QueryMemory(backend));
    const bool is_enough = CheckWeightsFit({.total = memory.total,
                                            .utilization = utilization,
                                            .other = memory.total - memory.free,
                                            .weights = weights})
                               .ok();
    if (memory.free <= before.free && is_enough) break;
    if (!is_enough && !told) LOG_INFO("waiting for memory of the GPU that others still hold");
    told |= !is_enough;
  }
  return memory;
}

// Weights on a backend, from files or without.
struct OpenedWeights {
  std::unique_ptr<Checkpoint> checkpoint;  // null for dummy weights; outlives the source
  std::unique_ptr<WeightSource> source;
  std::string origin;  // for the log
};

// Tells how far loading is: the events, and the log every few seconds. There a bar would be
// taken for lines; the ranks have the same to do, so that one of them tells it for all.
class ToldLoading {
 public:
  ToldLoading(const ModelConfig& config, const WeightSource& source, const Collective& group,
              const LoadEvents& events)
      : config_(config), source_(source), events_(events) {
    for (const MatrixRef& ref : AllMatrices(config)) total_bytes_ += source.BytesOf(ref);
    events_.on_bytes(0, total_bytes_);
    if (group.rank() != 0) return;
    const int world_size = group.world_size();
    log_.emplace(ProgressOptions{
        .label = world_size == 1 ? std::string(kLoadingLabel)
                                 : fmt::format("{}, rank 0 of {}", kLoadingLabel, world_size),
        .total = total_bytes_,
        .write_line = [](std::string_view line) { LOG_INFO("{}", line); }});
  }

  void OnMatrix(const MatrixRef& ref) {
    const int64_t bytes = source_.BytesOf(ref);
    done_bytes_ += bytes;
    events_.on_bytes(done_bytes_, total_bytes_);
    if (!log_.has_value()) return;
    log_->Add(bytes);
    if (ref.role != MatrixRole::kEmbedding && ref.role != MatrixRole::kHead) {
      log_->SetNote(fmt::format("layer {} of {}", ref.layer + 1, config_.num_layers));
    }
  }

 private:
  const ModelConfig& config_;
  const WeightSource& source_;
  const LoadEvents& events_;
  int64_t total_bytes_ = 0;
  int64_t done_bytes_ = 0;
  std::optional<Progress> log_;
};

// Says so when a tensor is there.
class ReportingSource final : public WeightSource {
 public:
  ReportingSource(std::unique_ptr<WeightSource> source, std::function<void()> on_progress,
                  std::function<void(const MatrixRef&)> on_matrix)
      : source_(std::move(source)),
        on_progress_(std::move(on_progress)),
        on_matrix_(std::move(on_matrix)) {}

  absl::StatusOr<std::unique_ptr<kernels::WeightMatrix>> NextMatrix(const MatrixRef& ref) override {
    auto matrix = source_->NextMatrix(ref);
    on_progress_();
    on_matrix_(ref);
    return matrix;
  }
  int64_t BytesOf(const MatrixRef& ref) const override { return source_->BytesOf(ref); }
  absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const override {
    auto vector = source_->LoadVector(role, layer);
    on_progress_();
    return vector;
  }
  bool has_router_bias() const override { return source_->has_router_bias(); }
  std::string identity() const override { return source_->identity(); }

 private:
  const std::unique_ptr<WeightSource> source_;
  const std::function<void()> on_progress_;
  const std::function<void(const MatrixRef&)> on_matrix_;
};

absl::StatusOr<OpenedWeights> OpenWeights(const ServeOptions& options, const ModelConfig& config,
                                          kernels::Backend* backend, const Collective& group) {
  OpenedWeights opened;
  if (options.load_format == "dummy") {
    opened.source = MakeDummySource(config, {.router_skew = options.dummy_router_skew}, backend,
                                    group.rank(), group.world_size());
    opened.origin = "dummy weights";
    return opened;
  }
  ASSIGN_OR_RETURN(opened.checkpoint,
                   Checkpoint::Open(options.model, config, KOrderOf(options.k_order)));
  opened.source = MakeCheckpointSource(config, *opened.checkpoint, backend, group.rank(),
                                       group.world_size(), CpuThreads(options));
  opened.origin = fmt::format("{} MiB on disk", opened.checkpoint->total_bytes() >> 20);
  return opened;
}

absl::StatusOr<std::unique_ptr<Model>> LoadWeights(const ServeOptions& options,
                                                   const ModelConfig& config,
                                                   kernels::Backend* backend, Collective* group,
                                                   const LoadEvents& events) {
  const auto begin = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(OpenedWeights opened, OpenWeights(options, config, backend, *group));
  events.on_progress();
  std::optional<ToldLoading> told(std::in_place, config, *opened.source, *group, events);
  ReportingSource source(std::move(opened.source), events.on_progress,
                         [&](const MatrixRef& ref) { told->OnMatrix(ref); });
  ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                   LoadErnie45(config, &source, backend, group->world_size() == 1 ? nullptr : group,
                               ModelOptionsOf(options)));
  told.reset();
  RETURN_IF_ERROR(backend->Record()->Wait());  // dummy weights are made behind the host's back
  LOG_INFO("loaded {} in {:.1f} s: {} layers, {}, {}", options.model,
           std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
           config.num_layers, opened.origin, backend->name());
  return model;
}

KvDemand DemandOf(const ServeOptions& options, const Model& model) {
  KvDemand demand;
  demand.block_bytes = model.kv_block_bytes();
  demand.max_model_len = std::min(options.max_model_len, model.max_position());
  demand.block_size_tokens = options.block_size;
  demand.has_8_bit_cache = options.kv_cache_dtype == "int8";
  if (options.num_gpu_blocks_override.has_value()) {
    demand.num_blocks_override = *options.num_gpu_blocks_override;
  }
  return demand;
}

int64_t GroupMemoryBytes([[maybe_unused]] int world_size) {
#ifdef WINTSERVE_HAS_CUDA
  if (world_size > 1) return NcclGroupMemoryBytes(world_size);
#endif
  return 0;
}

// What steps take beside the model.
absl::Status ProfileSteps(const ServeOptions& options, Collective* group, Model* model,
                          MemoryProfile* profile, const std::function<void()>& on_progress) {
  ASSIGN_OR_RETURN(const DeviceMemory with_model, QueryMemory(*model->backend()));
  RETURN_IF_ERROR(RunLargestBatch(model));
  ASSIGN_OR_RETURN(const DeviceMemory warm, QueryMemory(*model->backend()));
  profile->scratch = with_model.free - warm.free;
  on_progress();
  if (options.use_cudagraph) {
    ASSIGN_OR_RETURN(profile->graphs, MeasureGraphs(options, group, model));
  }
  return absl::OkStatus();
}

// Loads the model and says what is left for KV blocks.
absl::StatusOr<int64_t> LoadOnGpu(const ServeOptions& options, const ModelConfig& config,
                                  RankGroup* group, bool is_replacement, const LoadEvents& events,
                                  LoadedModel* loaded) {
  kernels::Backend* backend = loaded->backend.get();
  const int64_t weights = CudaWeightBytes(config, group->rank(), group->world_size());
  // Of a device that the pool fills to that share already, the rest is for a replacement.
  const double utilization = is_replacement ? 1 : options.gpu_memory_utilization;
  ASSIGN_OR_RETURN(const DeviceMemory at_start, QuerySteadyMemory(*backend, utilization, weights));
  MemoryProfile profile = {.total = at_start.total,
                           .utilization = utilization,
                           .other = at_start.total - at_start.free,
                           .weights = weights};
  RETURN_IF_ERROR(CheckWeightsFit(profile));
  profile.utilization = options.gpu_memory_utilization;

  ASSIGN_OR_RETURN(loaded->model, LoadWeights(options, config, backend, group, events));
  ASSIGN_OR_RETURN(const DeviceMemory with_model, QueryMemory(*backend));
  profile.workspace = loaded->model->workspace_bytes();
  profile.weights = at_start.free - with_model.free - profile.workspace;

  const KvDemand demand = DemandOf(options, *loaded->model);
  // What operators are sure to take must be there, or there is no need to try.
  profile.scratch = profile.workspace / 2 + kLeastScratchBytes;
  if (with_model.free < profile.scratch) {
    // With that, more is taken than the device has, whatever share of it is allowed.
    const absl::Status too_much = CheckKvFits(profile, demand);
    CHECK(!too_much.ok(), "free={} scratch={}", with_model.free, profile.scratch);
    return too_much;
  }
  // Ranks join their group when all of them have loaded.
  group->Bind(std::make_unique<AbsentGroup>(group->rank(), group->world_size()));
  const absl::Status profiled =
      ProfileSteps(options, group, loaded->model.get(), &profile, events.on_progress);
  group->Unbind();
  RETURN_IF_ERROR(ExplainStepsThatDoNotFit(profiled, profile));
  profile.group = GroupMemoryBytes(group->world_size());
  for (const std::string& line : DescribeMemory(profile, demand)) LOG_INFO("{}", line);
  if (is_replacement) return std::max<int64_t>(0, KvBytes(profile, demand));
  RETURN_IF_ERROR(CheckKvFits(profile, demand));
  return KvBytes(profile, demand);
}

}  // namespace

int CpuThreads(const ServeOptions& options) {
  if (options.cpu_threads > 0) return options.cpu_threads;
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, num_cores / options.tensor_parallel_size);
}

absl::StatusOr<LoadedModel> LoadModel(const ServeOptions& options, RankGroup* group,
                                      bool is_replacement, const LoadEvents& events) {
  LoadedModel loaded;
  ASSIGN_OR_RETURN(loaded.backend, CreateBackend(options, group->rank()));
  events.on_progress();
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model));
  if (const absl::Status fits = CheckTensorParallel(config, group->world_size()); !fits.ok()) {
    return absl::Status(
        fits.code(), fmt::format("{}/config.json: {}", options.model, std::string(fits.message())));
  }
  if (!loaded.backend->uses_host_memory()) {
    ASSIGN_OR_RETURN(loaded.kv_bytes_available,
                     LoadOnGpu(options, config, group, is_replacement, events, &loaded));
  } else {
    ASSIGN_OR_RETURN(loaded.model,
                     LoadWeights(options, config, loaded.backend.get(), group, events));
  }
  // What unpacking the weights took. Once: a step must not wait for the heap of a large model.
  ReturnFreeMemory();
  if (loaded.backend->uses_host_memory()) {
    ASSIGN_OR_RETURN(loaded.kv_bytes_available, AvailableMemoryBytes());
  }
  return loaded;
}

}  // namespace wintserve
