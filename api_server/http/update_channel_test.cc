#include "api_server/http/update_channel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

using testing::ElementsAre;

constexpr int64_t kLimitBytes = 1000;

class UpdateChannelTest : public testing::Test {
 protected:
  std::vector<PromptUpdate> Take() { return channel_->Take(); }
  int num_news() {
    io_.restart();
    io_.poll();
    return num_news_;
  }

  boost::asio::io_context io_;
  int num_news_ = 0;
  std::shared_ptr<UpdateChannel> channel_ =
      std::make_shared<UpdateChannel>(io_.get_executor(), kLimitBytes, [this] { ++num_news_; });
};

TEST_F(UpdateChannelTest, MergesWhatWaitsIntoOneDeltaAChoice) {
  GenerationUpdate first = AcceptedUpdate();
  GenerationUpdate second;
  const auto logprob_of = [](float logprob) {
    TokenLogprobs logprobs;
    logprobs.token.logprob = logprob;
    return logprobs;
  };
  second.choices = {{1, "b", {11}, {}, {}}, {0, "a", {10}, {}, {logprob_of(-1)}}};
  second.num_prompt_tokens = 5;
  second.num_completion_tokens = 2;
  GenerationUpdate third;
  third.choices = {{0, "c", {12, 13}, FinishReason::kStop, {logprob_of(-2), logprob_of(-3)}}};
  third.num_prompt_tokens = 5;
  third.num_completion_tokens = 4;
  third.num_cached_tokens = 3;
  channel_->Push(0, first);
  channel_->Push(0, second);
  channel_->Push(0, third);

  const std::vector<PromptUpdate> updates = Take();
  ASSERT_EQ(updates.size(), 1u);
  const GenerationUpdate& merged = updates[0].update;
  EXPECT_EQ(merged.num_completion_tokens, 4);
  EXPECT_EQ(merged.num_cached_tokens, 3);
  EXPECT_FALSE(merged.finished);
  ASSERT_EQ(merged.choices.size(), 2u);
  EXPECT_EQ(merged.choices[0].index, 1);
  EXPECT_EQ(merged.choices[0].text, "b");
  EXPECT_FALSE(merged.choices[0].finish_reason.has_value());
  EXPECT_EQ(merged.choices[1].text, "ac");
  EXPECT_THAT(merged.choices[1].token_ids, ElementsAre(10, 12, 13));
  ASSERT_EQ(merged.choices[1].logprobs.size(), 3u);
  EXPECT_EQ(merged.choices[1].logprobs[0].token.logprob, -1);
  EXPECT_EQ(merged.choices[1].logprobs[2].token.logprob, -3);
  EXPECT_EQ(merged.choices[1].finish_reason, FinishReason::kStop);
  EXPECT_TRUE(Take().empty());
}

TEST_F(UpdateChannelTest, KeepsAPromptsLogprobsThatComeOnceAndCountsThem) {
  GenerationUpdate first = TextUpdate(0, "a");
  first.prompt_logprobs = {.token_ids = {5, 6}, .positions = {{-0.5f, 2, {}}}};
  channel_->Push(0, first);
  channel_->Push(0, TextUpdate(0, "b"));
  const std::vector<PromptUpdate> updates = Take();
  ASSERT_EQ(updates.size(), 1u);
  EXPECT_EQ(updates[0].update.choices[0].text, "ab");
  ASSERT_TRUE(updates[0].update.prompt_logprobs.has_value());
  EXPECT_EQ(updates[0].update.prompt_logprobs->positions, first.prompt_logprobs->positions);

  EXPECT_FALSE(channel_->is_over_limit());
  first.prompt_logprobs->positions.resize(kLimitBytes / sizeof(PositionLogprobs) + 1);
  channel_->Push(0, first);
  EXPECT_TRUE(channel_->is_over_limit());
}

TEST_F(UpdateChannelTest, KeepsTheTextBeforeAnError) {
  channel_->Push(0, TextUpdate(0, "begin"));
  channel_->Push(0, ErrorUpdate(absl::UnavailableError("gone")));
  const std::vector<PromptUpdate> updates = Take();
  ASSERT_EQ(updates.size(), 1u);
  EXPECT_TRUE(updates[0].update.finished);
  EXPECT_TRUE(absl::IsUnavailable(updates[0].update.error));
  ASSERT_EQ(updates[0].update.choices.size(), 1u);
  EXPECT_EQ(updates[0].update.choices[0].text, "begin");
}

TEST_F(UpdateChannelTest, KeepsPromptsApart) {
  channel_->Push(1, TextUpdate(0, "b"));
  channel_->Push(0, TextUpdate(0, "a"));
  channel_->Push(1, TextUpdate(0, "B"));
  const std::vector<PromptUpdate> updates = Take();
  ASSERT_EQ(updates.size(), 2u);
  EXPECT_EQ(updates[0].prompt_index, 0u);
  EXPECT_EQ(updates[0].update.choices[0].text, "a");
  EXPECT_EQ(updates[1].prompt_index, 1u);
  EXPECT_EQ(updates[1].update.choices[0].text, "bB");
}

TEST_F(UpdateChannelTest, TheLimitCountsTextAndIdsNotUpdates) {
  // Far more updates than bytes allowed, each of nothing.
  for (int i = 0; i < 10 * kLimitBytes; ++i) channel_->Push(0, TextUpdate(0, ""));
  EXPECT_FALSE(channel_->is_over_limit());
  channel_->Push(0, TextUpdate(0, std::string(kLimitBytes, 'a')));
  EXPECT_TRUE(channel_->is_over_limit());
  Take();
  EXPECT_FALSE(channel_->is_over_limit());

  GenerationUpdate ids = TextUpdate(0, "");
  ids.choices[0].token_ids.assign(kLimitBytes / sizeof(int32_t), 7);
  channel_->Push(0, ids);
  EXPECT_TRUE(channel_->is_over_limit());
}

TEST_F(UpdateChannelTest, TellsOnceOfAllThatCame) {
  channel_->Push(0, TextUpdate(0, "a"));
  channel_->Push(0, TextUpdate(0, "b"));
  EXPECT_EQ(num_news(), 1);
  channel_->Push(0, TextUpdate(0, "c"));
  EXPECT_EQ(num_news(), 2);
}

TEST_F(UpdateChannelTest, IsSilentAndEmptyOnceClosed) {
  channel_->Push(0, TextUpdate(0, std::string(2 * kLimitBytes, 'a')));
  channel_->Close();
  channel_->Push(0, TextUpdate(0, std::string(2 * kLimitBytes, 'a')));
  EXPECT_EQ(num_news(), 0);
  EXPECT_FALSE(channel_->is_over_limit());
  EXPECT_TRUE(Take().empty());
}

}  // namespace
}  // namespace wintserve
