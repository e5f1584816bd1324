#include "kernels/cuda/cuda_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/copy_queue.h"
#include "kernels/cuda/cuda_batch.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_graph.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/matmul/matmul.h"
#include "kernels/cuda/recorded_event.h"
#include "kernels/cuda/rows/float_product.h"
#include "kernels/cuda/rows/row_kernels.h"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/shared_memory.h"
#include "kernels/cuda/side_stream.h"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {
namespace {

constexpr std::array<int, 2> kHeadDims = {64, 128};
// Shared experts of more rows keep the device busy, and are launched behind the others.
constexpr int64_t kMaxSideRows = plan::kBlockTokens;
constexpr int64_t kFloatPassRows = 4096;  // of a float32 product, so that its scratch is bounded

class DeviceMemory final : public kernels::Buffer {
 public:
  explicit DeviceMemory(DeviceBuffer buffer) : buffer_(std::move(buffer)) {}
  void* data() const override { return buffer_.data(); }
  int64_t size_bytes() const override { return buffer_.size_bytes(); }

 private:
  const DeviceBuffer buffer_;
};

class HostMemory final : public kernels::Buffer {
 public:
  explicit HostMemory(PinnedBuffer buffer) : buffer_(std::move(buffer)) {}
  void* data() const override { return buffer_.data(); }
  int64_t size_bytes() const override { return buffer_.size_bytes(); }

 private:
  const PinnedBuffer buffer_;
};

const CudaBatch& BatchOf(const DeviceBatch& batch) { return static_cast<const CudaBatch&>(batch); }

SequenceArrays SequencesOf(const CudaBatch& batch) {
  const plan::BatchArrays& arrays = batch.arrays();
  return {.num_sequences = static_cast<int32_t>(batch.num_rows()),
          .num_tokens = static_cast<int32_t>(batch.num_tokens()),
          .first_token = arrays.row_first_tokens,
          .position = arrays.row_positions,
          .length = arrays.row_lengths,
          .token_sequence = arrays.token_rows,
          .block_tables = arrays.block_tables,
          .block_table_stride = arrays.block_table_stride};
}

DeviceKvLayer LayerOf(const KvLayer& kv) {
  return {static_cast<unsigned char*>(kv.pool), kv.block_stride_bytes, kv.layer_offset_bytes};
}

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const CudaBackendOptions& options) {
    ASSIGN_OR_RETURN(const DeviceProperties device, UseDevice(options.device));
    ASSIGN_OR_RETURN(Stream stream, CreateStream());
    auto backend =
        std::unique_ptr<CudaBackend>(new CudaBackend(options, device, std::move(stream)));
    RETURN_IF_ERROR(backend->PrepareKernels());
    ASSIGN_OR_RETURN(backend->side_, SideStream::Create());
    return backend;
  }

  std::string name() const override {
    return fmt::format("cuda {} ({}.{})", device_.name, device_.compute_capability_major,
                       device_.compute_capability_minor);
  }
  std::string kv_layout() const override { return plan::KvLayoutName(options_.kv_cache); }
  absl::StatusOr<int64_t> KvLayerBytes(const AttentionShape& shape) const override {
    if (std::find(kHeadDims.begin(), kHeadDims.end(), shape.head_dim) == kHeadDims.end()) {
      return absl::InvalidArgumentError(fmt::format(
          "head_dim {} is not supported on cuda; it must be 64 or 128", shape.head_dim));
    }
    if (shape.num_heads % shape.num_kv_heads != 0) {
      return absl::InvalidArgumentError(
          fmt::format("{} attention heads over {} KV heads are not supported; each KV head must "
                      "have the same number",
                      shape.num_heads, shape.num_kv_heads));
    }
    return plan::KvLayerBytes(options_.kv_cache, shape.num_kv_heads, shape.head_dim);
  }
  absl::Status CheckModel(int64_t hidden_size, int num_experts) const override {
    // Rows that are no whole vectors are read one number at a time.
    const int64_t max_hidden = hidden_size % 4 == 0 ? kMaxNormColumns : kMaxNormColumns / 4;
    if (hidden_size > max_hidden) {
      return absl::InvalidArgumentError(
          fmt::format("hidden_size {} is not supported on cuda; at most {}{}", hidden_size,
                      max_hidden, hidden_size % 4 == 0 ? "" : " where it is no multiple of 4"));
    }
    constexpr int kMaxModelExperts = std::min<int>(plan::kMaxExperts, kMaxRoutedExperts);
    if (num_experts > kMaxModelExperts) {
      return absl::InvalidArgumentError(fmt::format(
          "{} experts are not supported on cuda; at most {}", num_experts, kMaxModelExperts));
    }
    return absl::OkStatus();
  }
  WeightRounding rounding() const override { return WeightRounding::kUnrounded; }

  bool uses_host_memory() const override { return false; }

  absl::StatusOr<std::unique_ptr<kernels::Buffer>> Allocate(int64_t size_bytes) override {
    ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Allocate(size_bytes));
    if (size_bytes > 0) {
      CUDA_CALL(cudaMemsetAsync, buffer.data(), 0, static_cast<size_t>(size_bytes), stream());
    }
    return std::make_unique<DeviceMemory>(std::move(buffer));
  }
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> AllocateHost(int64_t size_bytes) override {
    ASSIGN_OR_RETURN(PinnedBuffer buffer, PinnedBuffer::Allocate(size_bytes));
    if (size_bytes > 0) std::memset(buffer.data(), 0, static_cast<size_t>(size_bytes));
    return std::make_unique<HostMemory>(std::move(buffer));
  }

  absl::StatusOr<std::unique_ptr<kernels::Buffer>> MapDeviceMemory(SharedMemory shared) override {
    return MapGpuMemory(std::move(shared));
  }
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> MapHostMemory(SharedMemory shared) override {
    const auto on_threads = [&](int64_t num_items, absl::FunctionRef<void(int64_t)> item) {
      host_threads_.Run(num_items, std::numeric_limits<int64_t>::max(),
                        [&](int64_t i, int /*thread*/) { item(i); });
    };
    return MapAndLockHostMemory(std::move(shared), on_threads);
  }
  absl::StatusOr<std::unique_ptr<CopyQueue>> CreateCopyQueue() override {
    return cuda::CreateCopyQueue(stream());
  }

  void CopyFromHost(void* device, const void* host, int64_t size_bytes) override {
    CopyFromHostAsync(device, host, size_bytes);
    CUDA_CALL(cudaStreamSynchronize, stream());
  }
  absl::Status CopyToHost(void* host, const void* device, int64_t size_bytes) override {
    CopyToHostAsync(host, device, size_bytes);
    RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream()), "copying to the host"));
    return no_scratch_;
  }
  void CopyFromHostAsync(void* device, const void* host, int64_t size_bytes) override {
    CUDA_CALL(cudaMemcpyAsync, device, host, static_cast<size_t>(size_bytes),
              cudaMemcpyHostToDevice, stream());
  }
  void CopyToHostAsync(void* host, const void* device, int64_t size_bytes) override {
    CUDA_CALL(cudaMemcpyAsync, host, device, static_cast<size_t>(size_bytes),
              cudaMemcpyDeviceToHost, stream());
  }
  std::unique_ptr<kernels::Event> Record() override {
    return RecordEvent(stream(), EventTiming::kOn, no_scratch_);
  }

  absl::StatusOr<std::unique_ptr<Graph>> Capture(std::string name,
                                                 std::function<absl::Status()> operators) override {
    RETURN_IF_ERROR(no_scratch_);
    return CudaGraph::Capture(std::move(name), operators, stream(),
                              {scratch_.buffer(), mlp_scratch_.buffer(), side_scratch_.buffer()});
  }
  absl::Status Launch(const Graph& graph) override {
    RETURN_IF_ERROR(no_scratch_);
    return static_cast<const CudaGraph&>(graph).Launch();
  }

  absl::StatusOr<std::unique_ptr<WeightMatrix>> Pack(const formats::HostMatrix& matrix,
                                                     MatrixUse use) override {
    return CudaMatrix::Create(matrix, use, &weight_arena_, &host_threads_, &code_line_errors_,
                              stream());
  }
  absl::StatusOr<std::unique_ptr<WeightMatrix>> MakeDummy(const formats::DummyMatrix& matrix,
                                                          MatrixUse use) override {
    return CudaMatrix::MakeDummy(matrix, use, &weight_arena_, stream());
  }
  absl::StatusOr<std::unique_ptr<ExpertGroup>> GroupExperts(
      std::span<const MlpWeights> experts) override {
    return CudaExperts::Create(experts);
  }

  absl::StatusOr<std::unique_ptr<DeviceBatch>> CreateBatch(const BatchLimits& limits) override {
    ReportCodeLineErrors();
    return CudaBatch::Create(limits, stream());
  }
  void SetBatch(const Batch& batch, DeviceBatch* device) override {
    static_cast<CudaBatch*>(device)->Set(batch);
  }

  void Embed(const WeightMatrix& table, const DeviceBatch& batch, Rows x) override {
    const CudaMatrix& rows = OnCuda(table);
    CHECK(rows.use() == MatrixUse::kEmbedding);
    LaunchEmbed({.table = rows.data(),
                 .is_bfloat16 = rows.format() == formats::WeightFormat::kBfloat16,
                 .vocab_size = rows.k(),
                 .columns = rows.n(),
                 .tokens = BatchOf(batch).arrays().tokens,
                 .num_tokens = batch.num_tokens(),
                 .x = x},
                stream());
  }

  void AddRmsNorm(Rows x, ConstRows delta, const int32_t* row_ids, int64_t num_rows,
                  int64_t columns, const float* gain, float epsilon, Rows out) override {
    LaunchAddRmsNorm({.x = x,
                      .delta = delta,
                      .row_ids = row_ids,
                      .num_rows = num_rows,
                      .columns = columns,
                      .gain = gain,
                      .epsilon = epsilon,
                      .out = out},
                     stream());
  }

  void Linear(ConstRows x, int64_t num_rows, const WeightMatrix& w, Rows y) override {
    if (num_rows == 0) return;
    const CudaMatrix& matrix = OnCuda(w);
    if (matrix.layout() == CudaMatrix::Layout::kRows) {
      FloatLinear(x, num_rows, matrix, y);
      return;
    }
    const int64_t workspace_bytes = matrix.workspace().Bytes(num_rows, [&](int64_t max_rows) {
      return LinearWorkspaceBytes(matmul_, matrix.packed().layout, max_rows);
    });
    if (!Reserve(&scratch_, workspace_bytes)) return;
    LaunchLinear(matmul_, {.x = x, .num_rows = num_rows, .w = &matrix.packed(), .y = y},
                 scratch_.data(), stream());
  }

  void RopeAngles(const DeviceBatch& batch, int head_dim, float theta, float compression_ratio,
                  Rows cos_sin) override {
    LaunchRopeAngles({.positions = BatchOf(batch).arrays().positions,
                      .num_tokens = batch.num_tokens(),
                      .head_dim = head_dim,
                      .theta = theta,
                      .compression_ratio = compression_ratio,
                      .cos_sin = cos_sin},
                     stream());
  }

  void RopeAndAppendKv(const AttentionShape& shape, const DeviceBatch& batch, ConstRows cos_sin,
                       Rows qkv, const KvLayer& kv) override {
    LaunchRopeAndAppendKv({.kind = options_.kv_cache,
                           .sequences = SequencesOf(BatchOf(batch)),
                           .num_heads = shape.num_heads,
                           .num_kv_heads = shape.num_kv_heads,
                           .head_dim = shape.head_dim,
                           .kv = LayerOf(kv),
                           .cos_sin = cos_sin.data,
                           .cos_sin_stride = cos_sin.stride,
                           .qkv = qkv.data,
                           .qkv_stride = qkv.stride},
                          stream());
  }

  void Attention(const AttentionShape& shape, const DeviceBatch& batch, ConstRows qkv,
                 const KvLayer& kv, Rows out) override {
    LaunchAttention(SetupFor(shape.head_dim),
                    {.sequences = SequencesOf(BatchOf(batch)),
                     .max_length = BatchOf(batch).max_row_length(),
                     .num_heads = shape.num_heads,
                     .num_kv_heads = shape.num_kv_heads,
                     .kv = LayerOf(kv),
                     .qkv = qkv.data,
                     .qkv_stride = qkv.stride,
                     .out = out.data,
                     .out_stride = out.stride,
                     .scratch = attention_scratch_},
                    stream());
  }

  void SwiGluMlp(ConstRows x, int64_t num_rows, const MlpWeights& mlp, Rows y) override {
    if (num_rows == 0) return;
    const CudaMatrix& gate_up = OnCuda(*mlp.gate_up);
    const CudaMatrix& down = OnCuda(*mlp.down);
    if (gate_up.layout() == CudaMatrix::Layout::kPacked &&
        down.layout() == CudaMatrix::Layout::kPacked) {
      const DeviceMlp packed = PackedMlp(mlp);
      const int64_t workspace_bytes = gate_up.workspace().Bytes(num_rows, [&](int64_t max_rows) {
        return SwiGluMlpWorkspaceBytes(matmul_, packed, max_rows);
      });
      if (!Reserve(&scratch_, workspace_bytes)) return;
      LaunchSwiGluMlp(matmul_, {.x = x, .num_rows = num_rows, .mlp = &packed, .y = y},
                      scratch_.data(), stream());
      return;
    }
    const int64_t width = down.k();
    if (!Reserve(&mlp_scratch_, num_rows * 3 * width * static_cast<int64_t>(sizeof(float)))) return;
    auto* gate_up_out = static_cast<float*>(mlp_scratch_.data());
    float* activations = gate_up_out + num_rows * 2 * width;
    Linear(x, num_rows, gate_up, {gate_up_out, 2 * width});
    LaunchSwiGlu({gate_up_out, 2 * width}, num_rows, width, {activations, width}, stream());
    Linear({activations, width}, num_rows, down, y);
  }

  void BeginSharedExperts(ConstRows x, int64_t num_rows, const MlpWeights& shared) override {
    const DeviceMlp mlp = PackedMlp(shared);
    const int64_t columns = mlp.down.layout.n;
    const int64_t workspace_bytes =
        OnCuda(*shared.gate_up).workspace().Bytes(kMaxSideRows, [&](int64_t max_rows) {
          return SwiGluMlpWorkspaceBytes(matmul_, mlp, max_rows);
        });
    const int64_t out_bytes = kMaxSideRows * columns * static_cast<int64_t>(sizeof(float));
    // Also for more rows, which come before a graph of few is captured.
    if (!Reserve(&side_scratch_, workspace_bytes + out_bytes)) return;
    if (num_rows == 0 || num_rows > kMaxSideRows) return;
    shared_out_ =
        reinterpret_cast<float*>(static_cast<uint8_t*>(side_scratch_.data()) + workspace_bytes);
    side_.Fork(stream());
    LaunchSwiGluMlp(matmul_,
                    {.x = x,
                     .num_rows = num_rows,
                     .mlp = &mlp,
                     .y = {shared_out_, columns},
                     .overlaps_previous = false},
                    side_scratch_.data(), side_.get());
  }

  void Route(ConstRows x, int64_t num_rows, const WeightMatrix& router, const float* bias,
             const RouterShape& shape, int32_t* expert_ids, float* expert_weights,
             const int32_t* route_as) override {
    const CudaMatrix& matrix = OnCuda(router);
    CHECK(matrix.use() == MatrixUse::kRouter && matrix.n() == shape.num_experts,
          "n={} num_experts={}", matrix.n(), shape.num_experts);
    // Only batches that are padded have it, and those are short.
    CHECK(route_as == nullptr || num_rows <= kFloatPassRows, "num_rows={}", num_rows);
    for (int64_t first = 0; first < num_rows; first += kFloatPassRows) {
      const int64_t rows = std::min(kFloatPassRows, num_rows - first);
      const int64_t n = matrix.n();
      const plan::FloatProductPlan plan = PlanFor(rows, matrix);
      if (!ReserveFloatScratch(num_rows, matrix)) return;
      auto* logits = static_cast<float*>(scratch_.data());
      LaunchFloatProduct(
          plan, ProductOf({x.row(first), x.stride}, rows, matrix, {logits, n}, logits), stream());
      LaunchSelectExperts({.logits = logits,
                           .num_sums = plan.num_sums,
                           .sums_per_section = plan.sums_per_section(),
                           .num_rows = rows,
                           .route_as = route_as,
                           .bias = bias,
                           .shape = shape,
                           .expert_ids = expert_ids + first * shape.top_k,
                           .expert_weights = expert_weights + first * shape.top_k},
                          stream());
    }
  }

  void MoeMlp(ConstRows x, int64_t num_rows, const ExpertGroup& experts, int top_k,
              const int32_t* expert_ids, const float* expert_weights, const MlpWeights* shared,
              Rows y) override {
    if (num_rows == 0) return;
    const auto& group = static_cast<const CudaExperts&>(experts);
    DeviceMlp packed_shared;
    if (shared != nullptr) packed_shared = PackedMlp(*shared);
    const DeviceMlp* shared_mlp = shared == nullptr ? nullptr : &packed_shared;
    const int64_t workspace_bytes = group.workspace().Bytes(num_rows, [&](int64_t max_rows) {
      return MoeMlpWorkspaceBytes(matmul_, *group.mlps().front(), group.num_experts(), top_k,
                                  shared_mlp, max_rows);
    });
    const float* shared_out = std::exchange(shared_out_, nullptr);
    if (!Reserve(&scratch_, workspace_bytes)) return;
    LaunchMoeMlp(matmul_,
                 {.x = x,
                  .num_rows = num_rows,
                  .experts = group.mlps(),
                  .top_k = top_k,
                  .expert_ids = expert_ids,
                  .expert_weights = expert_weights,
                  .shared = shared_out != nullptr ? nullptr : shared_mlp,
                  .shared_out = shared_out,
                  .side = shared_out != nullptr ? &side_ : nullptr,
                  .y = y},
                 scratch_.data(), stream());
  }

  void CopyRows(ConstRows from, int64_t num_rows, int64_t columns, Rows to) override {
    if (num_rows == 0) return;
    CUDA_CALL(cudaMemcpy2DAsync, to.data, to.stride * sizeof(float), from.data,
              from.stride * sizeof(float), columns * sizeof(float), static_cast<size_t>(num_rows),
              cudaMemcpyDeviceToDevice, stream());
  }

  void StartSlot(int32_t slot, const SlotSampling& sampling, DeviceBatch* batch) override {
    static_cast<CudaBatch*>(batch)->StartSlot(slot, sampling);
  }

  void Sample(ConstRows logits, int64_t vocab_size, DeviceBatch* batch, int32_t* ids) override {
    if (!no_scratch_.ok()) return;  // no logits: the ids stay some that the vocabulary has
    const CudaBatch& rows = BatchOf(*batch);
    CHECK(!rows.has_penalties() || vocab_size == rows.counted_vocab_size(),
          "vocab_size={} counted_vocab_size={}", vocab_size, rows.counted_vocab_size());
    LaunchSampling({.logits = logits.data,
                    .logits_stride = logits.stride,
                    .num_rows = static_cast<int32_t>(batch->num_logit_rows()),
                    .vocabulary = static_cast<int32_t>(vocab_size),
                    .rows = rows.sampling_rows(),
                    .stop_ids = rows.stop_ids(),
                    .num_stop_ids = static_cast<int32_t>(rows.num_stop_ids()),
                    .logit_bias = rows.logit_biases(),
                    .logit_bias_stride = sampling::kMaxLogitBiases,
                    .token_counts = rows.token_counts(),
                    .token_counts_stride = rows.token_counts_stride(),
                    .ids = ids},
                   sampling_, stream());
  }

  void Logprobs(ConstRows logits, int64_t vocab_size, const DeviceBatch& batch, const int32_t* ids,
                const LogprobArrays& out) override {
    const CudaBatch& rows = BatchOf(batch);
    if (!rows.wants_logprobs()) return;
    LaunchLogprobs({.logits = logits.data,
                    .logits_stride = logits.stride,
                    .num_rows = static_cast<int32_t>(batch.num_logit_rows()),
                    .vocabulary = static_cast<int32_t>(vocab_size),
                    .rows = rows.sampling_rows(),
                    .ids = ids,
                    .logprobs = out.logprobs,
                    .ranks = out.ranks,
                    .top_ids = out.top_ids,
                    .top_logprobs = out.top_logprobs,
                    .top_stride = sampling::kMaxTopLogprobs},
                   sampling_, stream());
  }

  void LogprobsOfIds(ConstRows logits, int64_t num_rows, int64_t vocab_size, const int32_t* ids,
                     int num_top, const LogprobArrays& out) override {
    LaunchLogprobs({.logits = logits.data,
                    .logits_stride = logits.stride,
                    .num_rows = static_cast<int32_t>(num_rows),
                    .vocabulary = static_cast<int32_t>(vocab_size),
                    .num_top = num_top,
                    .ids = ids,
                    .logprobs = out.logprobs,
                    .ranks = out.ranks,
                    .top_ids = out.top_ids,
                    .top_logprobs = out.top_logprobs,
                    .top_stride = sampling::kMaxTopLogprobs},
                   sampling_, stream());
  }

  void KeepIds(const int32_t* ids, DeviceBatch* batch) override {
    static_cast<CudaBatch*>(batch)->KeepIds(ids);
  }

  cudaStream_t stream() const { return stream_.get(); }

 private:
  CudaBackend(const CudaBackendOptions& options, const DeviceProperties& device, Stream stream)
      : options_(options),
        device_(device),
        stream_(std::move(stream)),
        matmul_(MatmulOptionsFor(device.num_multiprocessors, device.compute_capability())),
        host_threads_(options.num_host_threads) {}

  absl::Status PrepareKernels() {
    InitMatmul();
    sampling_ = PrepareSampling();
    for (size_t i = 0; i < kHeadDims.size(); ++i) {
      attention_setups_[i] = PrepareAttention(options_.kv_cache, kHeadDims[i]);
    }
    const int32_t num_arrivals =
        std::max(NumAttentionArrivals(kAttentionPartialsBytes, kHeadDims[0]),
                 NumAttentionArrivals(kAttentionPartialsBytes, kHeadDims[1]));
    ASSIGN_OR_RETURN(attention_partials_, DeviceBuffer::Allocate(kAttentionPartialsBytes));
    ASSIGN_OR_RETURN(attention_arrivals_,
                     DeviceBuffer::Allocate(num_arrivals * static_cast<int64_t>(sizeof(int32_t))));
    CUDA_CALL(cudaMemsetAsync, attention_arrivals_.data(), 0,
              static_cast<size_t>(attention_arrivals_.size_bytes()), stream());
    attention_scratch_ = {.partials = attention_partials_.data<float>(),
                          .partials_bytes = attention_partials_.size_bytes(),
                          .arrivals = attention_arrivals_.data<int32_t>(),
                          .num_arrivals = num_arrivals};
    return absl::OkStatus();
  }

  const AttentionSetup& SetupFor(int head_dim) const {
    const auto found = std::find(kHeadDims.begin(), kHeadDims.end(), head_dim);
    CHECK(found != kHeadDims.end(), "head_dim={}", head_dim);
    return attention_setups_[found - kHeadDims.begin()];
  }

  plan::FloatProductPlan PlanFor(int64_t num_rows, const CudaMatrix& w) const {
    return plan::PlanFloatProduct(num_rows, w.k(), w.n(), device_.num_multiprocessors);
  }

  static FloatProductArgs ProductOf(ConstRows x, int64_t num_rows, const CudaMatrix& w, Rows y,
                                    float* partials) {
    return {.x = x,
            .num_rows = num_rows,
            .w = static_cast<const float*>(w.data()),
            .k = w.k(),
            .n = w.n(),
            .y = y,
            .partials = partials};
  }

  // Whether the scratch memory is so large now. If not there is no room on the device, and from
  // then on no operator that needs any runs, whose results others would take for indices: steps
  // fail.
  bool Reserve(Scratch* scratch, int64_t size_bytes) {
    if (no_scratch_.ok()) no_scratch_ = scratch->Reserve(size_bytes, stream());
    return no_scratch_.ok();
  }

  // For products of up to num_rows rows with `w`, in passes; a smaller number may need more.
  bool ReserveFloatScratch(int64_t num_rows, const CudaMatrix& w) {
    const int64_t bytes = w.workspace().Bytes(num_rows, [&](int64_t max_rows) {
      int64_t floats = 0;
      for (int64_t rows = 1; rows <= std::min(max_rows, kFloatPassRows); ++rows) {
        floats =
            std::max({floats, rows * w.n(), plan::FloatPartials(PlanFor(rows, w), rows, w.n())});
      }
      return floats * static_cast<int64_t>(sizeof(float));
    });
    return Reserve(&scratch_, bytes);
  }

  void FloatLinear(ConstRows x, int64_t num_rows, const CudaMatrix& w, Rows y) {
    for (int64_t first = 0; first < num_rows; first += kFloatPassRows) {
      const int64_t rows = std::min(kFloatPassRows, num_rows - first);
      const plan::FloatProductPlan plan = PlanFor(rows, w);
      if (!ReserveFloatScratch(num_rows, w)) return;
      auto* partials = static_cast<float*>(scratch_.data());
      const Rows y_rows = {y.row(first), y.stride};
      LaunchFloatProduct(plan, ProductOf({x.row(first), x.stride}, rows, w, y_rows, partials),
                         stream());
      if (plan.is_split()) LaunchAddPartials(plan, partials, rows, w.n(), y_rows, stream());
    }
  }

  void ReportCodeLineErrors() {
    if (code_line_errors_.num_columns == 0) return;
    LOG_INFO(
        "{} WINT2 columns have no exact integer map: {} of their codes are ties that round "
        "the other way",
        code_line_errors_.num_columns, code_line_errors_.num_bytes);
    code_line_errors_ = {};
  }

  const CudaBackendOptions options_;
  const DeviceProperties device_;
  const Stream stream_;
  const MatmulOptions matmul_;
  plan::SamplingDevice sampling_;
  std::array<AttentionSetup, kHeadDims.size()> attention_setups_;
  DeviceBuffer attention_partials_;
  DeviceBuffer attention_arrivals_;
  AttentionScratch attention_scratch_;
  WeightArena weight_arena_;
  Scratch scratch_;
  // Of BeginSharedExperts: its scratch memory, the last part of which the next MoeMlp takes.
  SideStream side_;
  Scratch side_scratch_;
  float* shared_out_ = nullptr;
  Scratch mlp_scratch_;      // beside scratch_, for an MLP that is made of two linear layers
  absl::Status no_scratch_;  // the first failure to get some
  cpu::ThreadPool host_threads_;
  plan::CodeLineErrors code_line_errors_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options) {
  return CudaBackend::Create(options);
}

cudaStream_t StreamOf(const Backend& backend) {
  return static_cast<const CudaBackend&>(backend).stream();
}

}  // namespace wintserve::kernels::cuda
