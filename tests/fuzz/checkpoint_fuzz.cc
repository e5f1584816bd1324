// A checkpoint directory: config.json, index and shards; opened and loaded for two ranks as a
// worker does, and inspected and verified as `wintserve inspect` does.
#include <nlohmann/json.hpp>
#include <string>

#include "common/check.h"
#include "common/log.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "tests/fuzz/checkpoint_files.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"
#include "tools/inspect/report.h"
#include "tools/inspect/verify.h"

namespace wintserve {
namespace {

// What a fuzzer makes of a config must not make it wait.
constexpr int kMaxLayers = 16;
constexpr int kMaxExperts = 64;

void LoadAll(const Checkpoint& checkpoint, const ModelConfig& config) {
  constexpr int kRanks = 2;
  const bool splits = CheckTensorParallel(config, kRanks).ok();
  for (const MatrixRef& ref : AllMatrices(config)) {
    const auto matrix = checkpoint.LoadMatrix(ref, /*rank=*/1, kRanks);
    CHECK(matrix.ok() || absl::IsDataLoss(matrix.status()) || !splits, "{}",
          matrix.status().ToString());
    if (matrix.ok()) CHECK(checkpoint.BytesOf(ref, 1, kRanks).on_host > 0);
  }
  for (const VectorRole role :
       {VectorRole::kInputNorm, VectorRole::kPostAttentionNorm, VectorRole::kFinalNorm}) {
    CHECK(checkpoint.LoadVector(role, 0).ok());
  }
}

void InspectAll(const std::string& dir) {
  inspect::FitOptions fit;
  fit.memory_gib = 1;
  auto report = inspect::Inspect({.dir = dir, .fit = fit});
  if (!report.ok()) {
    CHECK(absl::IsDataLoss(report.status()) || absl::IsNotFound(report.status()) ||
              absl::IsInvalidArgument(report.status()),
          "{}", report.status().ToString());
    return;
  }
  if (report->opened) {
    report->verified = inspect::VerifyTensors(*report->opened, /*num_threads=*/1, [](int64_t) {});
  }
  CHECK(!inspect::ToText(*report, false).empty());
  const auto json = nlohmann::json::parse(inspect::ToJson(*report), nullptr, false);
  CHECK(json.is_object() && json["whole"] == report->is_whole());
}

}  // namespace

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  static const std::string default_config = testing::ConfigJson(testing::SmallWint2Config());
  [[maybe_unused]] static const bool quiet = (InitLog("fuzz", "error"), true);
  dir.Clear();
  dir.Write("config.json", default_config);
  for (const CheckpointFile& file : SplitCheckpointFiles(input)) {
    dir.WriteWithZeros(file.name, file.content, file.num_zeros);
  }
  const auto config = LoadModelConfig(dir.path());
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status()), "{}", config.status().ToString());
    return;
  }
  if (config->num_layers > kMaxLayers || config->num_experts > kMaxExperts) return;
  const auto checkpoint = Checkpoint::Open(dir.path(), *config, KOrderChoice::kAuto);
  if (checkpoint.ok()) {
    LoadAll(**checkpoint, *config);
  } else {
    CHECK(absl::IsDataLoss(checkpoint.status()) || absl::IsNotFound(checkpoint.status()), "{}",
          checkpoint.status().ToString());
  }
  InspectAll(dir.path().string());
}

}  // namespace wintserve
