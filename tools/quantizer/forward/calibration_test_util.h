// A small random checkpoint, token sequences and encoders for tests of calibration.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "engine_worker/model/ernie45.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/layout.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/forward/calibrated_quantizer.h"

namespace wintserve::quantizer {

// One dense and two MoE layers with a shared expert; every matrix comes in the tiles of WINT2.
inline ModelConfig SmallMoeConfig() {
  ModelConfig config = testing::SmallConfig();
  config.vocab_size = 160;
  config.head_dim = 32;
  config.intermediate_size = 256;
  config.num_experts = 4;
  config.num_experts_per_token = 2;
  config.moe_intermediate_size = 128;
  return config;
}

// The formats of its quantised form: experts wint4 in layer 1 and wint2 in layer 2, dense wint8.
inline ModelConfig SmallQuantizedConfig() {
  ModelConfig config = SmallMoeConfig();
  config.dense_is_wint8 = true;
  config.expert_quantization = ExpertQuantization::kW4W2;
  config.last_wint4_layer = 1;
  return config;
}

inline StoredFormat FormatOf(const ModelConfig& config, const MatrixRef& ref) {
  return DescribeMatrix(CanonicalLayout(config), config, ref).parts.front().stored.format;
}

// Weights of bf16 whose products keep the size of what they are multiplied with.
class SmallCheckpoint {
 public:
  // zero_token: its embedding is all zero; -1: none.
  explicit SmallCheckpoint(const ModelConfig& config, uint32_t seed = 1, int zero_token = -1)
      : config_(config) {
    testing::TestTensors tensors =
        testing::MakeTensors(config, testing::TestLayout::kHuggingFace, seed);
    for (auto& [name, tensor] : tensors) {
      // A bias of the size of the probabilities, so that every expert has tokens.
      const bool is_bias = name.find("e_score_correction_bias") != std::string::npos;
      if (zero_token >= 0 && name.find("embed_tokens") != std::string::npos) {
        const int64_t row_bytes = std::ssize(tensor.bytes) / config.vocab_size;
        std::fill_n(tensor.bytes.begin() + zero_token * row_bytes, row_bytes, '\0');
      }
      if (name.find("_proj.") == std::string::npos && !is_bias) continue;
      if (is_bias) tensor = testing::ConvertFloats(tensor, "BF16");
      CHECK(tensor.type == "BF16", "{}", name);
      for (size_t i = 0; i < tensor.bytes.size(); i += 2) {
        uint16_t bits = 0;
        std::memcpy(&bits, &tensor.bytes[i], 2);
        bits = formats::FloatToBfloat16(formats::Bfloat16ToFloat(bits) / 16);
        std::memcpy(&tensor.bytes[i], &bits, 2);
      }
    }
    testing::WriteFile(dir_.path() / "model.safetensors", testing::SafetensorsBytes(tensors));
    auto checkpoint = Checkpoint::Open(dir_.path(), config, KOrderChoice::kAuto);
    CHECK(checkpoint.ok(), "{}", checkpoint.status().ToString());
    checkpoint_ = *std::move(checkpoint);
  }

  const ModelConfig& config() const { return config_; }
  const Checkpoint& get() const { return *checkpoint_; }
  std::vector<MatrixRef> refs() const {
    return StoredMatrices(config_, checkpoint_->head_is_tied());
  }

 private:
  const ModelConfig config_;
  testing::TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

inline std::vector<TokenSequence> RandomSequences(const ModelConfig& config, int count,
                                                  int max_length, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<TokenSequence> sequences(count);
  for (TokenSequence& sequence : sequences) {
    sequence.resize(1 + rng() % max_length);
    for (int32_t& token : sequence) token = static_cast<int32_t>(rng() % config.vocab_size);
  }
  return sequences;
}

// Asks for everything, and makes what a function says.
class TestEncoder final : public MatrixEncoder {
 public:
  using Function = std::function<formats::HostMatrix(
      const MatrixRef& ref, const formats::HostMatrix& source, const Moments& moments)>;
  explicit TestEncoder(Function encode) : encode_(std::move(encode)) {}

  MomentNeeds Needs(const MatrixRef& ref, StoredFormat /*format*/, int64_t /*num_inputs*/,
                    bool /*models_differ*/) const override {
    const bool has_inputs = ref.role != MatrixRole::kEmbedding && ref.role != MatrixRole::kHead;
    return {.hessian = has_inputs,
            .cross = has_inputs,
            .cross_output = has_inputs && AddsToResidual(ref.role)};
  }
  absl::StatusOr<formats::HostMatrix> Encode(const MatrixRef& ref, StoredFormat /*format*/,
                                             const formats::HostMatrix& source,
                                             const Moments* moments) override {
    return moments == nullptr ? source : encode_(ref, source, *moments);
  }

 private:
  const Function encode_;
};

// Another matrix of the same format, some per cent off.
inline formats::HostMatrix Disturbed(formats::HostMatrix matrix, uint32_t seed) {
  std::mt19937 rng(seed);
  const auto disturb = [&](float value) {
    return value * (1 + 0.1f * (static_cast<float>(rng() % 1024) / 512 - 1));
  };
  for (float& value : matrix.values_f32) value = disturb(value);
  for (uint16_t& value : matrix.values_bf16) {
    value = formats::FloatToBfloat16(disturb(formats::Bfloat16ToFloat(value)));
  }
  return matrix;
}

// Of the last token of each sequence, through the graph that serves.
inline std::vector<std::vector<float>> ServedLogits(const ModelConfig& config,
                                                    const Checkpoint& checkpoint,
                                                    const std::vector<TokenSequence>& sequences,
                                                    kernels::Backend* backend) {
  auto model = LoadErnie45(config, checkpoint, backend, nullptr, {.max_batch_tokens = 512});
  CHECK(model.ok(), "{}", model.status().ToString());
  constexpr int kBlocks = 8;
  const auto pool = *backend->Allocate(kBlocks * (*model)->kv_block_bytes());
  const auto batch = *backend->CreateBatch(
      {.max_tokens = 512, .max_rows = 1, .max_blocks_per_row = kBlocks, .num_slots = 1});
  const std::vector<int32_t> blocks = {5, 2, 7, 0, 1, 3, 4, 6};
  std::vector<std::vector<float>> logits;
  for (const TokenSequence& sequence : sequences) {
    backend->SetBatch({.tokens = sequence,
                       .rows = {{.position = 0,
                                 .length = static_cast<int32_t>(sequence.size()),
                                 .block_table = blocks,
                                 .want_logits = true}}},
                      batch.get());
    const auto rows = (*model)->Forward(*batch, pool->data());
    CHECK(rows.ok(), "{}", rows.status().ToString());
    logits.emplace_back(rows->data, rows->data + config.vocab_size);
  }
  return logits;
}

inline std::unique_ptr<CalibratedQuantizer> Create(const SmallCheckpoint& checkpoint,
                                                   std::vector<TokenSequence> sequences,
                                                   std::unique_ptr<MatrixEncoder> encoder,
                                                   kernels::cpu::ThreadPool* pool,
                                                   const CalibrationOptions& options = {}) {
  auto quantizer =
      CalibratedQuantizer::Create(checkpoint.config(), checkpoint.get(), std::move(sequences),
                                  std::move(encoder), options, pool);
  CHECK(quantizer.ok(), "{}", quantizer.status().ToString());
  return *std::move(quantizer);
}

inline std::unique_ptr<MatrixEncoder> Encoder(TestEncoder::Function function) {
  return std::make_unique<TestEncoder>(std::move(function));
}

}  // namespace wintserve::quantizer
