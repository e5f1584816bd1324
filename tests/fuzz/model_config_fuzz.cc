// A model's config.json.
#include "common/check.h"
#include "engine_worker/config/model_config.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  dir.Write("config.json", input);
  const auto config = LoadModelConfig(dir.path());
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status()), "{}", config.status().ToString());
    CHECK(config.status().message().size() < 2048, "{}", config.status().message().size());
    return;
  }
  CHECK(config->vocab_size > 0 && config->hidden_size > 0 && config->num_layers > 0);
  CHECK(config->num_kv_heads > 0 && config->num_heads % config->num_kv_heads == 0);
  CHECK(config->num_experts_per_token <= config->num_experts || config->num_experts == 0);
  for (const int world_size : {1, 2, 3, 4, 8}) {
    const absl::Status divides = CheckTensorParallel(*config, world_size);
    CHECK(divides.ok() || absl::IsInvalidArgument(divides), "{}", divides.ToString());
  }
}

}  // namespace wintserve
