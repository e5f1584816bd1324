// A model's generation_config.json.
#include "api_server/llm/generation_config.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  dir.Write("generation_config.json", input);
  const auto config = LoadGenerationConfig(dir.path());
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status()), "{}", config.status().ToString());
    CHECK(config.status().message().size() < 2048, "{}", config.status().message().size());
    return;
  }
  const GenerationDefaults& defaults = config->defaults;
  CHECK(defaults.temperature >= 0 && defaults.temperature <= 2, "{}", defaults.temperature);
  CHECK(defaults.top_p >= 0 && defaults.top_p <= 1, "{}", defaults.top_p);
  CHECK(defaults.min_p >= 0 && defaults.min_p <= 1, "{}", defaults.min_p);
  CHECK(defaults.repetition_penalty > 0, "{}", defaults.repetition_penalty);
}

}  // namespace wintserve
