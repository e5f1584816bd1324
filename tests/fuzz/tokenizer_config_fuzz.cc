// A model's tokenizer_config.json, and after a byte 0x1f its added_tokens.json.
#include <set>
#include <string>

#include "api_server/text/tokenizer_config.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  dir.Clear();
  const size_t separator = input.find('\x1f');
  dir.Write("tokenizer_config.json", input.substr(0, separator));
  if (separator != std::string_view::npos) {
    dir.Write("added_tokens.json", input.substr(separator + 1));
  }
  const auto config = LoadTokenizerConfig(dir.path());
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status()), "{}", config.status().ToString());
    CHECK(config.status().message().size() < 2048, "{}", config.status().message().size());
    return;
  }
  std::set<int32_t> ids;
  std::set<std::string> contents;
  for (const AddedToken& token : config->added_tokens) {
    CHECK(token.id >= 0 && ids.insert(token.id).second, "{}", token.id);
    CHECK(contents.insert(token.content).second, "{}", token.content);
  }
}

}  // namespace wintserve
