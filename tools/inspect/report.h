// What `wintserve inspect` has to tell, and how it tells it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint_files.h"
#include "engine_worker/weights/k_order.h"
#include "tools/inspect/fit.h"
#include "tools/inspect/sizes.h"
#include "tools/inspect/verify.h"

namespace wintserve::inspect {

struct InspectOptions {
  std::string dir;
  int tensor_parallel_size = 0;  // 0: 1, or what a pre-sharded checkpoint is split for
  // Its world_size is not read. None: no memory was given.
  std::optional<FitOptions> fit = {};
};

struct FileFacts {
  std::string path;
  int64_t num_bytes = 0;
  int64_t num_tensors = 0;
};

struct Report {
  std::string dir;
  ModelConfig config;
  std::optional<CheckpointFiles> opened;  // none: config.json alone is there
  std::vector<FileFacts> files;
  // Of names, shapes and types, and of values where the K order could not be told for them.
  std::vector<std::string> problems;
  SkippedTensors skipped;  // of all files
  bool head_is_tied = false;
  std::optional<KOrderEvidence> k_order;  // none without WINT2, or if there are problems

  std::vector<LayerRange> layers;
  ModelSizes sizes;  // of the whole model
  int64_t active_parameters = 0;
  int tensor_parallel_size = 1;
  ModelSizes rank_sizes;
  std::optional<FitOptions> fit_options;
  std::optional<Fit> fit;
  std::optional<Verified> verified;

  int64_t total_file_bytes() const;
  // But for tables and routers. Quantised matrices have layouts of their own, neither [in, out] nor
  // [out, in].
  bool all_matrices_are_quantized() const;
  bool is_whole() const { return problems.empty() && (!verified || verified->problems.empty()); }
};

// NOT_FOUND, DATA_LOSS: nothing can be told, for the reason given: no directory, a config.json or a
// file that cannot be read. INVALID_ARGUMENT: the same of config.json's content, or the model does
// not split over so many ranks. Tensors that are missing or not as they must be are problems of the
// report, not errors.
absl::StatusOr<Report> Inspect(const InspectOptions& options);

// What --verify found: `report` then has each problem once, also those of values that Inspect came
// upon itself.
void AddVerified(Verified verified, Report& report);

// For people. styled: with the escape sequences of a terminal.
std::string ToText(const Report& report, bool styled);
// One object, indented. Sizes are bytes.
std::string ToJson(const Report& report);

}  // namespace wintserve::inspect
