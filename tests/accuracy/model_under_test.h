// A checkpoint on one device, run over given token ids: logits of every position, and greedy text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/model/model.h"
#include "kernels/backend.h"

namespace wintserve::accuracy {

using TokenIds = std::vector<int32_t>;

struct ModelUnderTestOptions {
  std::string model_dir;
  std::string device = "cpu";  // cpu | cuda
  // Of the CPU. A GPU does not round weights.
  kernels::WeightRounding rounding = kernels::WeightRounding::kUnrounded;
  int num_threads = 1;  // of the CPU
};

struct GreedyRequest {
  TokenIds prompt;
  int max_tokens = 0;
};

// Threading: one thread.
class ModelUnderTest {
 public:
  // Through the loader of the engine worker. UNAVAILABLE: this build or machine has no such device.
  static absl::StatusOr<std::unique_ptr<ModelUnderTest>> Load(const ModelUnderTestOptions& options);

  // Called with the logits [vocab_size] of each position of each sequence.
  using LogitSink =
      std::function<void(size_t sequence, size_t position, std::span<const float> logits)>;

  // Runs every sequence token by token, many sequences to a batch, as in decoding; then each as
  // whole prompts in chunks, on a pool that held nothing. Returns for how many sequences the last
  // position had the same bits both ways.
  absl::StatusOr<int> TeacherForce(const std::vector<TokenIds>& sequences, const LogitSink& sink);

  // Greedy continuations, all prompts in one batch, through the step runner. The stop id ends one
  // and is its last.
  absl::StatusOr<std::vector<TokenIds>> Greedy(const std::vector<GreedyRequest>& requests,
                                               int32_t stop_id);

  int vocab_size() const { return model_->vocab_size(); }
  std::string backend_name() const { return backend_->name(); }

 private:
  ModelUnderTest() = default;
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> MakePool(int64_t num_blocks);
  absl::StatusOr<std::vector<float>> Forward(const kernels::Batch& batch,
                                             kernels::DeviceBatch* device_batch, void* pool);

  std::unique_ptr<kernels::Backend> backend_;
  std::unique_ptr<Model> model_;
};

}  // namespace wintserve::accuracy
