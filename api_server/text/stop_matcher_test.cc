#include "api_server/text/stop_matcher.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace wintserve {
namespace {

struct Outcome {
  std::string text;
  bool stopped = false;
  bool operator==(const Outcome&) const = default;
};

Outcome MatchInStream(StopMatcher matcher, const std::vector<std::string>& pushes) {
  Outcome outcome;
  for (const std::string& push : pushes) outcome.text += matcher.Push(push);
  outcome.text += matcher.Flush();
  outcome.stopped = matcher.stopped();
  return outcome;
}

// Tries every end of a match in turn, and every stop string there.
Outcome MatchNaively(const std::string& text, const std::vector<std::string>& stops,
                     bool include_stop) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest > 0) return {text.substr(0, include_stop ? end : end - longest), true};
  }
  return {text, false};
}

TEST(StopMatcher, PassesTextThroughAtOnceWithoutStopStrings) {
  StopMatcher matcher({}, false);
  EXPECT_EQ(matcher.Push("床前明月光"), "床前明月光");
  EXPECT_EQ(matcher.Flush(), "");
  EXPECT_FALSE(matcher.stopped());
}

TEST(StopMatcher, HoldsBackWhatCouldBeTheBeginningOfAStopString) {
  StopMatcher matcher({"\n\nUser"}, false);
  EXPECT_EQ(matcher.Push("one\n"), "one");
  EXPECT_EQ(matcher.Push("\n"), "");
  EXPECT_EQ(matcher.Push("two"), "\n\ntwo");
}

TEST(StopMatcher, ShowsTheHeldBackTextWhenNoMoreComes) {
  StopMatcher matcher({"END"}, false);
  EXPECT_EQ(matcher.Push("the EN"), "the ");
  EXPECT_EQ(matcher.Flush(), "EN");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, FindsAStopStringThatIsSpreadOverPushes) {
  EXPECT_EQ(MatchInStream(StopMatcher({"STOP"}, false), {"a S", "T", "OP b"}),
            (Outcome{"a ", true}));
}

TEST(StopMatcher, KeepsTheStopStringIfAskedTo) {
  EXPECT_EQ(MatchInStream(StopMatcher({"STOP"}, true), {"a S", "T", "OP b"}),
            (Outcome{"a STOP", true}));
}

TEST(StopMatcher, DropsEverythingAfterAMatch) {
  StopMatcher matcher({"。"}, false);
  EXPECT_EQ(matcher.Push("好。不"), "好");
  EXPECT_EQ(matcher.Push("再。"), "");
  EXPECT_EQ(matcher.Flush(), "");
  EXPECT_TRUE(matcher.stopped());
}

TEST(StopMatcher, FindsAMatchThatStartsInsideAFailedOne) {
  EXPECT_EQ(MatchInStream(StopMatcher({"aab"}, false), {"a", "a", "a", "b"}), (Outcome{"a", true}));
}

TEST(StopMatcher, TakesTheMatchThatIsCompleteFirst) {
  EXPECT_EQ(MatchInStream(StopMatcher({"abcd", "bc"}, false), {"abcd"}), (Outcome{"a", true}));
}

TEST(StopMatcher, TakesTheLongestOfMatchesThatEndTogether) {
  EXPECT_EQ(MatchInStream(StopMatcher({"c", "abc", "bc"}, false), {"xabc"}), (Outcome{"x", true}));
}

TEST(StopMatcher, KeepsHoldingAcrossAnEmptyPush) {
  StopMatcher matcher({"ab"}, false);
  EXPECT_EQ(matcher.Push("a"), "");
  EXPECT_EQ(matcher.Push(""), "");
  EXPECT_EQ(matcher.Push("b"), "");
  EXPECT_TRUE(matcher.stopped());
}

TEST(StopMatcher, IgnoresAnEmptyStopString) {
  EXPECT_EQ(MatchInStream(StopMatcher({""}, false), {"a"}), (Outcome{"a", false}));
}

TEST(StopMatcher, HoldsBackNoMoreThanTheLongestPossibleBeginning) {
  StopMatcher matcher({"aaaaab", "ac"}, false);
  EXPECT_EQ(matcher.Push(std::string(1000, 'a')), std::string(995, 'a'));
}

// A small alphabet and short stop strings, so that overlaps and near misses are the rule.
TEST(StopMatcher, AgreesWithANaiveMatcherOnRandomTextHoweverItIsSplit) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  const auto random_text = [&](size_t max_length) {
    std::string text;
    for (size_t length = rng() % (max_length + 1); text.size() < length;) text += "ab"[rng() % 2];
    return text;
  };
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::string> stops(rng() % 4);
    for (std::string& stop : stops) stop = "a" + random_text(5);
    const std::string text = random_text(16);
    std::vector<std::string> pushes;
    for (size_t begin = 0; begin < text.size();) {
      pushes.push_back(text.substr(begin, rng() % 4));
      begin += pushes.back().size();
    }
    const bool include_stop = rng() % 2 != 0;
    ASSERT_EQ(MatchInStream(StopMatcher(stops, include_stop), pushes),
              MatchNaively(text, stops, include_stop))
        << fmt::format("text='{}' stops='{}'", text, fmt::join(stops, ","));
  }
}

TEST(StopMatcher, NeverShowsTextThatLaterTurnsOutToBelongToAMatch) {
  const std::string text = "aabaabaaab";
  StopMatcher matcher({"aabaaab"}, false);
  std::string shown;
  for (const char byte : text) {
    shown += matcher.Push(std::string(1, byte));
    ASSERT_TRUE(std::string("aab").starts_with(shown)) << shown;
  }
  EXPECT_EQ(shown, "aab");
}

}  // namespace
}  // namespace wintserve
