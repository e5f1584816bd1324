#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/mapped_memory.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "hwy/aligned_allocator.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_batch.h"
#include "kernels/cpu/logprobs.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/mlp.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/row_ops.h"
#include "kernels/cpu/sampling.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/work_split.h"
#include "kernels/plan/dummy_weights.h"

namespace wintserve::kernels::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Of a row whose draw failed.
RowLogprobs NoLogprobs() { return {.logprob = kNan, .rank = 0}; }

class HostBuffer final : public Buffer {
 public:
  static absl::StatusOr<std::unique_ptr<Buffer>> Create(int64_t size_bytes) {
    auto bytes = hwy::AllocateAligned<uint8_t>(std::max<int64_t>(size_bytes, 1));
    if (bytes == nullptr) {
      return absl::ResourceExhaustedError(fmt::format("no memory for {} bytes", size_bytes));
    }
    std::memset(bytes.get(), 0, size_bytes);
    return std::unique_ptr<Buffer>(new HostBuffer(size_bytes, std::move(bytes)));
  }
  void* data() const override { return bytes_.get(); }
  int64_t size_bytes() const override { return size_bytes_; }

 private:
  HostBuffer(int64_t size_bytes, hwy::AlignedFreeUniquePtr<uint8_t[]> bytes)
      : size_bytes_(size_bytes), bytes_(std::move(bytes)) {}

  const int64_t size_bytes_;
  const hwy::AlignedFreeUniquePtr<uint8_t[]> bytes_;
};

class MappedBuffer final : public Buffer {
 public:
  explicit MappedBuffer(MappedMemory memory) : memory_(std::move(memory)) {}
  void* data() const override { return memory_.data(); }
  int64_t size_bytes() const override { return memory_.size_bytes(); }

 private:
  const MappedMemory memory_;
};

// Operators are done when they return.
class TimeStamp final : public Event {
 public:
  bool IsDone() override { return true; }
  absl::Status Wait() override { return absl::OkStatus(); }
  int64_t MicrosecondsSince(const Event& earlier) const override {
    return std::chrono::duration_cast<std::chrono::microseconds>(
               time_ - static_cast<const TimeStamp&>(earlier).time_)
        .count();
  }

 private:
  const std::chrono::steady_clock::time_point time_ = std::chrono::steady_clock::now();
};

// Nothing is saved by it here; but what is right with graphs can be tested without a GPU.
class CallAgain final : public Graph {
 public:
  CallAgain(std::string name, std::function<absl::Status()> operators)
      : name_(std::move(name)), operators_(std::move(operators)) {}
  const std::string& name() const override { return name_; }
  int64_t size_bytes() const override { return 0; }
  absl::Status Call() const { return operators_(); }

 private:
  const std::string name_;
  const std::function<absl::Status()> operators_;
};

// Copies are done when they return, as operators are, so that none ever waits for another.
class CpuCopyQueue final : public CopyQueue {
 public:
  void CopyFromHost(void* device, const void* host, int64_t size_bytes) override {
    std::memcpy(device, host, size_bytes);
  }
  void CopyToHost(void* host, const void* device, int64_t size_bytes) override {
    std::memcpy(host, device, size_bytes);
  }
  void WaitForOperators() override {}
  void HoldOperators() override {}
  std::unique_ptr<Event> Record() override { return std::make_unique<TimeStamp>(); }
};

const PackedMatrix& Packed(const WeightMatrix& w) { return static_cast<const PackedMatrix&>(w); }
const CpuBatch& OnCpu(const DeviceBatch& batch) { return static_cast<const CpuBatch&>(batch); }

class CpuExperts final : public ExpertGroup {
 public:
  explicit CpuExperts(std::span<const MlpWeights> mlps) : mlps_(mlps.begin(), mlps.end()) {}
  int num_experts() const override { return static_cast<int>(mlps_.size()); }
  const MlpWeights& mlp(int expert) const { return mlps_[expert]; }

 private:
  const std::vector<MlpWeights> mlps_;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuBackendOptions& options)
      : rounding_(options.rounding),
        pool_(options.num_threads),
        logprob_readers_(options.num_threads) {
    scratch_.max_rows = options.max_rows;
    scratch_.threads.resize(options.num_threads);
    // A thread may get its first item long after the others.
    for (ThreadScratch& thread : scratch_.threads) {
      thread.panel_data();
      thread.tile_data(0);
    }
  }

  std::string name() const override {
    return fmt::format("cpu {}, {} threads", SimdTargetName(), pool_.num_threads());
  }
  std::string kv_layout() const override { return kKvLayoutName; }
  absl::StatusOr<int64_t> KvLayerBytes(const AttentionShape& shape) const override {
    const int group = shape.num_heads / shape.num_kv_heads;
    if (shape.head_dim % kTileColumns != 0) {
      return absl::InvalidArgumentError(
          fmt::format("head_dim {} is not supported; it must be a multiple of {}", shape.head_dim,
                      kTileColumns));
    }
    if (shape.num_heads % shape.num_kv_heads != 0 || group > kMaxQueryRows) {
      return absl::InvalidArgumentError(
          fmt::format("{} attention heads over {} KV heads are not supported; each KV head must "
                      "have the same number, at most {}",
                      shape.num_heads, shape.num_kv_heads, kMaxQueryRows));
    }
    return KvLayerFloats(shape) * static_cast<int64_t>(sizeof(float));
  }
  absl::Status CheckModel(int64_t /*hidden_size*/, int /*num_experts*/) const override {
    return absl::OkStatus();
  }
  WeightRounding rounding() const override { return rounding_; }

  bool uses_host_memory() const override { return true; }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    return HostBuffer::Create(size_bytes);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> AllocateHost(int64_t size_bytes) override {
    return HostBuffer::Create(size_bytes);
  }

  absl::StatusOr<std::unique_ptr<Buffer>> MapDeviceMemory(SharedMemory shared) override {
    return MapHostMemory(std::move(shared));
  }
  absl::StatusOr<std::unique_ptr<Buffer>> MapHostMemory(SharedMemory shared) override {
    ASSIGN_OR_RETURN(MappedMemory memory, MappedMemory::FromParts(std::move(shared)));
    return std::make_unique<MappedBuffer>(std::move(memory));
  }
  absl::StatusOr<std::unique_ptr<CopyQueue>> CreateCopyQueue() override {
    return std::make_unique<CpuCopyQueue>();
  }

  void CopyFromHost(void* device, const void* host, int64_t size_bytes) override {
    std::memcpy(device, host, size_bytes);
  }
  absl::Status CopyToHost(void* host, const void* device, int64_t size_bytes) override {
    std::memcpy(host, device, size_bytes);
    return absl::OkStatus();
  }
  void CopyFromHostAsync(void* device, const void* host, int64_t size_bytes) override {
    std::memcpy(device, host, size_bytes);
  }
  void CopyToHostAsync(void* host, const void* device, int64_t size_bytes) override {
    std::memcpy(host, device, size_bytes);
  }
  std::unique_ptr<Event> Record() override { return std::make_unique<TimeStamp>(); }

  absl::StatusOr<std::unique_ptr<Graph>> Capture(std::string name,
                                                 std::function<absl::Status()> operators) override {
    return std::make_unique<CallAgain>(std::move(name), std::move(operators));
  }
  absl::Status Launch(const Graph& graph) override {
    return static_cast<const CallAgain&>(graph).Call();
  }

  absl::StatusOr<std::unique_ptr<WeightMatrix>> Pack(const formats::HostMatrix& matrix,
                                                     MatrixUse use) override {
    if (use == MatrixUse::kEmbedding) return EmbeddingTable::Create(matrix);
    return PackedMatrix::Create(matrix, use, rounding_, &pool_);
  }
  absl::StatusOr<std::unique_ptr<WeightMatrix>> MakeDummy(const formats::DummyMatrix& matrix,
                                                          MatrixUse use) override {
    return Pack(plan::MakeDummyHostMatrix(matrix), use);
  }

  absl::StatusOr<std::unique_ptr<ExpertGroup>> GroupExperts(
      std::span<const MlpWeights> experts) override {
    const auto same = [](const WeightMatrix* a, const WeightMatrix* b) {
      return Packed(*a).format() == Packed(*b).format() && a->k() == b->k() && a->n() == b->n();
    };
    for (size_t e = 1; e < experts.size(); ++e) {
      if (!same(experts[e].gate_up, experts[0].gate_up) ||
          !same(experts[e].down, experts[0].down)) {
        return absl::InvalidArgumentError(
            fmt::format("expert {} has another shape or format than expert 0", e));
      }
    }
    return std::make_unique<CpuExperts>(experts);
  }

  absl::StatusOr<std::unique_ptr<DeviceBatch>> CreateBatch(const BatchLimits& limits) override {
    return std::make_unique<CpuBatch>(limits);
  }

  void SetBatch(const Batch& batch, DeviceBatch* device) override {
    static_cast<CpuBatch*>(device)->Set(batch);
  }

  void Embed(const WeightMatrix& table, const DeviceBatch& batch, Rows x) override {
    const auto& rows = static_cast<const EmbeddingTable&>(table);
    const std::span<const int32_t> tokens = OnCpu(batch).tokens();
    for (size_t t = 0; t < tokens.size(); ++t) {
      rows.CopyRow(tokens[t], x.row(static_cast<int64_t>(t)));
    }
  }

  void AddRmsNorm(Rows x, ConstRows delta, const int32_t* row_ids, int64_t num_rows,
                  int64_t columns, const float* gain, float epsilon, Rows out) override {
    ForRows(num_rows, num_rows * columns, [&](int64_t i) {
      const int64_t r = row_ids == nullptr ? i : row_ids[i];
      AddRmsNormRow(x.row(r), delta.data == nullptr ? nullptr : delta.row(r), columns, gain,
                    epsilon, out.row(i));
    });
  }

  void Linear(ConstRows x, int64_t num_rows, const WeightMatrix& w, Rows y) override {
    const PackedMatrix& packed = Packed(w);
    const int64_t num_tiles = packed.num_tiles();
    const int64_t item_rows = PickItemRows(num_tiles, num_rows, pool_.num_threads(), kMaxItemRows);
    pool_.Run(num_tiles * CeilDiv(num_rows, item_rows), num_rows * w.k() * w.n(),
              [&](int64_t item, int thread) {
                const int64_t first = item / num_tiles * item_rows;
                LinearItem(x, first, std::min(item_rows, num_rows - first), packed,
                           item % num_tiles, y, &scratch_.threads[thread]);
              });
  }

  void RopeAngles(const DeviceBatch& batch, int head_dim, float theta, float compression_ratio,
                  Rows cos_sin) override {
    const std::span<const int32_t> positions = OnCpu(batch).positions();
    frequencies_.resize(head_dim / 2);
    for (int j = 0; j < head_dim / 2; ++j) {
      frequencies_[j] = static_cast<float>(std::pow(double{theta}, -2.0 * j / head_dim));
    }
    // A sine costs about as much as 64 multiply-adds.
    const auto num_rows = static_cast<int64_t>(positions.size());
    ForRows(num_rows, num_rows * head_dim * 64, [&](int64_t t) {
      RopeAnglesRow(positions[t], head_dim, frequencies_.data(), compression_ratio, cos_sin.row(t));
    });
  }

  void RopeAndAppendKv(const AttentionShape& shape, const DeviceBatch& batch, ConstRows cos_sin,
                       Rows qkv, const KvLayer& kv) override {
    for (const SequenceChunk& chunk : OnCpu(batch).chunks()) {
      ForRows(chunk.length, chunk.length * shape.qkv_columns() * 4, [&](int64_t t) {
        const int64_t row = chunk.first_token + t;
        RopeAndAppendToken(shape, cos_sin.row(row), kv, chunk,
                           chunk.position + static_cast<int32_t>(t), qkv.row(row));
      });
    }
  }

  void Attention(const AttentionShape& shape, const DeviceBatch& batch, ConstRows qkv,
                 const KvLayer& kv, Rows out) override {
    const int group = shape.num_heads / shape.num_kv_heads;
    CHECK(shape.head_dim % kTileColumns == 0 && group <= kMaxQueryRows, "head_dim={} group={}",
          shape.head_dim, group);
    const int tokens_per_item = kMaxQueryRows / group;
    attention_items_.clear();
    int64_t num_keys = 0;
    for (const SequenceChunk& chunk : OnCpu(batch).chunks()) {
      // The last tokens attend to most and start first, for an even finish.
      for (int32_t end = chunk.length; end > 0; end -= tokens_per_item) {
        const int32_t first = std::max(0, end - tokens_per_item);
        num_keys += int64_t{end - first} * (chunk.position + end);
        for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
          attention_items_.push_back({&chunk, first, end - first, kv_head});
        }
      }
    }
    const int64_t multiply_adds = num_keys * shape.num_heads * shape.head_dim * 2;
    const int64_t scratch_floats = AttendScratchFloats(shape.head_dim);
    for (ThreadScratch& thread : scratch_.threads) thread.attention.Reserve(scratch_floats);
    pool_.Run(static_cast<int64_t>(attention_items_.size()), multiply_adds,
              [&](int64_t i, int thread) {
                const AttentionItem& item = attention_items_[i];
                float* scratch = scratch_.threads[thread].attention.Reserve(scratch_floats);
                AttendTokens(shape, *item.chunk, item.first, item.count, item.kv_head, qkv, kv,
                             scratch, out);
              });
  }

  void SwiGluMlp(ConstRows x, int64_t num_rows, const MlpWeights& mlp, Rows y) override {
    const MlpRun run = {&Packed(*mlp.gate_up), &Packed(*mlp.down), AllTokens(num_rows), nullptr};
    RunMlps(x, num_rows, {&run, 1}, y, &pool_, &scratch_);
  }

  void Route(ConstRows x, int64_t num_rows, const WeightMatrix& router, const float* bias,
             const RouterShape& shape, int32_t* expert_ids, float* expert_weights,
             const int32_t* route_as) override {
    CHECK(router.n() == shape.num_experts && shape.top_k <= shape.num_experts,
          "n={} num_experts={} top_k={}", router.n(), shape.num_experts, shape.top_k);
    const int64_t stride = shape.num_experts;
    float* logits = scratch_.ReserveForRows(num_rows, num_rows * stride * 2, &scratch_.logits);
    Linear(x, num_rows, router, {logits, stride});
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t source = route_as == nullptr ? r : route_as[r];
      RouteRow(logits + source * stride, bias, shape, logits + (num_rows + r) * stride,
               expert_ids + r * shape.top_k, expert_weights + r * shape.top_k);
    }
  }

  void MoeMlp(ConstRows x, int64_t num_rows, const ExpertGroup& experts, int top_k,
              const int32_t* expert_ids, const float* expert_weights, const MlpWeights* shared,
              Rows y) override {
    const auto& mlps = static_cast<const CpuExperts&>(experts);
    const auto sorted =
        sorter_.Sort(num_rows, top_k, mlps.num_experts(), expert_ids, expert_weights);
    runs_.clear();
    for (int e = 0; e < mlps.num_experts(); ++e) {
      if (sorted[e].tokens.empty()) continue;
      runs_.push_back({&Packed(*mlps.mlp(e).gate_up), &Packed(*mlps.mlp(e).down), sorted[e].tokens,
                       sorted[e].weights.data()});
    }
    if (shared != nullptr) {
      runs_.push_back(
          {&Packed(*shared->gate_up), &Packed(*shared->down), AllTokens(num_rows), nullptr});
    }
    RunMlps(x, num_rows, runs_, y, &pool_, &scratch_);
  }

  void CopyRows(ConstRows from, int64_t num_rows, int64_t columns, Rows to) override {
    for (int64_t r = 0; r < num_rows; ++r) {
      std::memcpy(to.row(r), from.row(r), columns * sizeof(float));
    }
  }

  void StartSlot(int32_t slot, const SlotSampling& sampling, DeviceBatch* batch) override {
    static_cast<CpuBatch*>(batch)->StartSlot(slot, sampling);
  }

  void Sample(ConstRows logits, int64_t vocab_size, DeviceBatch* batch, int32_t* ids) override {
    auto* const rows = static_cast<CpuBatch*>(batch);
    for (int64_t i = 0; i < rows->num_logit_rows(); ++i) {
      if (rows->is_padding(i)) continue;
      ids[i] = SampleRow({logits.row(i), static_cast<size_t>(vocab_size)}, *rows, i);
      if (ids[i] >= 0) rows->CountDrawn(i, ids[i]);
    }
  }

  void Logprobs(ConstRows logits, int64_t vocab_size, const DeviceBatch& batch, const int32_t* ids,
                const LogprobArrays& out) override {
    for (int64_t i = 0; i < batch.num_logit_rows(); ++i) {
      const int num_top = OnCpu(batch).sample(i).num_top_logprobs;
      if (num_top < 0) continue;
      const std::span row(logits.row(i), static_cast<size_t>(vocab_size));
      WriteLogprobs(ids[i] < 0 ? NoLogprobs() : *logprob_readers_[0].Read(row, ids[i], num_top),
                    num_top, out.From(i));
    }
  }

  void LogprobsOfIds(ConstRows logits, int64_t num_rows, int64_t vocab_size, const int32_t* ids,
                     int num_top, const LogprobArrays& out) override {
    constexpr int64_t kOperationsPerLogit = 20;  // mostly of its exponential
    pool_.Run(num_rows, num_rows * vocab_size * kOperationsPerLogit, [&](int64_t r, int thread) {
      const std::span row(logits.row(r), static_cast<size_t>(vocab_size));
      const absl::StatusOr<RowLogprobs> logprobs =
          logprob_readers_[thread].Read(row, ids[r], num_top);
      WriteLogprobs(logprobs.ok() ? *logprobs : NoLogprobs(), num_top, out.From(r));
    });
  }

  void KeepIds(const int32_t* ids, DeviceBatch* batch) override {
    static_cast<CpuBatch*>(batch)->KeepIds(ids);
  }

 private:
  struct AttentionItem {
    const SequenceChunk* chunk;
    int32_t first;
    int32_t count;
    int kv_head;
  };

  // fn(row) for every row, a few rows an item.
  template <typename Fn>
  void ForRows(int64_t num_rows, int64_t multiply_adds, const Fn& fn) {
    constexpr int64_t kRowsPerItem = 8;
    pool_.Run(CeilDiv(num_rows, kRowsPerItem), multiply_adds, [&](int64_t item, int /*thread*/) {
      const int64_t end = std::min((item + 1) * kRowsPerItem, num_rows);
      for (int64_t r = item * kRowsPerItem; r < end; ++r) fn(r);
    });
  }

  int32_t SampleRow(std::span<const float> logits, const CpuBatch& batch, int64_t i) {
    const SampleParams& params = batch.sample(i);
    SampleRequest request = {.temperature = params.temperature,
                             .top_p = params.top_p,
                             .top_k = params.top_k,
                             .seed = params.seed,
                             .position = params.position,
                             .choice_index = params.choice_index,
                             .min_p = params.min_p,
                             .logit_bias = batch.logit_biases(i),
                             .penalties = params.penalties,
                             .occurrences = batch.occurrences(i)};
    if (params.mask_stop_ids) request.masked_ids = batch.stop_ids();
    const absl::StatusOr<int32_t> id = sampler_.Sample(logits, request);
    if (id.ok()) return *id;
    const auto bad = std::find_if(logits.begin(), logits.end(),
                                  [](float logit) { return !std::isfinite(logit); });
    CHECK(bad != logits.end(), "{}", id.status().ToString());
    return -1 - static_cast<int32_t>(bad - logits.begin());
  }

  static void WriteLogprobs(const RowLogprobs& logprobs, int num_top, const LogprobArrays& to) {
    *to.logprobs = logprobs.logprob;
    *to.ranks = logprobs.rank;
    for (int j = 0; j < num_top; ++j) {
      const bool is_there = j < std::ssize(logprobs.top);
      to.top_ids[j] = is_there ? logprobs.top[j].id : -1;
      to.top_logprobs[j] = is_there ? logprobs.top[j].logprob : kNan;
    }
  }

  static void LinearItem(ConstRows x, int64_t first, int64_t rows, const PackedMatrix& w,
                         int64_t tile, Rows y, ThreadScratch* scratch) {
    for (int64_t r = 0; r < rows; ++r) scratch->x_rows[r] = x.row(first + r);
    const int64_t column = tile * kTileColumns;
    float* y_tile = y.row(first) + column;
    if (column + kTileColumns <= w.n()) {
      MatmulTile(w, tile, scratch->x_rows, rows, scratch->panel_data(), y_tile, y.stride);
      return;
    }
    float* out = scratch->tile_data(0);
    MatmulTile(w, tile, scratch->x_rows, rows, scratch->panel_data(), out, kTileColumns);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(y_tile + r * y.stride, out + r * kTileColumns, (w.n() - column) * sizeof(float));
    }
  }

  // 0 … num_rows - 1
  std::span<const int32_t> AllTokens(int64_t num_rows) {
    for (auto t = static_cast<int32_t>(all_tokens_.size()); t < num_rows; ++t) {
      all_tokens_.push_back(t);
    }
    return std::span(all_tokens_).first(num_rows);
  }

  const WeightRounding rounding_;
  ThreadPool pool_;
  Scratch scratch_;
  ExpertSorter sorter_;
  std::vector<MlpRun> runs_;
  std::vector<AttentionItem> attention_items_;
  std::vector<int32_t> all_tokens_;
  std::vector<float> frequencies_;
  Sampler sampler_;
  std::vector<LogprobReader> logprob_readers_;  // by thread
};

}  // namespace

std::unique_ptr<Backend> CreateCpuBackend(const CpuBackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace wintserve::kernels::cpu
