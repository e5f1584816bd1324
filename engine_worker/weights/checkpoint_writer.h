// Test support: small random checkpoints on disk, in any layout, whole or pre-sharded, that a test
// can then break one way at a time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/temp_dir_test_util.h"
#include "engine_worker/config/model_config.h"

namespace wintserve::testing {

using wintserve::TempDir;
using wintserve::WriteFile;

struct TestTensor {
  std::string type;  // "BF16"
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};
using TestTensors = std::map<std::string, TestTensor>;

enum class TestLayout { kPaddle, kPaddleAsModel, kHuggingFace, kFusedOutIn };

// hidden 128, 3 layers (one dense), 4 heads of 32, 2 kv heads, 2 experts of width 256 and one
// shared.
ModelConfig SmallConfig();
// The same, experts and dense matrices quantised: layer 1 wint4, layer 2 wint2.
ModelConfig SmallWint2Config();

// The same seed and config give the same weights in every layout. Plain weights are bf16.
TestTensors MakeTensors(const ModelConfig& config, TestLayout layout, uint32_t seed);

// The same values in another float type; exact for bf16 values of a usual size.
TestTensor ConvertFloats(const TestTensor& tensor, const std::string& type);

std::string SafetensorsBytes(const TestTensors& tensors);

// config.json of a model.
std::string ConfigJson(const ModelConfig& config);

// Tensors without bytes of their own: `shape` of `type` in zeros, which take no room on a disk.
struct TensorShape {
  std::string type;
  std::vector<int64_t> shape;
};
using TensorShapes = std::map<std::string, TensorShape>;
void WriteSparseSafetensors(const std::filesystem::path& path, const TensorShapes& tensors);
// model.safetensors.index.json and so many shards, a tensor each in turn.
void WriteSparseShards(const std::filesystem::path& dir, const TensorShapes& tensors,
                       int num_shards);

}  // namespace wintserve::testing
