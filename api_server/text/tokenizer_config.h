// What tokenizer_config.json and added_tokens.json say.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

struct AddedToken {
  int32_t id = 0;
  std::string content;
};

// A name is empty where the file does not give one.
struct TokenizerConfig {
  std::string bos_token;
  std::string eos_token;
  std::string unk_token;
  std::string cls_token;
  std::string sep_token;
  std::vector<AddedToken> added_tokens;  // by id; no id and no content twice
};

// Reads tokenizer_config.json of dir and, where there is one, added_tokens.json. Errors name the
// file and what is wrong in it: NOT_FOUND, INVALID_ARGUMENT.
absl::StatusOr<TokenizerConfig> LoadTokenizerConfig(const std::filesystem::path& dir);

}  // namespace wintserve
