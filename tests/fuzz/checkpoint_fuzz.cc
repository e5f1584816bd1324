// A checkpoint directory: index and shards, opened, verified and loaded for two ranks.
#include <string>

#include "common/check.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_writer.h"
#include "tests/fuzz/checkpoint_files.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {
namespace {

void LoadAll(const Checkpoint& checkpoint, const ModelConfig& config) {
  for (const MatrixRef& ref : AllMatrices(config)) {
    const auto matrix = checkpoint.LoadMatrix(ref, /*rank=*/1, /*world_size=*/2);
    CHECK(matrix.ok() || absl::IsDataLoss(matrix.status()), "{}", matrix.status().ToString());
  }
  for (const VectorRole role :
       {VectorRole::kInputNorm, VectorRole::kPostAttentionNorm, VectorRole::kFinalNorm}) {
    CHECK(checkpoint.LoadVector(role, 0).ok());
  }
}

}  // namespace

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  static const ModelConfig config = testing::SmallWint2Config();
  dir.Clear();
  for (const CheckpointFile& file : SplitCheckpointFiles(input)) {
    dir.WriteWithZeros(file.name, file.content, file.num_zeros);
  }
  const auto checkpoint = Checkpoint::Open(dir.path(), config, KOrderChoice::kAuto);
  if (checkpoint.ok()) {
    LoadAll(**checkpoint, config);
  } else {
    CHECK(absl::IsDataLoss(checkpoint.status()) || absl::IsNotFound(checkpoint.status()), "{}",
          checkpoint.status().ToString());
  }
}

}  // namespace wintserve
