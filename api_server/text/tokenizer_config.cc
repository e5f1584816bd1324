#include "api_server/text/tokenizer_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "api_server/text/utf8.h"
#include "common/json_depth.h"
#include "common/read_file.h"
#include "common/status_macros.h"
#include "nlohmann/json.hpp"

namespace wintserve {
namespace {

using nlohmann::json;

// Far above any vocabulary; keeps the table that is indexed by id small.
constexpr int64_t kMaxTokenId = (1 << 20) - 1;

// Of a file's own text: what an error has room for, on one line.
std::string Excerpt(std::string_view text) {
  constexpr size_t kMaxBytes = 200;
  const bool is_cut = text.size() > kMaxBytes;
  return absl::Utf8SafeCEscape(ReplaceInvalidUtf8(text.substr(0, kMaxBytes))) + (is_cut ? "…" : "");
}

absl::StatusOr<json> ReadJsonObject(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  if (IsNestedTooDeep(text)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: is nested deeper than {} levels", path.string(), kMaxJsonDepth));
  }
  json document;
  try {
    document = json::parse(text);
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(
        fmt::format("{}: not valid JSON: {}", path.string(), Excerpt(error.what())));
  }
  if (!document.is_object()) {
    return absl::InvalidArgumentError(fmt::format("{}: must be a JSON object, is a JSON {}",
                                                  path.string(), document.type_name()));
  }
  return document;
}

// A token is written as its text, or as an object with a "content".
absl::StatusOr<std::string> TokenText(const json& value, std::string_view where) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string()) {
    return value["content"].get<std::string>();
  }
  return absl::InvalidArgumentError(
      fmt::format("{}: must be a string or an object with a string \"content\"", where));
}

// An empty name if the file has none, or null.
absl::StatusOr<std::string> NamedToken(const json& document, std::string_view file,
                                       const char* name) {
  const auto found = document.find(name);
  if (found == document.end() || found->is_null()) return "";
  return TokenText(*found, fmt::format("{}: {}", file, name));
}

// Collects added tokens; the same token may be listed again, but never with another id or text.
class AddedTokenTable {
 public:
  absl::Status Add(std::string_view file, int64_t id, const std::string& content) {
    if (id < 0 || id > kMaxTokenId) {
      return absl::InvalidArgumentError(
          fmt::format("{}: added token '{}' has id {}, allowed: 0 to {}", file, Excerpt(content),
                      id, kMaxTokenId));
    }
    if (content.empty()) {
      return absl::InvalidArgumentError(fmt::format("{}: added token {} is empty", file, id));
    }
    const auto [by_id, new_id] = content_of_id_.emplace(id, content);
    if (by_id->second != content) {
      return absl::InvalidArgumentError(
          fmt::format("{}: id {} is given to the added tokens '{}' and '{}'", file, id,
                      Excerpt(by_id->second), Excerpt(content)));
    }
    const auto [by_content, new_content] = id_of_content_.emplace(content, id);
    if (by_content->second != id) {
      return absl::InvalidArgumentError(fmt::format("{}: added token '{}' has the ids {} and {}",
                                                    file, Excerpt(content), by_content->second,
                                                    id));
    }
    return absl::OkStatus();
  }

  std::vector<AddedToken> Tokens() const {
    std::vector<AddedToken> tokens;
    tokens.reserve(content_of_id_.size());
    for (const auto& [id, content] : content_of_id_) tokens.push_back({id, content});
    return tokens;
  }

 private:
  std::map<int32_t, std::string> content_of_id_;
  std::map<std::string, int32_t> id_of_content_;
};

absl::Status AddFromDecoder(const json& document, const std::string& file, AddedTokenTable& table) {
  const auto decoder = document.find("added_tokens_decoder");
  if (decoder == document.end()) return absl::OkStatus();
  if (!decoder->is_object()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: added_tokens_decoder must be an object from id to token", file));
  }
  for (const auto& [key, value] : decoder->items()) {
    int64_t id = 0;
    if (!absl::SimpleAtoi(key, &id)) {
      return absl::InvalidArgumentError(
          fmt::format("{}: added_tokens_decoder: '{}' is not a token id", file, Excerpt(key)));
    }
    ASSIGN_OR_RETURN(const std::string content,
                     TokenText(value, fmt::format("{}: added_tokens_decoder[{}]", file, id)));
    RETURN_IF_ERROR(table.Add(file, id, content));
  }
  return absl::OkStatus();
}

absl::Status AddFromAddedTokensFile(const std::filesystem::path& path, AddedTokenTable& table) {
  const absl::StatusOr<json> document = ReadJsonObject(path);
  if (absl::IsNotFound(document.status())) return absl::OkStatus();
  RETURN_IF_ERROR(document.status());
  for (const auto& [content, id] : document->items()) {
    if (!id.is_number_integer()) {
      return absl::InvalidArgumentError(
          fmt::format("{}: '{}' must have an integer id", path.string(), Excerpt(content)));
    }
    RETURN_IF_ERROR(table.Add(path.string(), id.get<int64_t>(), content));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenizerConfig> LoadTokenizerConfig(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "tokenizer_config.json";
  const std::string file = path.string();
  ASSIGN_OR_RETURN(const json document, ReadJsonObject(path));
  TokenizerConfig config;
  ASSIGN_OR_RETURN(config.bos_token, NamedToken(document, file, "bos_token"));
  ASSIGN_OR_RETURN(config.eos_token, NamedToken(document, file, "eos_token"));
  ASSIGN_OR_RETURN(config.unk_token, NamedToken(document, file, "unk_token"));
  ASSIGN_OR_RETURN(config.cls_token, NamedToken(document, file, "cls_token"));
  ASSIGN_OR_RETURN(config.sep_token, NamedToken(document, file, "sep_token"));

  AddedTokenTable table;
  RETURN_IF_ERROR(AddFromDecoder(document, file, table));
  RETURN_IF_ERROR(AddFromAddedTokensFile(dir / "added_tokens.json", table));
  config.added_tokens = table.Tokens();
  return config;
}

}  // namespace wintserve
