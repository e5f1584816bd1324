// What the tests of this room share: the golden file of the demo tokenizer and directories that
// hold a tokenizer made for one test.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "api_server/text/chat_template.h"
#include "api_server/text/tokenizer.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {

struct GoldenText {
  std::string text;
  std::vector<int32_t> ids;
  std::string decoded;
};

struct GoldenChat {
  std::string name;
  std::vector<ChatMessage> messages;
  bool add_generation_prompt = false;
  std::string prompt;
  std::vector<int32_t> ids;
};

struct Goldens {
  std::vector<GoldenText> texts;
  std::vector<GoldenText> decodings;  // decoded is unused
  std::vector<GoldenChat> chats;
};

// tests/golden/tokenizer.json
const Goldens& PoetGoldens();
// models/poet, loaded once.
const Tokenizer& PoetTokenizer();

// Holds the demo's tokenizer.model and this tokenizer_config.json; removed on destruction.
class TokenizerDir {
 public:
  explicit TokenizerDir(std::string_view tokenizer_config);

  void Write(const char* name, std::string_view content) const;
  const std::filesystem::path& path() const { return dir_.path(); }

 private:
  const TempDir dir_;
};

}  // namespace wintserve
