#include "engine_worker/weights/checkpoint_writer.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "common/check.h"
#include "kernels/formats/bf16.h"

namespace wintserve::testing {
namespace {

int64_t CountOf(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

template <typename Value>
void Append(std::vector<uint8_t>& bytes, Value value) {
  const size_t at = bytes.size();
  bytes.resize(at + sizeof(Value));
  std::memcpy(bytes.data() + at, &value, sizeof(Value));
}

// Exact for the normal range of half only.
uint16_t ToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value * 0x1p-112f);
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(value) >> 16 & 0x8000) |
                               (bits >> 13 & 0x7FFF));
}

class Maker {
 public:
  Maker(const ModelConfig& config, TestLayout layout, uint32_t seed)
      : config_(config), layout_(layout), rng_(seed) {}

  TestTensors Make() {
    const int64_t hidden = config_.hidden_size;
    AddFloats(Prefix() + ".embed_tokens.weight", "BF16", {config_.vocab_size, hidden},
              Values(config_.vocab_size * hidden));
    for (int layer = 0; layer < config_.num_layers; ++layer) AddLayer(layer);
    AddFloats(Prefix() + ".norm.weight", "BF16", {hidden}, Values(hidden));
    if (!config_.tie_word_embeddings) {
      AddPlain("lm_head", {{"lm_head", config_.vocab_size}}, hidden);
    }
    return std::move(tensors_);
  }

 private:
  struct Block {
    std::string name;
    int64_t columns;
  };

  std::string Prefix() const { return layout_ == TestLayout::kPaddle ? "ernie" : "model"; }
  bool IsOutIn() const {
    return layout_ == TestLayout::kHuggingFace || layout_ == TestLayout::kFusedOutIn;
  }

  std::vector<float> Values(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = formats::RoundToBfloat16(normal(rng_));
    return values;
  }
  std::vector<uint8_t> Bytes(int64_t count) {
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng_());
    return bytes;
  }

  void AddFloats(const std::string& name, const std::string& type, std::vector<int64_t> shape,
                 const std::vector<float>& values) {
    TestTensor tensor{"F32", std::move(shape), {}};
    for (float value : values) Append(tensor.bytes, value);
    tensors_[name] = ConvertFloats(tensor, type);
  }
  void AddBytes(const std::string& name, const std::string& type, std::vector<int64_t> shape) {
    const int64_t count = CountOf(shape);
    tensors_[name] = {type, std::move(shape), Bytes(count)};
  }

  // One fused tensor, or one a block: the same weights W [k, n] in every layout.
  void AddPlain(const std::string& fused_name, const std::vector<Block>& blocks, int64_t k,
                const std::string& type = "BF16") {
    std::vector<Block> stored = blocks;
    if (layout_ != TestLayout::kHuggingFace) {
      stored = {{fused_name, 0}};
      for (const Block& block : blocks) stored[0].columns += block.columns;
    }
    int64_t n = 0;
    for (const Block& block : blocks) n += block.columns;
    const std::vector<float> weights = Values(k * n);
    int64_t first = 0;
    for (const Block& block : stored) {
      std::vector<float> values(k * block.columns);
      for (int64_t row = 0; row < k; ++row) {
        for (int64_t column = 0; column < block.columns; ++column) {
          values[IsOutIn() ? column * k + row : row * block.columns + column] =
              weights[row * n + first + column];
        }
      }
      first += block.columns;
      AddFloats(block.name + ".weight", type,
                IsOutIn() ? std::vector{block.columns, k} : std::vector{k, block.columns}, values);
    }
  }

  void AddScale(const std::string& name, int64_t n) {
    std::vector<float> scale = Values(n);
    for (float& value : scale) value = formats::RoundToBfloat16(1e-3f + 1e-4f * std::fabs(value));
    AddFloats(name, "BF16", {n}, scale);
  }
  void AddWint8(const std::string& name, int64_t k, int64_t n) {
    AddBytes(name + ".quant_weight", "I8", {n, k});
    AddScale(name + ".weight_scale", n);
  }
  void AddWint4(const std::string& name, int64_t k, int64_t n) {
    AddBytes(name + ".quant_weight", "I8", {n / 2, k});
    AddScale(name + ".weight_scale", n);
  }
  void AddWint2(const std::string& name, int64_t k, int64_t n) {
    AddBytes(name + ".quant_weight", "U8", {k / 4, n});
    AddBytes(name + ".weight_scale", "U8", {k / 128, n});
    AddScale(name + ".super_scales", n);
    std::vector<float> code_scale = Values(n), code_zp = Values(n);
    for (float& value : code_scale) value = 120 + value;
    for (float& value : code_zp) value = 1200 + 50 * value;
    AddFloats(name + ".code_scale", "F32", {n}, code_scale);
    AddFloats(name + ".code_zp", "F32", {n}, code_zp);
  }

  void AddMlp(const std::string& parent, int64_t width, const std::string& format) {
    const int64_t hidden = config_.hidden_size;
    const auto [gate_up, down] = std::pair(parent + ".up_gate_proj", parent + ".down_proj");
    if (format == "wint8") {
      AddWint8(gate_up, hidden, 2 * width);
      AddWint8(down, width, hidden);
    } else if (format == "wint4") {
      AddWint4(gate_up, hidden, 2 * width);
      AddWint4(down, width, hidden);
    } else if (format == "wint2") {
      AddWint2(gate_up, hidden, 2 * width);
      AddWint2(down, width, hidden);
    } else {
      AddPlain(gate_up, {{parent + ".gate_proj", width}, {parent + ".up_proj", width}}, hidden);
      AddPlain(down, {{down, hidden}}, width);
    }
  }

  std::string ExpertFormat(int layer) const {
    switch (config_.expert_quantization) {
      case ExpertQuantization::kNone:
        return "plain";
      case ExpertQuantization::kWint8:
        return "wint8";
      case ExpertQuantization::kWint4:
        return "wint4";
      case ExpertQuantization::kW4W2:
        if (layer > config_.last_wint4_layer) return "wint2";
        return config_.first_experts_are_plain ? "plain" : "wint4";
    }
    return "";
  }

  void AddLayer(int layer) {
    const std::string parent = Prefix() + ".layers." + std::to_string(layer);
    const std::string attention = parent + ".self_attn";
    const std::string dense = config_.dense_is_wint8 ? "wint8" : "plain";
    const int64_t hidden = config_.hidden_size;
    const int64_t q = int64_t{config_.num_heads} * config_.head_dim;
    const int64_t kv = int64_t{config_.num_kv_heads} * config_.head_dim;
    AddFloats(parent + ".input_layernorm.weight", "BF16", {hidden}, Values(hidden));
    AddFloats(parent + ".post_attention_layernorm.weight", "F32", {hidden}, Values(hidden));
    if (config_.dense_is_wint8) {
      AddWint8(attention + ".qkv_proj", hidden, q + 2 * kv);
      AddWint8(attention + ".o_proj", q, hidden);
    } else {
      AddPlain(
          attention + ".qkv_proj",
          {{attention + ".q_proj", q}, {attention + ".k_proj", kv}, {attention + ".v_proj", kv}},
          hidden);
      AddPlain(attention + ".o_proj", {{attention + ".o_proj", hidden}}, q);
    }
    const std::string mlp = parent + ".mlp";
    if (!config_.IsMoeLayer(layer)) {
      AddMlp(mlp, config_.intermediate_size, dense);
      return;
    }
    AddPlain(mlp + ".gate", {{mlp + ".gate", config_.num_experts}}, hidden, "F32");
    if (config_.has_router_bias) {
      AddFloats(mlp + ".moe_statics.e_score_correction_bias", "F32", {1, config_.num_experts},
                Values(config_.num_experts));
    }
    for (int expert = 0; expert < config_.num_experts; ++expert) {
      AddMlp(mlp + ".experts." + std::to_string(expert), config_.moe_intermediate_size,
             ExpertFormat(layer));
    }
    if (config_.num_shared_experts > 0) {
      AddMlp(mlp + ".shared_experts",
             int64_t{config_.num_shared_experts} * config_.moe_intermediate_size, dense);
    }
  }

  const ModelConfig& config_;
  const TestLayout layout_;
  std::mt19937 rng_;
  TestTensors tensors_;
};

}  // namespace

ModelConfig SmallConfig() {
  ModelConfig config;
  config.architecture = "Ernie4_5_MoeForCausalLM";
  config.vocab_size = 96;
  config.hidden_size = 128;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 48;
  config.intermediate_size = 192;
  config.max_position_embeddings = 256;
  config.rope_theta = 500000;
  config.tie_word_embeddings_is_set = true;
  config.tie_word_embeddings = false;
  config.num_experts = 2;
  config.num_experts_per_token = 1;
  config.moe_intermediate_size = 256;
  config.num_shared_experts = 1;
  config.moe_layer_start = 1;
  config.moe_layer_end = 2;
  config.has_router_bias = true;
  config.has_router_bias_is_set = true;
  return config;
}

ModelConfig SmallWint2Config() {
  ModelConfig config = SmallConfig();
  config.dense_is_wint8 = true;
  config.expert_quantization = ExpertQuantization::kW4W2;
  config.last_wint4_layer = 1;
  return config;
}

TestTensors MakeTensors(const ModelConfig& config, TestLayout layout, uint32_t seed) {
  return Maker(config, layout, seed).Make();
}

TestTensor ConvertFloats(const TestTensor& tensor, const std::string& type) {
  TestTensor converted{type, tensor.shape, {}};
  const int64_t count = CountOf(tensor.shape);
  for (int64_t i = 0; i < count; ++i) {
    float value = 0;
    if (tensor.type == "BF16") {
      uint16_t bits = 0;
      std::memcpy(&bits, tensor.bytes.data() + i * sizeof(bits), sizeof(bits));
      value = formats::Bfloat16ToFloat(bits);
    } else {
      CHECK(tensor.type == "F32");
      std::memcpy(&value, tensor.bytes.data() + i * sizeof(value), sizeof(value));
    }
    if (type == "BF16") {
      Append(converted.bytes, formats::FloatToBfloat16(value));
    } else if (type == "F16") {
      Append(converted.bytes, ToHalf(value));
    } else if (type == "F64") {
      Append(converted.bytes, static_cast<double>(value));
    } else {
      Append(converted.bytes, value);
    }
  }
  return converted;
}

std::string SafetensorsBytes(const TestTensors& tensors) {
  nlohmann::json header = {{"__metadata__", {{"format", "np"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data.append(tensor.bytes.begin(), tensor.bytes.end());
    header[name] = {
        {"dtype", tensor.type}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string json = header.dump();
  const uint64_t length = json.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + json + data;
}

std::string ConfigJson(const ModelConfig& config) {
  nlohmann::json json = {{"architectures", {config.architecture}},
                         {"vocab_size", config.vocab_size},
                         {"hidden_size", config.hidden_size},
                         {"num_hidden_layers", config.num_layers},
                         {"num_attention_heads", config.num_heads},
                         {"num_key_value_heads", config.num_kv_heads},
                         {"head_dim", config.head_dim},
                         {"intermediate_size", config.intermediate_size},
                         {"max_position_embeddings", config.max_position_embeddings},
                         {"rope_theta", config.rope_theta}};
  if (config.tie_word_embeddings_is_set) json["tie_word_embeddings"] = config.tie_word_embeddings;
  if (config.num_experts > 0) {
    json["moe_num_experts"] = config.num_experts;
    json["moe_k"] = config.num_experts_per_token;
    json["moe_intermediate_size"] = config.moe_intermediate_size;
    json["moe_num_shared_experts"] = config.num_shared_experts;
    json["moe_layer_start_index"] = config.moe_layer_start;
    json["moe_layer_end_index"] = config.moe_layer_end;
    json["moe_layer_interval"] = config.moe_layer_interval;
    if (config.has_router_bias_is_set) json["moe_use_aux_free"] = config.has_router_bias;
  }
  const char* const dense = config.dense_is_wint8 ? "wint8" : "bfloat16";
  switch (config.expert_quantization) {
    case ExpertQuantization::kNone:
      if (config.dense_is_wint8) json["quantization_config"] = {{"quantization", "wint8"}};
      break;
    case ExpertQuantization::kWint8:
    case ExpertQuantization::kWint4:
      json["quantization_config"] = {
          {"quantization", "mix_quant"},
          {"dense_quant_type", dense},
          {"moe_quant_type",
           config.expert_quantization == ExpertQuantization::kWint8 ? "wint8" : "wint4"},
          {"is_quantized", true},
          {"kv_cache_quant_type", ""}};
      break;
    case ExpertQuantization::kW4W2:
      json["quantization_config"] = {
          {"quantization", "wint2"},
          {"dense_quant_type", dense},
          {"moe_quant_config",
           {{"moe_w4_quant_config",
             {{"quant_type", config.first_experts_are_plain ? "bfloat16" : "wint4"},
              {"quant_end_layer", config.last_wint4_layer}}}}}};
      break;
  }
  return json.dump(2);
}

void WriteSparseSafetensors(const std::filesystem::path& path, const TensorShapes& tensors) {
  nlohmann::json header = nlohmann::json::object();
  int64_t end = 0;
  for (const auto& [name, tensor] : tensors) {
    const int64_t element = tensor.type == "BF16" ? 2 : tensor.type == "F32" ? 4 : 1;
    const int64_t begin = end;
    end += element * CountOf(tensor.shape);
    header[name] = {
        {"dtype", tensor.type}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  const std::string json = header.dump();
  const uint64_t length = json.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  WriteFile(path, bytes + json);
  std::filesystem::resize_file(path, bytes.size() + json.size() + static_cast<uint64_t>(end));
}

void WriteSparseShards(const std::filesystem::path& dir, const TensorShapes& tensors,
                       int num_shards) {
  std::vector<TensorShapes> shards(num_shards);
  nlohmann::json weight_map = nlohmann::json::object();
  size_t i = 0;
  const auto file_name = [&](size_t shard) {
    return fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, num_shards);
  };
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = i++ % shards.size();
    shards[shard][name] = tensor;
    weight_map[name] = file_name(shard);
  }
  for (size_t shard = 0; shard < shards.size(); ++shard) {
    WriteSparseSafetensors(dir / file_name(shard), shards[shard]);
  }
  WriteFile(dir / "model.safetensors.index.json",
            nlohmann::json{{"weight_map", weight_map}}.dump());
}

}  // namespace wintserve::testing
