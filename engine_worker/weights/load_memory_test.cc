// How much memory loading takes at most: what stays, and one layer of the files.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <string>

#include "common/heap.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_files.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "engine_worker/weights/matrix_loader.h"
#include "engine_worker/weights/weight_source.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

// What /proc/self/status says, in bytes.
int64_t StatusBytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  ADD_FAILURE() << key;
  return 0;
}

// VmHWM counts from here on.
bool ResetPeak() {
  std::ofstream refs("/proc/self/clear_refs");
  refs << "5" << std::flush;
  return refs.good();
}

struct Case {
  const char* name;
  ExpertQuantization experts;
  int world_size;
};

// A layer of tens of MiB of each rank, most of it experts: all of the same format.
ModelConfig BigLayers(ExpertQuantization experts, int world_size) {
  ModelConfig config = testing::SmallConfig();
  config.vocab_size = 4096;
  config.hidden_size = 1024;
  config.num_layers = 7;
  config.head_dim = 64;
  config.intermediate_size = 2048;
  const bool is_wint2 = experts == ExpertQuantization::kW4W2;
  config.num_experts = (experts == ExpertQuantization::kNone ? 6 : is_wint2 ? 36 : 24) * world_size;
  config.moe_intermediate_size = 1024;
  config.moe_layer_end = 6;
  config.expert_quantization = experts;
  config.dense_is_wint8 = experts != ExpertQuantization::kNone;
  config.last_wint4_layer = -1;
  return config;
}

testing::TensorShapes ShapesOf(const ModelConfig& config) {
  testing::TensorShapes shapes;
  Layout layout = CanonicalLayout(config);
  for (const MatrixRef& ref : AllMatrices(config)) {
    for (const MatrixPart& part : DescribeMatrix(layout, config, ref).parts) {
      for (const ExpectedTensor& tensor : ExpectedTensors(part.stored)) {
        shapes[tensor.name] = {std::string(TensorTypeName(tensor.types.front())),
                               tensor.shapes.front()};
      }
    }
  }
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (const VectorRole role : {VectorRole::kInputNorm, VectorRole::kPostAttentionNorm}) {
      shapes[VectorTensorName(layout, role, layer)] = {"BF16", {config.hidden_size}};
    }
    if (config.IsMoeLayer(layer)) {
      shapes[VectorTensorName(layout, VectorRole::kRouterBias, layer)] = {"F32",
                                                                          {1, config.num_experts}};
    }
  }
  shapes[VectorTensorName(layout, VectorRole::kFinalNorm, 0)] = {"BF16", {config.hidden_size}};
  return shapes;
}

class LoadingMemory : public ::testing::TestWithParam<Case> {};

TEST_P(LoadingMemory, IsOneLayerAboveWhatStays) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer keeps memory of its own";
#endif
  ReturnLargePiecesAtOnce();  // as a worker does
  const ModelConfig config = BigLayers(GetParam().experts, GetParam().world_size);
  const testing::TempDir dir;
  testing::WriteSparseSafetensors(dir.path() / "model.safetensors", ShapesOf(config));
  const auto backend = kernels::cpu::CreateCpuBackend({.num_threads = 2});
  const int world_size = GetParam().world_size;
  const int rank = world_size - 1;
  for (const int num_threads : {1, 8}) {
    ReturnFreeMemory();
    if (!ResetPeak()) GTEST_SKIP() << "no /proc/self/clear_refs here";
    const int64_t before = StatusBytes("VmRSS");
    const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kAuto);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    // Of all ranks: a page of a file holds columns of each of them.
    std::map<int, int64_t> layers;
    for (const MatrixRef& ref : AllMatrices(config)) {
      layers[ref.layer] += (*checkpoint)->BytesOf(ref, /*rank=*/0, /*world_size=*/1).on_disk;
    }
    int64_t largest = 0;
    for (const auto& [layer, bytes] : layers) largest = std::max(largest, bytes);
    ASSERT_GT(largest, 20 << 20);

    int64_t stays = 0;
    std::vector<std::unique_ptr<kernels::WeightMatrix>> loaded;
    {
      const auto source =
          MakeCheckpointSource(config, **checkpoint, backend.get(), rank, world_size, num_threads);
      for (const MatrixRef& ref : AllMatrices(config)) {
        auto matrix = source->NextMatrix(ref);
        ASSERT_TRUE(matrix.ok()) << matrix.status();
        stays += (*matrix)->size_bytes();
        loaded.push_back(*std::move(matrix));
      }
    }
    const int64_t above = StatusBytes("VmHWM") - before - stays;
    EXPECT_LE(above, largest) << num_threads << " threads, of " << stays << " bytes";
    RecordProperty(fmt::format("mib_above_{}_threads", num_threads), static_cast<int>(above >> 20));
    fmt::print("{} threads: {:.1f} MiB above {:.1f} MiB, a layer has {:.1f} MiB\n", num_threads,
               above / 1048576.0, stays / 1048576.0, largest / 1048576.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LoadingMemory,
                         ::testing::Values(Case{"Bfloat16", ExpertQuantization::kNone, 1},
                                           Case{"Wint8", ExpertQuantization::kWint8, 1},
                                           Case{"Wint4", ExpertQuantization::kWint4, 1},
                                           Case{"Wint2", ExpertQuantization::kW4W2, 1},
                                           Case{"Wint2OfTwoRanks", ExpertQuantization::kW4W2, 2},
                                           Case{"Wint2OfFourRanks", ExpertQuantization::kW4W2, 4}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve
