#include "api_server/text/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_replace.h"
#include "api_server/text/added_tokens.h"
#include "api_server/text/sentencepiece_model.h"
#include "api_server/text/token_ids.h"
#include "api_server/text/tokenizer_config.h"
#include "api_server/text/utf8.h"
#include "common/read_file.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr const char* kModelNames[] = {"tokenizer.model", "spm.model", "ernie_token_100k.model"};
constexpr const char* kDefaultEosToken = "</s>";

std::string PieceBytes(const SentencePieceModel::Piece& piece) {
  uint32_t byte = 0;
  if (piece.is_byte && absl::SimpleHexAtoi(piece.text.substr(1, 4), &byte)) {
    return std::string(1, static_cast<char>(byte));
  }
  if (piece.is_special) return piece.text;
  return absl::StrReplaceAll(piece.text, {{"▁", " "}});
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(std::unique_ptr<SentencePieceModel> model)
      : model_(std::move(model)) {
    const std::vector<SentencePieceModel::Piece>& pieces = model_->pieces();
    bytes_.reserve(pieces.size());
    for (const SentencePieceModel::Piece& piece : pieces) {
      const auto id = static_cast<int32_t>(bytes_.size());
      id_of_token_.emplace(piece.text, id);
      bytes_.push_back(PieceBytes(piece));
      if (piece.is_special) added_tokens_.Add(piece.text, id);
    }
  }

  absl::Status AddTokens(const std::vector<AddedToken>& tokens) {
    for (const AddedToken& token : tokens) {
      if (token.id < vocab_size() && token.content != model_->pieces()[token.id].text &&
          token.content != bytes_[token.id]) {
        return absl::InvalidArgumentError(
            fmt::format("added token '{}' has id {}, which is '{}' in the SentencePiece model",
                        token.content, token.id, model_->pieces()[token.id].text));
      }
      if (const int32_t id = IdOf(token.content); id >= 0 && id != token.id) {
        return absl::InvalidArgumentError(
            fmt::format("added token '{}' has id {}, but the SentencePiece model has it at {}",
                        token.content, token.id, id));
      }
      if (token.id >= std::ssize(bytes_)) bytes_.resize(token.id + 1);
      bytes_[token.id] = token.content;
      id_of_token_.emplace(token.content, token.id);
      added_tokens_.Add(token.content, token.id);
    }
    return absl::OkStatus();
  }

  // Every token that the file names must exist; each of them counts as an added token.
  absl::Status UseNames(const TokenizerConfig& config) {
    const std::string eos = config.eos_token.empty() ? kDefaultEosToken : config.eos_token;
    const std::pair<const char*, std::string> names[] = {{"bos_token", config.bos_token},
                                                         {"eos_token", eos},
                                                         {"unk_token", config.unk_token},
                                                         {"cls_token", config.cls_token},
                                                         {"sep_token", config.sep_token}};
    for (const auto& [name, token] : names) {
      if (token.empty()) continue;
      const int32_t id = IdOf(token);
      if (id < 0) {
        return absl::InvalidArgumentError(fmt::format(
            "{} '{}' is neither in the SentencePiece model nor an added token", name, token));
      }
      added_tokens_.Add(token, id);
    }
    eos_id_ = IdOf(eos);
    if (!config.cls_token.empty()) chat_tokens_.cls_token = config.cls_token;
    if (!config.sep_token.empty()) chat_tokens_.sep_token = config.sep_token;
    return absl::OkStatus();
  }

  std::vector<int32_t> Encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    added_tokens_.Split(
        ReplaceInvalidUtf8(text),
        [&](std::string_view segment) {
          const std::vector<int32_t> segment_ids = model_->Encode(std::string(segment));
          ids.insert(ids.end(), segment_ids.begin(), segment_ids.end());
        },
        [&](int32_t id) { ids.push_back(id); });
    return ids;
  }

  std::string Decode(std::span<const int32_t> ids) const override {
    std::string bytes;
    for (const int32_t id : ids) {
      if (HasPiece(id)) bytes += bytes_[id];
    }
    return ReplaceInvalidUtf8(bytes);
  }

  std::string Bytes(int32_t id) const override { return HasPiece(id) ? bytes_[id] : ""; }

  int32_t IdOf(std::string_view token) const override {
    const auto found = id_of_token_.find(token);
    return found == id_of_token_.end() ? -1 : found->second;
  }

  int32_t vocab_size() const override { return static_cast<int32_t>(model_->pieces().size()); }
  int32_t eos_id() const override { return eos_id_; }
  ChatTokens chat_tokens() const override { return chat_tokens_; }

 private:
  bool HasPiece(int32_t id) const { return id >= 0 && id < std::ssize(bytes_); }

  std::unique_ptr<SentencePieceModel> model_;
  std::vector<std::string> bytes_;  // by id; empty for an id without a piece
  TokenIds id_of_token_;
  AddedTokenSplitter added_tokens_;
  int32_t eos_id_ = -1;
  ChatTokens chat_tokens_;
};

absl::StatusOr<std::unique_ptr<SentencePieceModel>> LoadModel(const std::filesystem::path& dir) {
  for (const char* name : kModelNames) {
    const std::filesystem::path path = dir / name;
    const absl::StatusOr<std::string> serialized = ReadFile(path);
    if (absl::IsNotFound(serialized.status())) continue;
    RETURN_IF_ERROR(serialized.status());
    std::string error;
    auto model = SentencePieceModel::Parse(*serialized, &error);
    if (model == nullptr) {
      return absl::InvalidArgumentError(
          fmt::format("{}: not a SentencePiece model: {}", path.string(), error));
    }
    return model;
  }
  return absl::NotFoundError(
      fmt::format("{}: has none of {}", dir.string(), fmt::join(kModelNames, ", ")));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::filesystem::path& dir) {
  ASSIGN_OR_RETURN(std::unique_ptr<SentencePieceModel> model, LoadModel(dir));
  ASSIGN_OR_RETURN(const TokenizerConfig config, LoadTokenizerConfig(dir));
  auto tokenizer = std::make_unique<SentencePieceTokenizer>(std::move(model));
  absl::Status status = tokenizer->AddTokens(config.added_tokens);
  if (status.ok()) status = tokenizer->UseNames(config);
  if (!status.ok()) {
    return absl::InvalidArgumentError(fmt::format(
        "{}: {}", (dir / "tokenizer_config.json").string(), std::string(status.message())));
  }
  return tokenizer;
}

}  // namespace wintserve
