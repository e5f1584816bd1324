// The files of a checkpoint and what is wrong with the tensors in them: what Checkpoint::Open is
// made of, for those who want to know more than its first error.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/layout.h"
#include "engine_worker/weights/tensor_set.h"

namespace wintserve {

// Ownership: the mapped files. Threading: thread-safe.
struct CheckpointFiles {
  std::vector<TensorSet> sets;  // one, or one for each rank of a pre-sharded checkpoint
  Layout layout;                // of all of them
  ModelConfig stored_config;    // of what one set holds

  bool is_presharded() const { return sets.size() > 1; }
};

// Finds and maps the files and tells their layout; the tensors are not looked at yet.
// NOT_FOUND: no directory, no model, no shard. DATA_LOSS: a corrupt file or one that cannot be
// read, directories rank* that are not numbered from 0 or too many for the model, or names of no
// known layout.
absl::StatusOr<CheckpointFiles> OpenCheckpointFiles(const std::filesystem::path& dir,
                                                    const ModelConfig& config);

// Tensors that are there for other programs, by reason.
struct SkippedTensors {
  struct Count {
    SkipReason reason;
    int64_t num_tensors = 0;
    int64_t num_bytes = 0;
  };
  std::vector<Count> counts;  // none of zero tensors

  int64_t num_tensors() const;
};

struct TensorCheck {
  // One line each that names file, tensor, found and expected: missing, unknown, misshapen or of a
  // wrong type. Nothing is told about values.
  std::vector<std::string> problems;
  SkippedTensors skipped;
};

// Of one element of CheckpointFiles::sets.
TensorCheck CheckTensors(const TensorSet& set, const Layout& layout,
                         const ModelConfig& stored_config);

// What CheckTensors, which sees one set, cannot: lines for tensors that the ranks of a pre-sharded
// checkpoint must have alike.
std::vector<std::string> CheckRanksAgree(const CheckpointFiles& files);

// DATA_LOSS with the first problem in full and the number of others; OK if there is none.
absl::Status ToStatus(const std::vector<std::string>& problems);

}  // namespace wintserve
