// generation_config.json: what a request gets that names no sampling parameters of its own.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"

namespace wintserve {

struct GenerationConfig {
  GenerationDefaults defaults;
  std::vector<int32_t> eos_ids;  // as the file names them; may be empty
};

// Reads model_dir/generation_config.json. A missing file gives the defaults of GenerationDefaults;
// do_sample false gives temperature 0. INVALID_ARGUMENT names the file, the key and the value.
absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::filesystem::path& model_dir);

}  // namespace wintserve
