// A model of dummy weights and its logits, for tests.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "common/check.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/dummy_source.h"

namespace wintserve {

// As deep as the 300B model, and with its formats, but narrow.
inline ModelConfig DeepConfig() {
  ModelConfig config = testing::SmallWint2Config();
  config.vocab_size = 1000;
  config.hidden_size = 256;
  config.num_layers = 54;
  config.head_dim = 64;
  config.intermediate_size = 512;
  config.max_position_embeddings = 512;
  config.num_experts = 16;
  config.num_experts_per_token = 4;
  config.moe_intermediate_size = 128;
  config.num_shared_experts = 0;
  config.moe_layer_start = 3;
  config.moe_layer_end = 53;
  config.last_wint4_layer = 6;
  return config;
}

class DummyModel {
 public:
  static constexpr int kTokens = 64;  // of a pass, one sequence; all want logits in DecodeEach

  DummyModel(const ModelConfig& config, std::unique_ptr<kernels::Backend> backend,
             const DummyWeightOptions& options = {})
      : backend_(std::move(backend)) {
    const auto source = MakeDummySource(config, options, backend_.get(), 0, 1);
    auto model = LoadErnie45(config, source.get(), backend_.get(), nullptr,
                             {.max_batch_tokens = kTokens, .max_logit_rows = kTokens});
    CHECK(model.ok(), "{}", model.status().ToString());
    model_ = *std::move(model);
    pool_ = *backend_->Allocate(kTokens * model_->kv_block_bytes());
    batch_ = *backend_->CreateBatch({.max_tokens = kTokens,
                                     .max_rows = kTokens,
                                     .max_blocks_per_row = 1,
                                     .num_slots = kTokens});
  }

  // Logits after each of kTokens sequences of one token.
  std::vector<std::vector<float>> DecodeEach(int first_token) {
    std::vector<std::vector<int32_t>> tables;
    for (int i = 0; i < kTokens; ++i) tables.push_back({i});
    kernels::Batch tokens;
    for (int i = 0; i < kTokens; ++i) {
      tokens.tokens.push_back((first_token + 7 * i) % model_->vocab_size());
      tokens.rows.push_back(
          {.position = 0, .length = 1, .block_table = tables[i], .want_logits = true, .slot = i});
    }
    return Forward(tokens);
  }

  // Logits after a sequence of kTokens tokens.
  std::vector<float> Prefill(int first_token) {
    const std::vector<int32_t> table = {3};
    kernels::Batch tokens;
    for (int i = 0; i < kTokens; ++i) {
      tokens.tokens.push_back((first_token + 7 * i) % model_->vocab_size());
    }
    tokens.rows.push_back(
        {.position = 0, .length = kTokens, .block_table = table, .want_logits = true});
    return Forward(tokens)[0];
  }

  // Distinct experts of the last pass by MoE layer.
  std::vector<int> DistinctExperts() const {
    std::vector<int> counts;
    for (int layer = 0; layer < model_->num_layers(); ++layer) {
      const RoutedExperts routed = model_->routed_experts(layer);
      if (routed.ids == nullptr) continue;
      std::vector<int32_t> ids(int64_t{kTokens} * routed.top_k);
      CHECK(backend_
                ->CopyToHost(ids.data(), routed.ids,
                             static_cast<int64_t>(ids.size() * sizeof(int32_t)))
                .ok());
      counts.push_back(static_cast<int>(std::set<int32_t>(ids.begin(), ids.end()).size()));
    }
    return counts;
  }

  const Model& model() const { return *model_; }

 private:
  std::vector<std::vector<float>> Forward(const kernels::Batch& tokens) {
    backend_->SetBatch(tokens, batch_.get());
    const auto logits = model_->Forward(*batch_, pool_->data());
    CHECK(logits.ok(), "{}", logits.status().ToString());
    std::vector<std::vector<float>> rows(batch_->num_logit_rows(),
                                         std::vector<float>(model_->vocab_size()));
    for (size_t r = 0; r < rows.size(); ++r) {
      CHECK(backend_
                ->CopyToHost(rows[r].data(), logits->row(static_cast<int64_t>(r)),
                             static_cast<int64_t>(rows[r].size() * sizeof(float)))
                .ok());
    }
    return rows;
  }

  std::unique_ptr<kernels::Backend> backend_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<kernels::Buffer> pool_;
  std::unique_ptr<kernels::DeviceBatch> batch_;
};

}  // namespace wintserve
