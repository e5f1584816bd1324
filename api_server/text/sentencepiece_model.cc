#include "api_server/text/sentencepiece_model.h"

#include <sentencepiece_processor.h>

#include <utility>

#include "common/check.h"

namespace wintserve {

struct SentencePieceModel::Library {
  sentencepiece::SentencePieceProcessor processor;
};

std::unique_ptr<SentencePieceModel> SentencePieceModel::Parse(std::string_view serialized,
                                                              std::string* error) {
  auto library = std::make_unique<Library>();
  const sentencepiece::util::Status status = library->processor.LoadFromSerializedProto(serialized);
  if (!status.ok()) {
    *error = status.message();
    return nullptr;
  }
  return std::unique_ptr<SentencePieceModel>(new SentencePieceModel(std::move(library)));
}

SentencePieceModel::SentencePieceModel(std::unique_ptr<Library> library)
    : library_(std::move(library)) {
  const sentencepiece::SentencePieceProcessor& processor = library_->processor;
  pieces_.reserve(processor.GetPieceSize());
  for (int id = 0; id < processor.GetPieceSize(); ++id) {
    pieces_.push_back({.text = processor.IdToPiece(id),
                       .is_byte = processor.IsByte(id),
                       .is_special = processor.IsControl(id) || processor.IsUnknown(id)});
  }
}

SentencePieceModel::~SentencePieceModel() = default;

std::vector<int32_t> SentencePieceModel::Encode(const std::string& text) const {
  std::vector<int32_t> ids;
  const sentencepiece::util::Status status = library_->processor.Encode(text, &ids);
  CHECK(status.ok(), "SentencePiece cannot encode {} bytes: {}", text.size(), status.message());
  return ids;
}

}  // namespace wintserve
