#include "tools/eval/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/exit_code.h"

namespace wintserve::eval {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

CommandLine Parse(std::vector<const char*> words, const char* key = nullptr) {
  words.insert(words.begin(), "wintserve eval");
  return ParseCommandLine(static_cast<int>(words.size()), words.data(), [key](const char* name) {
    return std::string(name) == "FD_API_KEY" ? key : nullptr;
  });
}

TEST(EvalOptions, ALimitIsOfTheTaskBeforeItAndInFrontOfAllOfEveryTask) {
  const CommandLine command =
      Parse({"--model", "m", "--limit", "7", "--exact", "a", "--perplexity", "b", "--limit=40",
             "--exact", "c", "--limit", "200", "--chat-loss", "d"});
  ASSERT_EQ(command.error, "");
  const std::vector<TaskOptions>& tasks = command.options.tasks;
  ASSERT_EQ(tasks.size(), 4u);
  EXPECT_EQ(tasks[0].kind, TaskKind::kExact);
  EXPECT_EQ(tasks[0].file, "a");
  EXPECT_EQ(tasks[0].limit, 7);
  EXPECT_EQ(tasks[1].kind, TaskKind::kPerplexity);
  EXPECT_EQ(tasks[1].limit, 40);
  EXPECT_EQ(tasks[2].file, "c");
  EXPECT_EQ(tasks[2].limit, 200);
  EXPECT_EQ(tasks[3].kind, TaskKind::kChatLoss);
  EXPECT_EQ(tasks[3].limit, 7);
}

TEST(EvalOptions, WhatStandsBehindTwoDashesIsForTheServer) {
  const CommandLine command =
      Parse({"--model", "m", "--exact", "a", "--", "--device", "cuda", "--limit", "3"});
  ASSERT_EQ(command.error, "");
  EXPECT_THAT(command.options.server_flags, ElementsAre("--device", "cuda", "--limit", "3"));
  EXPECT_EQ(command.options.tasks[0].limit, 0);
}

TEST(EvalOptions, TheTokenizerIsThatOfTheModelUnlessSaidOtherwise) {
  EXPECT_EQ(Parse({"--model", "m", "--exact", "a"}).options.tokenizer, "m");
  EXPECT_EQ(Parse({"--model", "m", "--tokenizer", "t", "--exact", "a"}).options.tokenizer, "t");
}

TEST(EvalOptions, ExactAnswersOfAServerNeedNoTokenizer) {
  EXPECT_EQ(Parse({"--server", "http://h", "--exact", "a"}).error, "");
}

TEST(EvalOptions, ALimitIsTheNumberThatItsCheckHasRead) {
  EXPECT_EQ(Parse({"--model", "m", "--exact", "a", "--limit", "0x10"}).options.tasks[0].limit, 16);
}

TEST(EvalOptions, TheKeyOfTheEnvironmentIsTakenWhereNoneIsGiven) {
  EXPECT_EQ(Parse({"--server", "http://h", "--exact", "a"}).options.api_key, "");
  EXPECT_EQ(Parse({"--server", "http://h", "--exact", "a"}, ",e1,e2").options.api_key, "e1");
  EXPECT_EQ(
      Parse({"--server", "http://h", "--exact", "a", "--api-key", "f"}, "e1,e2").options.api_key,
      "f");
}

TEST(EvalOptions, HelpIsForStdout) {
  const CommandLine command = Parse({"--help"});
  EXPECT_EQ(command.exit_code, 0);
  EXPECT_THAT(command.print, HasSubstr("--multiple-choice"));
  EXPECT_EQ(command.error, "");
}

struct BadCommand {
  const char* name;
  std::vector<const char*> words;
  const char* error;
};

class BadCommandLine : public testing::TestWithParam<BadCommand> {};

TEST_P(BadCommandLine, IsNamedInOneLine) {
  const CommandLine command = Parse(GetParam().words);
  EXPECT_EQ(command.exit_code, kExitUsage);
  EXPECT_THAT(command.error, HasSubstr(GetParam().error));
  EXPECT_EQ(command.error.find('\n'), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadCommandLine,
    testing::Values(
        BadCommand{"NoTask", {"--model", "m"}, "nothing to do: give --perplexity"},
        BadCommand{"NoModel", {"--exact", "a"}, "give --model DIR or --server URL"},
        BadCommand{"Both", {"--exact", "a", "--model", "m", "--server", "u"}, "exclude each other"},
        BadCommand{"FlagsForNoServer",
                   {"--exact", "a", "--server", "u", "--", "--device", "cuda"},
                   "--device: flags behind \"--\""},
        BadCommand{"LogOfNoServer",
                   {"--exact", "a", "--server", "u", "--server-log", "l"},
                   "--server-log"},
        BadCommand{
            "NoTokenizer", {"--chat-loss", "a", "--server", "u"}, "--tokenizer: chat loss needs"},
        BadCommand{"LimitZero", {"--model", "m", "--exact", "a", "--limit", "0"}, "--limit"},
        BadCommand{"LimitNoNumber", {"--model", "m", "--exact", "a", "--limit", "x"}, "--limit"},
        BadCommand{"NoFile", {"--model", "m", "--exact"}, "--exact"},
        BadCommand{"EmptyFile", {"--model", "m", "--exact", ""}, "--exact: must not be empty"},
        BadCommand{"EmptyReport",
                   {"--model", "m", "--exact", "a", "--json", ""},
                   "--json: must not be empty"},
        BadCommand{"EmptyModel", {"--model", "", "--exact", "a"}, "--model: must not be empty"},
        BadCommand{"ModelOfTheServer",
                   {"--model", "m", "--exact", "a", "--", "--model", "n"},
                   "--model: must not stand behind \"--\"; give it in front"},
        BadCommand{"KeyOfTheServer",
                   {"--model", "m", "--exact", "a", "--", "--device", "cpu", "--api-key=k"},
                   "--api-key: must not stand behind \"--\"; give it in front"},
        BadCommand{"PortOfTheServer",
                   {"--model", "m", "--exact", "a", "--", "--port", "1"},
                   "--port: must not stand behind \"--\"; eval chooses one"},
        BadCommand{"Context",
                   {"--model", "m", "--exact", "a", "--context-tokens", "1"},
                   "--context-tokens"},
        BadCommand{"Unknown", {"--model", "m", "--exact", "a", "--foo"}, "--foo"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::eval
