// The checkpoint that is quantised.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine_worker/config/model_config.h"
#include "engine_worker/weights/checkpoint.h"
#include "engine_worker/weights/checkpoint_files.h"

namespace wintserve::quantizer {

struct Source {
  std::filesystem::path dir;
  // What config.json leaves to the tensors (a tied head, biases of routers) is filled in.
  ModelConfig config;
  std::string config_json;
  std::unique_ptr<Checkpoint> checkpoint;
  std::vector<std::filesystem::path> companions;  // tokenizer, generation settings, licence
  uint64_t companions_digest =
      0;                   // names and contents: the tokenizer makes the calibration's tokens
  SkippedTensors skipped;  // not carried over: multi-token prediction, KV-cache scales and the like

  // Of config.json's text, the companions and the weights, as Checkpoint::digest.
  std::string Digest() const;
};

// Reads and checks. Errors as of LoadModelConfig and Checkpoint::Open; INVALID_ARGUMENT: it is
// quantised already, or split for tensor parallelism.
absl::StatusOr<Source> OpenSource(const std::filesystem::path& dir);

}  // namespace wintserve::quantizer
