// Messages through the chat template, the demo model's tokenizer and back. The input's fields are
// separated by the byte 0x1f: role, content, role, content, …
#include <string>
#include <vector>

#include "api_server/text/chat_template.h"
#include "api_server/text/detokenizer.h"
#include "api_server/text/stop_matcher.h"
#include "api_server/text/tokenizer.h"
#include "api_server/text/utf8.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {
namespace {

constexpr char kSeparator = '\x1f';

const Tokenizer& DemoTokenizer() {
  static const Tokenizer* const tokenizer = [] {
    auto loaded = Tokenizer::Load("models/poet");
    CHECK(loaded.ok(), "{}", loaded.status().ToString());
    return loaded->release();
  }();
  return *tokenizer;
}

std::vector<std::string> Fields(std::string_view input) {
  std::vector<std::string> fields(1);
  for (const char byte : input) {
    if (byte == kSeparator) {
      fields.emplace_back();
    } else {
      fields.back() += byte;
    }
  }
  return fields;
}

void CheckIsUtf8(const std::string& text) { CHECK(ReplaceInvalidUtf8(text) == text, "{}", text); }

void CheckTokens(const std::string& text) {
  const Tokenizer& tokenizer = DemoTokenizer();
  const std::vector<int32_t> ids = tokenizer.Encode(text);
  std::string bytes;
  std::string streamed;
  Detokenizer detokenizer(tokenizer);
  for (const int32_t id : ids) {
    CHECK(id >= 0);
    bytes += tokenizer.Bytes(id);
    const std::string pushed = detokenizer.Push(id);
    CheckIsUtf8(pushed);
    streamed += pushed;
  }
  streamed += detokenizer.Flush();
  const std::string decoded = tokenizer.Decode(ids);
  CheckIsUtf8(decoded);
  CHECK(decoded == streamed, "decoded at once: {}\nin pieces: {}", decoded, streamed);
  CHECK(decoded == ReplaceInvalidUtf8(bytes));
}

// As stop strings: the first bytes of every field.
void CheckStops(const std::vector<std::string>& fields, const std::string& text) {
  std::vector<std::string> stops;
  for (const std::string& field : fields) stops.push_back(field.substr(0, 3));
  for (const bool include_stop : {false, true}) {
    StopMatcher whole(stops, include_stop);
    std::string expected = whole.Push(text);
    expected += whole.Flush();
    StopMatcher pieces(stops, include_stop);
    std::string got;
    for (const char byte : text) got += pieces.Push(std::string_view(&byte, 1));
    got += pieces.Flush();
    CHECK(got == expected && pieces.stopped() == whole.stopped());
    CHECK(text.starts_with(got));
    CHECK(whole.stopped() || got == text);
  }
}

}  // namespace

void FuzzInput(std::string_view input) {
  const std::vector<std::string> fields = Fields(input);
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i + 1 < fields.size(); i += 2) messages.push_back({fields[i], fields[i + 1]});
  for (const bool add_generation_prompt : {false, true}) {
    const auto text =
        RenderErnieChat(messages, add_generation_prompt, DemoTokenizer().chat_tokens());
    if (text.ok()) CheckTokens(*text);
  }
  CheckTokens(std::string(input));
  CheckStops(fields, std::string(input));
}

}  // namespace wintserve
