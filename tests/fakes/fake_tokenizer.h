// One id a byte: id 100 + b stands for byte b, id 2 for "</s>". Every text is predictable.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "api_server/text/tokenizer.h"

namespace wintserve {

class FakeTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kEos = 2;
  static constexpr int32_t kFirstByte = 100;

  static int32_t IdOfByte(char byte) { return kFirstByte + static_cast<uint8_t>(byte); }

  std::vector<int32_t> Encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    for (const char byte : text) ids.push_back(IdOfByte(byte));
    return ids;
  }
  std::string Decode(std::span<const int32_t> ids) const override {
    std::string text;
    for (const int32_t id : ids) text += Bytes(id);
    return text;
  }
  std::string Bytes(int32_t id) const override {
    if (id == kEos) return "</s>";
    if (id < kFirstByte || id > kFirstByte + 255) return "";
    return std::string(1, static_cast<char>(id - kFirstByte));
  }
  int32_t IdOf(std::string_view token) const override { return token == "</s>" ? kEos : -1; }
  int32_t vocab_size() const override { return kFirstByte + 256; }
  int32_t eos_id() const override { return kEos; }
};

}  // namespace wintserve
