#include "tools/eval/items.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tools/eval/temporary_file_test_util.h"

namespace wintserve::eval {
namespace {

using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

TEST(EvalItems, AChatIsReadWithItsPlace) {
  const TemporaryFile file(
      "\n"
      R"({"messages": [{"role": "user", "content": "早"}]})"
      "\n");
  const auto chats = ReadChats(file.path(), 0);
  ASSERT_TRUE(chats.ok()) << chats.status();
  ASSERT_EQ(chats->size(), 1u);
  EXPECT_THAT((*chats)[0].place, EndsWith(":2"));
  EXPECT_EQ((*chats)[0].messages[0].content, "早");
}

TEST(EvalItems, NoLineBehindTheLimitIsRead) {
  const TemporaryFile file(R"({"prompt": "p", "answer": " a\n"})"
                           "\nno JSON\n");
  const auto items = ReadExactItems(file.path(), 1);
  ASSERT_TRUE(items.ok()) << items.status();
  EXPECT_THAT((*items)[0].answers, ElementsAre("a"));
  EXPECT_THAT(MessageOf(ReadExactItems(file.path(), 2).status()),
              EndsWith(":2: must be a JSON object in UTF-8, got \"no JSON\""));
}

TEST(EvalItems, TheRightChoiceIsAnIndexALetterOrTheTextItself) {
  const TemporaryFile file(R"({"question": "q", "choices": ["x", "y", "A"], "answer": 1})"
                           "\n"
                           R"({"prompt": "q", "choices": ["x", "y"], "answer": "y"})"
                           "\n"
                           R"({"prompt": "q", "choices": ["x", "y"], "answer": "b"})"
                           "\n"
                           R"({"prompt": "q", "choices": ["x", "y", "A"], "answer": "A"})"
                           "\n");
  const auto items = ReadChoices(file.path(), 0);
  ASSERT_TRUE(items.ok()) << items.status();
  std::vector<size_t> answers;
  for (const ChoiceItem& item : *items) answers.push_back(item.answer);
  EXPECT_THAT(answers, ElementsAre(1u, 1u, 1u, 2u));
}

TEST(EvalItems, AFileThatDoesNotEndInJsonlIsOneDocument) {
  const TemporaryFile file("line one\nline two\n", ".txt");
  std::vector<std::string> texts;
  ASSERT_TRUE(ReadDocuments(file.path(), [&](const std::string& text) {
                texts.push_back(text);
                return true;
              }).ok());
  EXPECT_THAT(texts, ElementsAre("line one\nline two\n"));
}

TEST(EvalItems, AFileThatIsMissingIsNamed) {
  EXPECT_EQ(ReadChats("no-such-file.jsonl", 0).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(MessageOf(ReadChats("no-such-file.jsonl", 0).status()),
              HasSubstr("no-such-file.jsonl"));
}

enum class Set { kChats, kChoices, kExact, kDocuments };

absl::Status Read(Set set, const std::string& path) {
  switch (set) {
    case Set::kChats:
      return ReadChats(path, 0).status();
    case Set::kChoices:
      return ReadChoices(path, 0).status();
    case Set::kExact:
      return ReadExactItems(path, 0).status();
    case Set::kDocuments:
      return ReadDocuments(path, [](const std::string&) { return true; });
  }
  return absl::OkStatus();
}

struct BadLine {
  const char* name;
  Set set;
  std::string line;
  const char* error;
};

class BadItem : public testing::TestWithParam<BadLine> {};

TEST_P(BadItem, IsNamedByFileLineAndField) {
  const TemporaryFile file(GetParam().line + "\n");
  const absl::Status status = Read(GetParam().set, file.path());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MessageOf(status), file.path() + GetParam().error);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadItem,
    testing::Values(
        BadLine{"NoJson", Set::kChats, "{", ":1: must be a JSON object in UTF-8, got \"{\""},
        BadLine{"Empty", Set::kChoices, "", ": holds no item"},
        BadLine{"NoMessages", Set::kChats, "{}", ":1: messages: is missing"},
        BadLine{"NoPrompt", Set::kExact, R"({"answer": "x"})", ":1: prompt: is missing"},
        BadLine{"EmptyQuestion", Set::kExact, R"({"question": "", "answer": "x"})",
                ":1: question: must not be empty"},
        BadLine{"NoAnswer", Set::kExact, R"({"prompt": "p"})", ":1: answer: is missing"},
        BadLine{"BlankAnswer", Set::kExact, R"({"prompt": "p", "answer": " "})",
                ":1: answer: must not be empty"},
        BadLine{"AnswerNumber", Set::kExact, R"({"prompt": "p", "answer": 4})",
                ":1: answer: must be a text or a list of texts, got 4"},
        BadLine{"OneChoice", Set::kChoices, R"({"prompt": "p", "choices": ["x"], "answer": 0})",
                ":1: choices: must be a list of 2 to 26 texts, got [\"x\"]"},
        BadLine{"EmptyChoice", Set::kChoices,
                R"({"prompt": "p", "choices": ["x", ""], "answer": 0})",
                ":1: choices[1]: must not be empty"},
        BadLine{"SameChoice", Set::kChoices,
                R"({"prompt": "p", "choices": ["x", "y", "x"], "answer": 2})",
                ":1: choices[2]: must differ from choices[0]"},
        BadLine{"AnswerBeyond", Set::kChoices,
                R"({"prompt": "p", "choices": ["x", "y"], "answer": 2})",
                ":1: answer: must be an index from 0 to 1, a letter from A to B, or one of the "
                "choices, got 2"},
        BadLine{"LetterBeyond", Set::kChoices,
                R"({"prompt": "p", "choices": ["x", "y"], "answer": "C"})",
                ":1: answer: must be an index from 0 to 1, a letter from A to B, or one of the "
                "choices, got \"C\""},
        BadLine{"TextNumber", Set::kDocuments, R"({"text": 1})",
                ":1: text: must be a text, got 1"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::eval
