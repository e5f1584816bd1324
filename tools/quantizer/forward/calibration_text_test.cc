#include "tools/quantizer/forward/calibration_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/temp_dir_test_util.h"

namespace wintserve::quantizer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const Tokenizer& DemoTokenizer() {
  static const Tokenizer* tokenizer = [] {
    auto loaded = Tokenizer::Load("tests/data/tiny-bf16");
    CHECK(loaded.ok(), "{}", loaded.status().ToString());
    return loaded->release();
  }();
  return *tokenizer;
}

TokenSequence Join(std::initializer_list<std::vector<int32_t>> parts) {
  TokenSequence joined;
  for (const auto& part : parts) joined.insert(joined.end(), part.begin(), part.end());
  return joined;
}

class CalibrationTextTest : public ::testing::Test {
 protected:
  absl::StatusOr<CalibrationText> Load(const std::string& name, const std::string& content,
                                       const CalibrationLimits& limits = {}) {
    WriteFile(dir_.path() / name, content);
    return LoadCalibrationText(dir_.path() / name, DemoTokenizer(), limits);
  }
  TempDir dir_;
};

TEST_F(CalibrationTextTest, ATextIsADocumentBetweenItsMarkers) {
  const auto text = Load("a.jsonl", "{\"text\": \"床前明月光\\n疑是\", \"source\": 1}\n\n");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(text->sequences, ElementsAre(Join({{DemoTokenizer().IdOf("<|begin_of_sentence|>")},
                                                 DemoTokenizer().Encode("床前明月光\n疑是"),
                                                 {2}})));
  EXPECT_EQ(text->num_records, 1);
  EXPECT_EQ(text->num_tokens, std::ssize(text->sequences[0]));
}

TEST_F(CalibrationTextTest, AnAnswerIsEncodedApartAndTheLastEndsGeneration) {
  const auto text = Load("a.jsonl",
                         R"({"messages": [{"role": "system", "content": "S"},
{"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"},
{"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"}]})");
  ASSERT_FALSE(text.ok()) << "a record is one line";
  const auto chat = Load(
      "b.jsonl",
      R"({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U1"}, )"
      R"({"role": "assistant", "content": "A1"}, {"role": "user", "content": "U2"}, )"
      R"({"role": "assistant", "content": "A2"}]})");
  ASSERT_TRUE(chat.ok()) << chat.status();
  const Tokenizer& tokenizer = DemoTokenizer();
  EXPECT_THAT(chat->sequences,
              ElementsAre(Join({tokenizer.Encode("<|begin_of_sentence|>S\nUser: U1\nAssistant: "),
                                tokenizer.Encode("A1"),
                                tokenizer.Encode("<|end_of_sentence|>User: U2\nAssistant: "),
                                tokenizer.Encode("A2"),
                                {2}})));
}

TEST_F(CalibrationTextTest, AChatThatWaitsForItsAnswerIsAPrompt) {
  const auto chat = Load("a.jsonl", R"({"messages": [{"role": "user", "content": "U"}]})");
  ASSERT_TRUE(chat.ok()) << chat.status();
  EXPECT_THAT(chat->sequences,
              ElementsAre(DemoTokenizer().Encode("<|begin_of_sentence|>User: U\nAssistant: ")));
}

TEST_F(CalibrationTextTest, LimitsCutRecordsTokensAndSequences) {
  std::string lines;
  for (int i = 0; i < 4; ++i) lines += "{\"text\": \"a 1 b 2 c 3 d 4\"}\n";
  const auto whole = Load("a.jsonl", lines);
  ASSERT_TRUE(whole.ok()) << whole.status();
  ASSERT_EQ(whole->sequences.size(), 4u);
  const int64_t length = std::ssize(whole->sequences[0]);
  ASSERT_GT(length, 4);

  const auto two = Load("a.jsonl", lines, {.max_records = 2});
  ASSERT_TRUE(two.ok());
  EXPECT_EQ(two->sequences.size(), 2u);

  const auto tokens = Load("a.jsonl", lines, {.max_tokens = 2 * length + 3});
  ASSERT_TRUE(tokens.ok());
  ASSERT_EQ(tokens->sequences.size(), 3u);
  EXPECT_EQ(tokens->sequences[2].size(), 3u);
  EXPECT_EQ(tokens->num_tokens, 2 * length + 3);
  EXPECT_EQ(tokens->num_cut_records, 0);

  const auto cut = Load("a.jsonl", lines, {.max_sequence_tokens = 4});
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->num_cut_records, 4);
  for (const TokenSequence& sequence : cut->sequences) EXPECT_EQ(sequence.size(), 4u);
}

TEST_F(CalibrationTextTest, APlainTextIsCutIntoPieces) {
  const std::string words = "a 1 b 2\nc 3 d 4\n";
  const auto text = Load("a.txt", words, {.max_sequence_tokens = 4});
  ASSERT_TRUE(text.ok()) << text.status();
  TokenSequence joined;
  for (size_t i = 0; i < text->sequences.size(); ++i) {
    const TokenSequence& piece = text->sequences[i];
    if (i + 1 < text->sequences.size()) {
      EXPECT_EQ(piece.size(), 4u);
    }
    joined.insert(joined.end(), piece.begin(), piece.end());
  }
  EXPECT_EQ(joined, DemoTokenizer().Encode(words));
  EXPECT_EQ(text->num_cut_records, 0);

  // Without a newline at its end, and no further than wanted.
  const auto first =
      Load("a.txt", "a 1 b 2\nc 3 d 4", {.max_records = 1, .max_sequence_tokens = 4});
  ASSERT_TRUE(first.ok());
  EXPECT_THAT(first->sequences, ElementsAre(TokenSequence(joined.begin(), joined.begin() + 4)));
}

TEST_F(CalibrationTextTest, ALineOfPlainTextThatIsTooLongIsCutBetweenCharacters) {
  constexpr size_t kCharacters = (1 << 20) / 3 + 100;  // in one line, which one MiB cuts inside one
  std::string line;
  for (size_t i = 0; i < kCharacters; ++i) line += "明";
  const auto text = Load("a.txt", line, {.max_sequence_tokens = 1 << 20});
  ASSERT_TRUE(text.ok()) << text.status();
  std::string read;
  for (const TokenSequence& sequence : text->sequences) {
    for (const int32_t id : sequence) {
      const std::string bytes = DemoTokenizer().Bytes(id);
      ASSERT_NE(bytes.size(), 1u) << "a byte of a character";
      read += bytes;
    }
  }
  EXPECT_TRUE(read == line);
}

struct BadText {
  const char* name;
  const char* content;
  const char* message;  // after the file's name
};

class BadCalibrationText : public CalibrationTextTest,
                           public ::testing::WithParamInterface<BadText> {};

TEST_P(BadCalibrationText, NamesFileLineAndField) {
  const auto text = Load("bad.jsonl", GetParam().content);
  ASSERT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument) << text.status();
  EXPECT_THAT(std::string(text.status().message()),
              HasSubstr((dir_.path() / "bad.jsonl").string() + GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadCalibrationText,
    ::testing::Values(
        BadText{"Empty", "\n", ": found no text, expected some to calibrate on"},
        BadText{"OnlyEmptyTexts", "{\"text\": \"\"}", ": found no text"},
        BadText{"NoJson", "{\"text\": \"a\"}\nnot\n",
                ":2: must be a JSON object in UTF-8, got \"not\""},
        BadText{"NeitherKey", "{}", ":1: found neither of the keys text and messages"},
        BadText{"BothKeys", R"({"text": "a", "messages": []})", ":1: found both the keys"},
        BadText{"TextIsANumber", R"({"text": 3})", ":1: text: must be a text, got 3"},
        BadText{"NoMessage", R"({"messages": []})",
                ":1: messages: must be a list of messages, got []"},
        BadText{"UnknownRole",
                R"({"messages": [{"role": "user", "content": ""}, {"role": "x", "content": ""}]})",
                ":1: messages[1].role: this model's chat template has no words for 'x', allowed: "
                "system, user, assistant"}),
    [](const auto& info) { return info.param.name; });

TEST_F(CalibrationTextTest, AFileThatIsNotThereOrADirectoryIsNamed) {
  const auto missing =
      LoadCalibrationText(dir_.path() / "none.jsonl", DemoTokenizer(), CalibrationLimits());
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("none.jsonl"));
  const auto directory = LoadCalibrationText(dir_.path(), DemoTokenizer(), CalibrationLimits());
  EXPECT_FALSE(directory.ok());
  EXPECT_THAT(std::string(directory.status().message()), HasSubstr(dir_.path().string()));
}

}  // namespace
}  // namespace wintserve::quantizer
