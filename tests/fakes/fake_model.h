// A model for tests of everything around a model.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine_worker/collectives/collective.h"
#include "engine_worker/model/model.h"
#include "kernels/backend.h"

namespace wintserve::testing_fakes {

// Keeps the tokens themselves in the KV pool and derives logits from the whole history that it
// reads back through the block table: a wrong block, position or token changes every later token.
// One block: int32 [kBlockTokens], each token + 1.
class FakeModel : public Model {
 public:
  static constexpr int kBlockTokens = 64;
  static constexpr int kVocabSize = 1000;

  // collective: joined once a forward pass, as a real model does; logits on its rank 0 only.
  // max_logit_rows: 0: as many as tokens.
  explicit FakeModel(Collective* collective, int max_batch_tokens = 512, int max_logit_rows = 0);

  kernels::Backend* backend() const override { return backend_.get(); }
  int vocab_size() const override { return kVocabSize; }
  int num_layers() const override { return 1; }
  int max_position() const override { return 4096; }
  int64_t kv_block_bytes() const override { return kBlockTokens * sizeof(int32_t); }
  uint64_t kv_layout_digest() const override { return 1; }
  uint64_t weights_digest() const override { return 2; }
  int max_batch_tokens() const override { return max_batch_tokens_; }
  int max_logit_rows() const override { return max_logit_rows_; }

  absl::StatusOr<kernels::ConstRows> TokenLogits(int64_t first_token, int64_t num_tokens) override;

  // INTERNAL: a history has a hole, as if a position had never been written.
  absl::StatusOr<kernels::ConstRows> Forward(const kernels::DeviceBatch& batch,
                                             void* kv_pool) override;

  // Of the last forward pass: [rows that wanted logits, kVocabSize].
  std::span<const float> logits() const { return logits_; }
  // What the model gives after these tokens: [kVocabSize].
  static std::vector<float> LogitsAfter(std::span<const int32_t> tokens);
  int num_forwards() const { return num_forwards_; }
  int64_t num_token_logits() const { return num_token_logits_; }  // rows of all TokenLogits
  // Of all forward passes.
  int64_t num_padding_rows() const { return num_padding_rows_; }
  // From now on every logit is NaN.
  void BreakLogits() { broken_ = true; }

 private:
  absl::Status JoinCollective();

  const std::unique_ptr<kernels::Backend> backend_;  // of the CPU
  Collective* const collective_;
  const int max_batch_tokens_;
  const int max_logit_rows_;
  int num_forwards_ = 0;
  int64_t num_token_logits_ = 0;
  int64_t num_padding_rows_ = 0;
  bool broken_ = false;
  std::vector<float> logits_;
  // Of the last pass, by token: a hash of the sequence up to it, and whether its logits were given.
  std::vector<uint64_t> histories_;
  std::vector<bool> has_logits_;
  std::vector<float> token_logits_;
};

}  // namespace wintserve::testing_fakes
