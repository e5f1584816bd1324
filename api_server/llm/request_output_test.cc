#include "api_server/llm/request_output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/fakes/fake_tokenizer.h"

namespace wintserve {
namespace {

using testing::SizeIs;

class RequestOutputTest : public testing::Test {
 protected:
  RequestOutput Make(int num_choices, std::vector<std::string> stop = {}) {
    GenerationRequest request{
        .id = "test", .prompt_ids = {1, 2, 3}, .num_choices = num_choices, .stop = std::move(stop)};
    return RequestOutput(tokenizer_, request,
                         [this](const GenerationUpdate& update) { updates_.push_back(update); });
  }
  static SequenceToken News(char byte, uint32_t choice = 0,
                            std::optional<SequenceEnd> end = std::nullopt) {
    return {{1, choice}, FakeTokenizer::IdOfByte(byte), end, {}};
  }

  static SequenceToken WithPromptLogprobs(SequenceToken news) {
    news.prompt_logprobs = {{-0.5f, 2, {{9, -0.25f}}}, {-1.5f, 1, {{3, -1.5f}}}};
    return news;
  }

  RequestOutput MakeFor(const GenerationRequest& request) {
    return RequestOutput(tokenizer_, request,
                         [this](const GenerationUpdate& update) { updates_.push_back(update); });
  }

  static SequenceToken WithLogprobs(SequenceToken news) {
    news.logprobs = {-1.0f, 1, {}};
    return news;
  }

  FakeTokenizer tokenizer_;
  std::vector<GenerationUpdate> updates_;
};

TEST_F(RequestOutputTest, TheFirstUpdateSaysThatTheRequestIsAccepted) {
  RequestOutput output = Make(1);
  output.Accept();
  ASSERT_THAT(updates_, SizeIs(1));
  EXPECT_THAT(updates_[0].choices, SizeIs(0));
  EXPECT_FALSE(updates_[0].finished);
  output.set_num_cached_tokens(64);
  output.Fail(absl::DeadlineExceededError("late"));
  EXPECT_EQ(updates_[1].num_cached_tokens, 64);
  EXPECT_TRUE(updates_[1].finished);
  EXPECT_EQ(updates_[1].error.message(), "late");
}

TEST_F(RequestOutputTest, PromptLogprobsComeOnceWithTheFirstChoicesFirstToken) {
  RequestOutput output = MakeFor(
      {.id = "test", .prompt_ids = {1, 2, 3}, .num_prompt_top_logprobs = 1, .num_choices = 2});
  output.Append(WithPromptLogprobs(News('a', 0)));
  output.Deliver();
  output.Append(News('b', 0));
  output.Append(News('c', 1));
  output.Deliver();
  ASSERT_THAT(updates_, SizeIs(2));
  ASSERT_TRUE(updates_[0].prompt_logprobs.has_value());
  EXPECT_EQ(updates_[0].prompt_logprobs->token_ids, (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(updates_[0].prompt_logprobs->positions, WithPromptLogprobs({}).prompt_logprobs);
  EXPECT_EQ(updates_[0].choices[0].text, "a");
  EXPECT_FALSE(updates_[1].prompt_logprobs.has_value());
}

TEST_F(RequestOutputTest, PromptLogprobsOfOneTokenAreThatToken) {
  RequestOutput output = MakeFor({.id = "test", .prompt_ids = {1}, .num_prompt_top_logprobs = 0});
  output.Append(News('a'));
  output.Deliver();
  ASSERT_TRUE(updates_[0].prompt_logprobs.has_value());
  EXPECT_THAT(updates_[0].prompt_logprobs->token_ids, SizeIs(1));
  EXPECT_THAT(updates_[0].prompt_logprobs->positions, SizeIs(0));
}

TEST_F(RequestOutputTest, WithoutTokensEachChoiceEndsWithNothing) {
  RequestOutput output = MakeFor({.id = "test",
                                  .prompt_ids = {1, 2, 3},
                                  .num_prompt_top_logprobs = 1,
                                  .num_choices = 2,
                                  .max_tokens = 0});
  // A stop token or not: nothing was to be generated.
  EXPECT_FALSE(output.Append(WithPromptLogprobs(News('a', 0, SequenceEnd::kStop))));
  EXPECT_FALSE(output.Append(News('b', 1, SequenceEnd::kLength)));
  EXPECT_TRUE(output.finished());
  output.Deliver();
  ASSERT_THAT(updates_, SizeIs(1));
  EXPECT_TRUE(updates_[0].finished);
  EXPECT_TRUE(updates_[0].prompt_logprobs.has_value());
  EXPECT_EQ(updates_[0].num_completion_tokens, 0);
  ASSERT_THAT(updates_[0].choices, SizeIs(2));
  for (const ChoiceDelta& delta : updates_[0].choices) {
    EXPECT_EQ(delta.text, "");
    EXPECT_THAT(delta.token_ids, SizeIs(0));
    EXPECT_EQ(delta.finish_reason, FinishReason::kLength);
  }
}

TEST_F(RequestOutputTest, DeliversOneUpdateForAllChoicesOfAStep) {
  RequestOutput output = Make(2);
  output.Append(News('a', 1));
  output.Append(News('b', 0));
  output.Deliver();
  output.Deliver();  // nothing new
  ASSERT_THAT(updates_, SizeIs(1));
  ASSERT_THAT(updates_[0].choices, SizeIs(2));
  EXPECT_EQ(updates_[0].choices[0].index, 1);
  EXPECT_EQ(updates_[0].choices[0].text, "a");
  EXPECT_EQ(updates_[0].num_completion_tokens, 2);
  EXPECT_FALSE(updates_[0].finished);
}

TEST_F(RequestOutputTest, HoldsBackHalfACharacterAndReportsItsTokensAtOnce) {
  RequestOutput output = Make(1);
  output.Append(News('\xc3'));
  output.Deliver();
  output.Append(News('\xa9'));
  output.Deliver();
  ASSERT_THAT(updates_, SizeIs(2));
  EXPECT_EQ(updates_[0].choices[0].text, "");
  EXPECT_THAT(updates_[0].choices[0].token_ids, SizeIs(1));
  EXPECT_EQ(updates_[1].choices[0].text, "é");
}

TEST_F(RequestOutputTest, AtTheLengthLimitWhatWasHeldBackComesOut) {
  RequestOutput output = Make(1, {"stop"});
  output.Append(News('s'));
  output.Append(News('t'));
  output.Append(News('\xc3', 0, SequenceEnd::kLength));
  output.Deliver();
  EXPECT_EQ(updates_[0].choices[0].text, "st\uFFFD");
  EXPECT_EQ(updates_[0].choices[0].finish_reason, FinishReason::kLength);
  EXPECT_TRUE(updates_[0].finished);
}

TEST_F(RequestOutputTest, SaysThatAStopStringWasMetUnlessTheSequenceHadEndedAnyway) {
  RequestOutput early = Make(1, {"ab"});
  EXPECT_FALSE(early.Append(News('a')));
  EXPECT_TRUE(early.Append(News('b')));
  EXPECT_TRUE(early.finished());
  RequestOutput late = Make(1, {"ab"});
  EXPECT_FALSE(late.Append(News('a')));
  EXPECT_FALSE(late.Append(News('b', 0, SequenceEnd::kLength)));
  late.Deliver();
  EXPECT_EQ(updates_[0].choices[0].finish_reason, FinishReason::kStop);
  EXPECT_EQ(updates_[0].choices[0].text, "");
}

// The tokens of an update's first choice that have log-probabilities, and where they begin.
std::vector<std::pair<std::string, int>> LogprobTokens(const GenerationUpdate& update) {
  std::vector<std::pair<std::string, int>> tokens;
  for (const TokenLogprobs& logprobs : update.choices.at(0).logprobs) {
    tokens.emplace_back(logprobs.token.text, logprobs.text_offset);
  }
  return tokens;
}
using Tokens = std::vector<std::pair<std::string, int>>;

TEST_F(RequestOutputTest, LogprobsNameTheTokensAndComeWithTheirText) {
  RequestOutput output = Make(1);
  SequenceToken news = News('a');
  news.logprobs = {
      -0.5f, 2, {{FakeTokenizer::IdOfByte('b'), -0.25f}, {FakeTokenizer::IdOfByte('\xe6'), -1.5f}}};
  output.Append(news);
  output.Deliver();
  const std::vector<TokenLogprobs>& logprobs = updates_.at(0).choices.at(0).logprobs;
  ASSERT_THAT(logprobs, SizeIs(1));
  EXPECT_EQ(logprobs[0].token.token_id, FakeTokenizer::IdOfByte('a'));
  EXPECT_EQ(logprobs[0].token.text, "a");
  EXPECT_EQ(logprobs[0].token.logprob, -0.5f);
  EXPECT_EQ(logprobs[0].rank, 2);
  ASSERT_THAT(logprobs[0].top, SizeIs(2));
  EXPECT_EQ(logprobs[0].top[0].text, "b");
  EXPECT_EQ(logprobs[0].top[1].text, "bytes:\\xe6");
  EXPECT_EQ(logprobs[0].top[1].bytes, "\xe6");
  EXPECT_EQ(logprobs[0].top[1].logprob, -1.5f);
}

TEST_F(RequestOutputTest, LogprobsOfHeldBackTextWaitForIt) {
  RequestOutput output = Make(1, {"cd"});
  for (const char byte : std::string("é")) {
    output.Append(WithLogprobs(News(byte)));
    output.Deliver();
  }
  EXPECT_EQ(LogprobTokens(updates_[0]), Tokens());
  EXPECT_EQ(LogprobTokens(updates_[1]), (Tokens{{"bytes:\\xc3", 0}, {"bytes:\\xa9", 0}}));
  output.Append(WithLogprobs(News('c')));  // may be the beginning of the stop string
  output.Deliver();
  EXPECT_EQ(LogprobTokens(updates_[2]), Tokens());
  output.Append(WithLogprobs(News('x')));
  output.Deliver();
  EXPECT_EQ(LogprobTokens(updates_[3]), (Tokens{{"c", 1}, {"x", 2}}));
}

TEST_F(RequestOutputTest, LogprobsLeaveOutTheStopTokenAndWhatAStopStringCovers) {
  RequestOutput by_string = Make(1, {"bc"});
  for (const char byte : std::string("abc")) by_string.Append(WithLogprobs(News(byte)));
  by_string.Deliver();
  EXPECT_EQ(updates_[0].choices[0].text, "a");
  EXPECT_EQ(LogprobTokens(updates_[0]), (Tokens{{"a", 0}}));
  RequestOutput by_token = Make(1);
  by_token.Append(WithLogprobs(News('a')));
  by_token.Append(WithLogprobs(News('b', 0, SequenceEnd::kStop)));
  by_token.Deliver();
  EXPECT_EQ(LogprobTokens(updates_[1]), (Tokens{{"a", 0}}));
}

TEST_F(RequestOutputTest, LogprobsHaveTheStopTokenBehindTheTextWhereItIsAskedFor) {
  RequestOutput output =
      MakeFor({.id = "test", .prompt_ids = {1}, .stop_token_has_logprobs = true, .stop = {"bx"}});
  for (const char byte : std::string("ab")) output.Append(WithLogprobs(News(byte)));
  output.Append(WithLogprobs(News('z', 0, SequenceEnd::kStop)));
  output.Deliver();
  EXPECT_EQ(updates_[0].choices[0].text, "ab");
  EXPECT_EQ(LogprobTokens(updates_[0]), (Tokens{{"a", 0}, {"b", 1}, {"z", 2}}));
}

TEST_F(RequestOutputTest, AtTheLengthLimitTheLogprobsOfEveryTokenCome) {
  RequestOutput output = Make(1, {"stop"});
  output.Append(WithLogprobs(News('s')));
  output.Append(WithLogprobs(News('\xc3', 0, SequenceEnd::kLength)));
  output.Deliver();
  EXPECT_EQ(LogprobTokens(updates_[0]), (Tokens{{"s", 0}, {"bytes:\\xc3", 1}}));
}

TEST_F(RequestOutputTest, AnErrorBringsWhatWasNotDeliveredYet) {
  RequestOutput output = Make(1);
  output.Append(News('a'));
  output.Fail(absl::UnavailableError("gone"));
  ASSERT_THAT(updates_, SizeIs(1));
  EXPECT_EQ(updates_[0].choices[0].text, "a");
  EXPECT_TRUE(updates_[0].finished);
  EXPECT_EQ(updates_[0].error.message(), "gone");
}

}  // namespace
}  // namespace wintserve
