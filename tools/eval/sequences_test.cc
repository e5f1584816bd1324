#include "tools/eval/sequences.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/fake_tokenizer.h"
#include "tools/eval/temporary_file_test_util.h"

namespace wintserve::eval {
namespace {

using testing::HasSubstr;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

// The text of the ids, those that count in brackets.
std::string Marked(const ScoredSequence& sequence) {
  std::string text;
  for (size_t i = 0; i < sequence.ids.size(); ++i) {
    const std::string bytes = FakeTokenizer().Bytes(sequence.ids[i]);
    text += sequence.is_scored[i] ? "[" + bytes + "]" : bytes;
  }
  return text;
}

ScoredSequence Encode(const std::vector<ChatMessage>& messages) {
  return EncodeChat({"f:1", messages}, FakeTokenizer()).value();
}

TEST(EvalChat, CountsTheAnswerAndItsEnd) {
  const ScoredSequence sequence = Encode({{"user", "q"}, {"assistant", "ab"}});
  EXPECT_EQ(Marked(sequence), "<|begin_of_sentence|>User: q\nAssistant: [a][b][</s>]");
  EXPECT_EQ(sequence.NumScored(), 3);
  EXPECT_EQ(sequence.num_bytes, 2);
}

TEST(EvalChat, SeparatesTurnsAsTheTemplateDoesAndCountsEveryAnswer) {
  EXPECT_EQ(
      Marked(Encode(
          {{"system", "s"}, {"user", "q"}, {"assistant", "a"}, {"user", "r"}, {"assistant", "b"}})),
      "<|begin_of_sentence|>s\nUser: q\nAssistant: [a]<|end_of_sentence|>User: r\n"
      "Assistant: [b][</s>]");
}

TEST(EvalChat, EndsWithItsLastAnswer) {
  EXPECT_EQ(Marked(Encode({{"user", "q"}, {"assistant", "a"}, {"user", "r"}})),
            "<|begin_of_sentence|>User: q\nAssistant: [a]");
}

TEST(EvalChat, WithoutAnAnswerIsRefused) {
  const FakeTokenizer tokenizer;
  EXPECT_EQ(MessageOf(EncodeChat({"f:1", {{"user", "q"}}}, tokenizer).status()),
            "f:1: messages: none has the role 'assistant'");
  EXPECT_THAT(
      MessageOf(EncodeChat({"f:1", {{"user", "q"}, {"assistant", ""}}}, tokenizer).status()),
      HasSubstr("f:1: messages[1].content: an answer must not be empty"));
}

TEST(EvalChat, WithARoleThatTheTemplateDoesNotKnowIsRefused) {
  const auto sequence = EncodeChat({"f:1", {{"tool", "q"}, {"assistant", "a"}}}, FakeTokenizer());
  EXPECT_THAT(MessageOf(sequence.status()), HasSubstr("f:1: messages[0].role"));
}

TEST(EvalChoices, AreEachBehindThePrompt) {
  const ChoiceItem item = {"f:1", "q", {"a", "bc"}, 0};
  const auto sequences = EncodeChoices(item, /*raw=*/false, FakeTokenizer()).value();
  ASSERT_EQ(sequences.size(), 2u);
  EXPECT_EQ(Marked(sequences[0]), "<|begin_of_sentence|>User: q\nAssistant: [a]");
  EXPECT_EQ(Marked(sequences[1]), "<|begin_of_sentence|>User: q\nAssistant: [b][c]");
  const auto raw = EncodeChoices(item, /*raw=*/true, FakeTokenizer()).value();
  EXPECT_EQ(Marked(raw[1]), "q[b][c]");
}

// The same with a marker that begins a text.
class TokenizerWithBegin : public FakeTokenizer {
 public:
  int32_t IdOf(std::string_view token) const override {
    return token == "<|begin_of_sentence|>" ? 3 : FakeTokenizer::IdOf(token);
  }
};

std::string MarkedWindows(const std::vector<ScoredSequence>& windows) {
  std::string text;
  for (const ScoredSequence& window : windows) text += Marked(window) + "|";
  return text;
}

TEST(EvalWindows, HoldDocumentsWithTheirEndsAndScoreAllButTheFirstId) {
  const TemporaryFile file(R"({"text": "abc"})"
                           "\n"
                           R"({"text": "defgh"})"
                           "\n");
  const auto windows = ReadWindows(file.path(), FakeTokenizer(), 4, 0).value();
  EXPECT_EQ(MarkedWindows(windows), "a[b][c][</s>]|d[e][f][g]|h[</s>]|");
  EXPECT_EQ(windows[0].num_bytes, 2);
  EXPECT_EQ(windows[2].num_bytes, 0);
  EXPECT_EQ(windows[1].place, file.path() + ": window 1");
}

TEST(EvalWindows, BeginEachDocumentWithTheMarkerIfThereIsOne) {
  const TemporaryFile file(R"({"text": "ab"})"
                           "\n"
                           R"({"text": "c"})"
                           "\n");
  const auto windows = ReadWindows(file.path(), TokenizerWithBegin(), 16, 0).value();
  ASSERT_EQ(windows.size(), 1u);
  EXPECT_EQ(windows[0].ids,
            (std::vector<int32_t>{3, FakeTokenizer::IdOfByte('a'), FakeTokenizer::IdOfByte('b'), 2,
                                  3, FakeTokenizer::IdOfByte('c'), 2}));
  EXPECT_EQ(windows[0].NumScored(), 6);
  EXPECT_EQ(windows[0].num_bytes, 3);
}

TEST(EvalWindows, OfOneIdAreLeftOut) {
  const TemporaryFile file("abc", ".txt");  // and </s>
  EXPECT_EQ(MarkedWindows(ReadWindows(file.path(), FakeTokenizer(), 3, 0).value()), "a[b][c]|");
}

TEST(EvalWindows, AreNoMoreThanTheLimitAndNothingBehindThemIsRead) {
  const TemporaryFile file(R"({"text": "abcdefg"})"
                           "\nno JSON\n");
  EXPECT_EQ(MarkedWindows(ReadWindows(file.path(), FakeTokenizer(), 4, 2).value()),
            "a[b][c][d]|e[f][g][</s>]|");
  EXPECT_THAT(MessageOf(ReadWindows(file.path(), FakeTokenizer(), 4, 3).status()),
              HasSubstr(":2: must be a JSON object in UTF-8"));
}

TEST(EvalWindows, OfAFileWithoutTextAreRefused) {
  for (const auto& [content, suffix] : std::vector<std::pair<std::string, std::string>>{
           {"", ".jsonl"}, {"", ".txt"}, {"{\"text\": \"\"}\n{\"text\": \"\"}\n", ".jsonl"}}) {
    const TemporaryFile file(content, suffix);
    // With its two markers a document would be scored.
    EXPECT_EQ(MessageOf(ReadWindows(file.path(), TokenizerWithBegin(), 4, 0).status()),
              file.path() + ": holds no text to score");
  }
}

TEST(EvalWindows, OfAFileThatIsNoTextAreRefused) {
  const TemporaryFile file("ab\ncaf\xE9", ".txt");
  EXPECT_EQ(MessageOf(ReadWindows(file.path(), FakeTokenizer(), 4, 0).status()),
            file.path() + ":2: must be text in UTF-8, which byte 0xe9 at offset 6 is not");
  EXPECT_THAT(MessageOf(ReadWindows("/dev/zero", FakeTokenizer(), 4, 1).status()),
              HasSubstr("/dev/zero: is longer than the 16777216 bytes"));
}

}  // namespace
}  // namespace wintserve::eval
