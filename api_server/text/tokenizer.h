// SentencePiece with the added tokens of tokenizer_config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/chat_template.h"

namespace wintserve {

// Immutable after Load; every method is thread-safe.
class Tokenizer {
 public:
  // Reads tokenizer.model (or spm.model, ernie_token_100k.model), tokenizer_config.json and, where
  // there is one, added_tokens.json of dir. Errors name the file: NOT_FOUND, INVALID_ARGUMENT.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::filesystem::path& dir);
  virtual ~Tokenizer() = default;

  // Added tokens are cut out first (leftmost, longest), the rest is encoded by SentencePiece;
  // nothing is added but the dummy prefix of a model that asks for one, to each stretch of rest.
  // Invalid UTF-8 becomes U+FFFD before encoding.
  virtual std::vector<int32_t> Encode(std::string_view text) const = 0;
  // The Bytes of all ids, joined; special tokens verbatim, no space added or removed. Each maximal
  // ill-formed subpart of UTF-8 becomes one U+FFFD.
  virtual std::string Decode(std::span<const int32_t> ids) const = 0;
  // The exact bytes that `id` stands for: one byte for a byte token, UTF-8 for the rest, the
  // literal for a special token, empty for an id without a piece.
  virtual std::string Bytes(int32_t id) const = 0;
  // token: as the vocabulary spells it, "▁the", "<0x0A>" or "</s>". -1: no such token.
  virtual int32_t IdOf(std::string_view token) const = 0;

  // SentencePiece's size: ids at and above it are never sampled unless they are added tokens there.
  virtual int32_t vocab_size() const = 0;
  virtual int32_t eos_id() const = 0;
  // What tokenizer_config.json names for the chat template.
  virtual ChatTokens chat_tokens() const { return {}; }
};

}  // namespace wintserve
