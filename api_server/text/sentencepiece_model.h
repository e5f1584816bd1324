// The SentencePiece library behind standard types. Its header puts names into namespace absl that
// clash with Abseil's own, so sentencepiece_model.cc is the only file that includes it, and this
// header speaks no Abseil.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace wintserve {

// Immutable; thread-safe.
class SentencePieceModel {
 public:
  struct Piece {
    std::string text;  // as the model spells it: U+2581 for a space, "<0x0A>" for a byte
    bool is_byte = false;
    bool is_special = false;  // control or unknown: never the result of encoding its own text
  };

  // serialized: the content of a tokenizer.model. Null and a reason in *error if it is not one.
  static std::unique_ptr<SentencePieceModel> Parse(std::string_view serialized, std::string* error);
  ~SentencePieceModel();

  // text: valid UTF-8. Adds nothing but the dummy prefix, if the model has one.
  std::vector<int32_t> Encode(const std::string& text) const;
  // By id, from 0.
  const std::vector<Piece>& pieces() const { return pieces_; }

 private:
  struct Library;
  explicit SentencePieceModel(std::unique_ptr<Library> library);

  std::unique_ptr<Library> library_;
  std::vector<Piece> pieces_;
};

}  // namespace wintserve
