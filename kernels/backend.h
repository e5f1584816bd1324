// The one interface that a model's graph calls: the operators of a decoder on one device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/shared_memory.h"
#include "kernels/batch.h"
#include "kernels/formats/dummy_matrix.h"
#include "kernels/formats/matrix.h"
#include "kernels/operands.h"

namespace wintserve::kernels {

// Memory on the device, or on the host where the device can reach it; freed on destruction. The
// backend outlives it.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual int64_t size_bytes() const = 0;
};

// A point in the order of operators. Threading: any thread, also while operators are called.
class Event {
 public:
  virtual ~Event() = default;
  // Whether Wait() would return at once.
  virtual bool IsDone() = 0;
  // Returns when everything that was called before the event is done. INTERNAL: the device failed;
  // nothing that it computed since an event that was OK counts, and the process cannot go on with
  // it.
  virtual absl::Status Wait() = 0;
  // Device time between two events. REQUIRES: Wait() of both was OK.
  virtual int64_t MicrosecondsSince(const Event& earlier) const = 0;
};

// Operators that Backend::Capture noted, to be called again with one call of Backend::Launch.
// Ownership: the backend outlives it, and so does whatever the operators work on: batches, weights,
// buffers, a collective that is called between them. Destruction waits for the launches that are
// not done yet.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual const std::string& name() const = 0;
  // Of device memory, by what the device had free before and after; other allocations of that time
  // count.
  virtual int64_t size_bytes() const = 0;
};

// Copies beside the operators: they run in call order among themselves, and wait for operators, or
// operators for them, only where a call says so. None of the calls waits for the device. Host
// memory is that of MapHostMemory or AllocateHost. Threading: the thread that calls the backend,
// which outlives the queue.
class CopyQueue {
 public:
  virtual ~CopyQueue() = default;
  virtual void CopyFromHost(void* device, const void* host, int64_t size_bytes) = 0;
  virtual void CopyToHost(void* host, const void* device, int64_t size_bytes) = 0;
  // Copies that are called from now on come after the operators that were called before.
  virtual void WaitForOperators() = 0;
  // Operators that are called from now on come after the copies that were called before.
  virtual void HoldOperators() = 0;
  // Is done when the copies that were called before are. Not for MicrosecondsSince.
  virtual std::unique_ptr<Event> Record() = 0;
};

// A weight matrix in a layout of its backend's own. Immutable; belongs to the backend that made it.
class WeightMatrix {
 public:
  virtual ~WeightMatrix() = default;
  virtual int64_t k() const = 0;  // input features
  virtual int64_t n() const = 0;  // output features; of a gate-up matrix both halves
  virtual int64_t size_bytes() const = 0;
};

// What a pack is for: a backend may lay out the columns or rows of each differently.
enum class MatrixUse {
  kLinear,     // Linear, and the down matrix of an MLP
  kGateUp,     // columns: the gate half, then the up half
  kRouter,     // Route; float32
  kEmbedding,  // k = vocabulary rows, n = hidden; float32 or bfloat16
};

// kFastDeploy: every decoded weight is rounded to bf16 as FastDeploy's kernels do.
// kUnrounded:  code * scale as it is; for comparing backends, and what CUDA computes.
enum class WeightRounding { kFastDeploy, kUnrounded };

// One layer's share of the KV pool. A block holds [layer][K, V][kv_head][kKvBlockTokens *
// head_dim]; the type of the numbers, how the last part is ordered and what stands beside it is the
// backend's own matter, so blocks move between backends only as opaque bytes of the same kv_layout.
struct KvLayer {
  void* pool = nullptr;            // device memory
  int64_t block_stride_bytes = 0;  // from one block to the next
  int64_t layer_offset_bytes = 0;  // from a block's start to this layer
};

struct MlpWeights {
  const WeightMatrix* gate_up = nullptr;  // kGateUp
  const WeightMatrix* down = nullptr;     // kLinear
};

// The routed experts of one layer, as MoeMlp takes them. Borrows the matrices.
class ExpertGroup {
 public:
  virtual ~ExpertGroup() = default;
  virtual int num_experts() const = 0;
};

// Threading:   one thread calls; operators may run on more inside.
// Memory:      pointers in Rows, KvLayer, a batch and Route's outputs are device memory (host
// memory
//              where uses_host_memory()); spans are host memory, read before the call returns.
// Order:       operators run in call order, and so do copies, SetBatch and Sample. None of them
//              waits for the device, but for CopyToHost, CopyFromHost and SetBatch, which waits
//              when several batches before it have not been read yet, and StartSlot in the same
//              way: what a step computes reaches the host through CopyToHostAsync and an event.
//              Outputs must not overlap inputs unless an operator says so.
// Determinism: on one device type and SIMD target a row's result has the same bits in any batch and
//              with any number of threads.
// Errors:      Allocate, Pack and their like report what a machine or a file can get wrong; a wrong
//              shape in a call is our bug (CHECK). What fails on the device after a call has
//              returned is reported by Event::Wait and CopyToHost, and ends the process at the
//              latest at the next call that the device refuses.
class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu AVX3" or the like: device and instruction set, for the log.
  virtual std::string name() const = 0;
  // Names the order of a KV block's bytes; part of the KV layout digest.
  virtual std::string kv_layout() const = 0;
  // Of one layer in a block. INVALID_ARGUMENT: the backend has no attention of this shape; the
  // message names what is wrong and what is allowed.
  virtual absl::StatusOr<int64_t> KvLayerBytes(const AttentionShape& shape) const = 0;
  // INVALID_ARGUMENT: the operators do not take rows of this many columns or a router of this many
  // experts (0: none); the message names the value and what is allowed.
  virtual absl::Status CheckModel(int64_t hidden_size, int num_experts) const = 0;
  virtual WeightRounding rounding() const = 0;

  // Whether the host reads and writes device memory as its own.
  virtual bool uses_host_memory() const = 0;

  // Zeroed. RESOURCE_EXHAUSTED: no memory; the message says how much was asked for.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) = 0;
  // Host memory that asynchronous copies take without a detour. Zeroed.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> AllocateHost(int64_t size_bytes) = 0;

  // Maps memory that another process made, its parts one behind the other; its content stays as it
  // is, and none is promised. The buffer keeps the memory, whatever becomes of that process; it is
  // unmapped once the device has done what was called before. INVALID_ARGUMENT: of another kind
  // than the device's memory, or not what its sizes say. INTERNAL: the driver refuses it.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> MapDeviceMemory(SharedMemory shared) = 0;
  // The same with memory of the host, for asynchronous copies; where a device has memory of its
  // own, all of it is taken at once and locked. RESOURCE_EXHAUSTED: it cannot be.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> MapHostMemory(SharedMemory shared) = 0;
  virtual absl::StatusOr<std::unique_ptr<CopyQueue>> CreateCopyQueue() = 0;

  virtual void CopyFromHost(void* device, const void* host, int64_t size_bytes) = 0;
  virtual absl::Status CopyToHost(void* host, const void* device, int64_t size_bytes) = 0;
  // Host memory stays as it is until an event that is recorded later is done; of AllocateHost, or
  // the call may wait.
  virtual void CopyFromHostAsync(void* device, const void* host, int64_t size_bytes) = 0;
  virtual void CopyToHostAsync(void* host, const void* device, int64_t size_bytes) = 0;
  virtual std::unique_ptr<Event> Record() = 0;

  // Notes the operators that `operators` calls, without running them. Launch runs them in their
  // order, with the arguments that they were called with, on what the memory holds by then. So a
  // batch may be set anew in between, to one of the same counts: num_tokens, num_rows,
  // num_logit_rows, and the length of the longest row. `operators` may be called during Capture or
  // during each Launch, so what it refers to lives as long as the graph.
  // What the host waits for, copies, allocates, records or sets is not for a graph: only operators
  // from Embed on are, but for StartSlot, and what a collective puts between them.
  // REQUIRES: the operators were called before with the same arguments, so that what a device does
  // once is done.
  // Errors: what `operators` returns; RESOURCE_EXHAUSTED: no memory; INTERNAL: the device refuses,
  // the message names the graph.
  virtual absl::StatusOr<std::unique_ptr<Graph>> Capture(
      std::string name, std::function<absl::Status()> operators) = 0;
  // Errors: what the captured function returns, if it is called; INTERNAL: the device refuses, the
  // message names the graph.
  virtual absl::Status Launch(const Graph& graph) = 0;

  // INVALID_ARGUMENT: a shape or scale that the kernels cannot represent; the message names it.
  // RESOURCE_EXHAUSTED: no memory.
  virtual absl::StatusOr<std::unique_ptr<WeightMatrix>> Pack(const formats::HostMatrix& matrix,
                                                             MatrixUse use) = 0;
  // The same of a matrix that is made where it will lie (plan/dummy_weights.h): what Pack gives of
  // its canonical form, which no host memory needs to hold.
  virtual absl::StatusOr<std::unique_ptr<WeightMatrix>> MakeDummy(
      const formats::DummyMatrix& matrix, MatrixUse use) = 0;
  // INVALID_ARGUMENT: the experts differ in shape or format; the message names the first that does.
  virtual absl::StatusOr<std::unique_ptr<ExpertGroup>> GroupExperts(
      std::span<const MlpWeights> experts) = 0;

  // Empty; every slot's last drawn id is 0.
  virtual absl::StatusOr<std::unique_ptr<DeviceBatch>> CreateBatch(const BatchLimits& limits) = 0;
  // Puts `batch` in place of what `device` held; operators that were called before still see that.
  // REQUIRES: within the limits; a DeviceBatch of this backend.
  virtual void SetBatch(const Batch& batch, DeviceBatch* device) = 0;

  // x[t, :] = table[id of token t, :]
  virtual void Embed(const WeightMatrix& table, const DeviceBatch& batch, Rows x) = 0;

  // For each i: r = row_ids[i] (device memory), or i when row_ids is null;
  //   x[r, :] += delta[r, :]  (unless delta.data is null; written back)
  //   out[i, :] = x[r, :] / sqrt(mean(x[r, :]^2) + epsilon) * gain[:]
  virtual void AddRmsNorm(Rows x, ConstRows delta, const int32_t* row_ids, int64_t num_rows,
                          int64_t columns, const float* gain, float epsilon, Rows out) = 0;

  // y [num_rows, n] = x [num_rows, k] * w [k, n]
  virtual void Linear(ConstRows x, int64_t num_rows, const WeightMatrix& w, Rows y) = 0;

  // With p the position of token t:
  // cos_sin[t, j] = cos(a), cos_sin[t, head_dim / 2 + j] = sin(a) with
  // a = (p / compression_ratio) * theta^(-2j / head_dim), j < head_dim / 2.
  virtual void RopeAngles(const DeviceBatch& batch, int head_dim, float theta,
                          float compression_ratio, Rows cos_sin) = 0;

  // qkv [tokens, qkv_columns]: rotates adjacent pairs of q in place, writes rotated k and plain v
  // to the tokens' places in the sequences' blocks. What becomes of k in qkv is not defined.
  virtual void RopeAndAppendKv(const AttentionShape& shape, const DeviceBatch& batch,
                               ConstRows cos_sin, Rows qkv, const KvLayer& kv) = 0;

  // Causal attention of the rotated q in qkv over each sequence's blocks, positions 0 … own;
  // out [tokens, num_heads * head_dim]. Scores are scaled by 1 / sqrt(head_dim).
  virtual void Attention(const AttentionShape& shape, const DeviceBatch& batch, ConstRows qkv,
                         const KvLayer& kv, Rows out) = 0;

  // y = down(silu(gate(x)) * up(x))
  virtual void SwiGluMlp(ConstRows x, int64_t num_rows, const MlpWeights& mlp, Rows y) = 0;

  // The shared experts of the next MoeMlp may be computed from here on, beside what comes in
  // between. That is Route alone, and x, num_rows and shared are the same there. By default nothing
  // happens.
  virtual void BeginSharedExperts(ConstRows /*x*/, int64_t /*num_rows*/,
                                  const MlpWeights& /*shared*/) {}

  // P = softmax(x * router); the top_k of P + bias (float32 addition; bias may be null; the lower
  // index wins a tie), best first, to expert_ids [num_rows, top_k]; P of each, divided by
  // max(their sum, norm_min), to expert_weights [num_rows, top_k].
  // route_as: device memory [num_rows], or null; row r then takes the experts and weights of row
  // route_as[r] < num_rows.
  virtual void Route(ConstRows x, int64_t num_rows, const WeightMatrix& router, const float* bias,
                     const RouterShape& shape, int32_t* expert_ids, float* expert_weights,
                     const int32_t* route_as = nullptr) = 0;

  // y[r, :] = sum over a row's experts, in ascending order of index, of weight * mlp_e(x[r, :]),
  // then + shared(x[r, :]) unless shared is null.
  virtual void MoeMlp(ConstRows x, int64_t num_rows, const ExpertGroup& experts, int top_k,
                      const int32_t* expert_ids, const float* expert_weights,
                      const MlpWeights* shared, Rows y) = 0;

  // to[r, :] = from[r, :]
  virtual void CopyRows(ConstRows from, int64_t num_rows, int64_t columns, Rows to) = 0;

  // A new sequence, or one that is computed again, takes the slot: for batches that are set from
  // now on. Only needed before rows with logit biases or penalties.
  virtual void StartSlot(int32_t slot, const SlotSampling& sampling, DeviceBatch* batch) = 0;

  // ids[i], device memory [batch->num_logit_rows()] = the id drawn from logits[i, 0 … vocab_size -
  // 1] with the SampleParams of the i-th row that wants logits; -1 - j if the logit of j, the first
  // such id, is NaN or infinite. The same logits give the same id on every backend. Where the row
  // has penalties, the id is counted as one that its slot's sequence has generated.
  // REQUIRES: vocab_size is BatchLimits::counted_vocab_size if a row has penalties.
  virtual void Sample(ConstRows logits, int64_t vocab_size, DeviceBatch* batch, int32_t* ids) = 0;

  // For the rows whose num_top_logprobs asks for them: log-probabilities of ids[i], which Sample
  // drew from the same logits, and of the most probable ids (-1 and NaN beyond the vocabulary), as
  // the model gave them: step 2 of kernels/sampling/definition.h. Of a negative id: NaN, rank 0.
  // What is not asked for is left alone.
  virtual void Logprobs(ConstRows logits, int64_t vocab_size, const DeviceBatch& batch,
                        const int32_t* ids, const LogprobArrays& out) = 0;

  // The same for given ids, whoever's they are: log-probabilities of ids[r] >= 0, device memory
  // [num_rows], and of the num_top most probable ids (0 … kMaxTopLogprobs), from logits[r, 0 …
  // vocab_size - 1]. Of a row with a NaN or an infinity: NaN, rank 0, and -1 for top ids.
  virtual void LogprobsOfIds(ConstRows logits, int64_t num_rows, int64_t vocab_size,
                             const int32_t* ids, int num_top, const LogprobArrays& out) = 0;

  // What TokenOfSlot will stand for, from the next SetBatch on: ids[i] for the slot of the i-th row
  // that wants logits. A negative id counts as 0, so that whatever follows a failed draw is
  // defined.
  virtual void KeepIds(const int32_t* ids, DeviceBatch* batch) = 0;
};

}  // namespace wintserve::kernels
