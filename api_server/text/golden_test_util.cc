#include "api_server/text/golden_test_util.h"

#include <fstream>

#include "common/check.h"
#include "common/read_file.h"
#include "nlohmann/json.hpp"

namespace wintserve {
namespace {

using nlohmann::json;

Goldens ReadGoldens() {
  const absl::StatusOr<std::string> content = ReadFile("tests/golden/tokenizer.json");
  CHECK(content.ok(), "{}", content.status().ToString());
  const json document = json::parse(*content);
  Goldens goldens;
  for (const json& row : document["texts"]) {
    const std::string text = row["text"];
    const char* ids = row.contains("ids_with_added_tokens") ? "ids_with_added_tokens" : "ids";
    goldens.texts.push_back({text, row[ids], row.value("decoded", text)});
  }
  for (const json& row : document["decode"])
    goldens.decodings.push_back({row["text"], row["ids"], ""});
  for (const json& row : document["chat"]) {
    GoldenChat chat{row["name"], {}, row["add_generation_prompt"], row["prompt"], row["ids"]};
    for (const json& message : row["messages"]) {
      chat.messages.push_back({message["role"], message["content"]});
    }
    goldens.chats.push_back(chat);
  }
  return goldens;
}

}  // namespace

const Goldens& PoetGoldens() {
  static const Goldens goldens = ReadGoldens();
  return goldens;
}

const Tokenizer& PoetTokenizer() {
  static const auto tokenizer = Tokenizer::Load("models/poet");
  CHECK(tokenizer.ok(), "{}", tokenizer.status().ToString());
  return **tokenizer;
}

TokenizerDir::TokenizerDir(std::string_view tokenizer_config) {
  std::filesystem::copy("models/poet/tokenizer.model", path());
  Write("tokenizer_config.json", tokenizer_config);
}

void TokenizerDir::Write(const char* name, std::string_view content) const {
  std::ofstream(path() / name, std::ios::binary) << content;
}

}  // namespace wintserve
