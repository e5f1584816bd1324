#include "api_server/llm/cache_link.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "api_server/llm/inbox.h"
#include "tests/fakes/fake_cache.h"

namespace wintserve {
namespace {

using testing::ElementsAre;

constexpr uint64_t kEpoch = 5;

class CacheLinkTest : public testing::Test {
 protected:
  CacheLinkOptions Options() {
    CacheEvents events;
    events.on_closed = [this](const absl::Status&) { news_.Push("lost"); };
    return {.connect = cache_.Connector(),
            .api_epoch = kEpoch,
            .events = events,
            .on_connected =
                [this](std::unique_ptr<CacheClient> client) {
                  client_ = std::move(client);
                  news_.Push("connected");
                },
            .on_refused =
                [this](const absl::Status& status) { news_.Push(std::string(status.message())); },
            .on_hang = [this] { news_.Push("hang told"); }};
  }
  std::vector<std::string> News() {
    return news_.WaitAndTake(std::chrono::steady_clock::now() + std::chrono::seconds(10));
  }

  FakeCache cache_;
  Inbox<std::string> news_;
  std::unique_ptr<CacheClient> client_;
};

TEST_F(CacheLinkTest, TriesUntilTheCacheManagerIsThere) {
  cache_.SetReachable(false);
  CacheLink link(Options());
  EXPECT_THAT(news_.WaitAndTake(std::chrono::steady_clock::now() + std::chrono::milliseconds(250)),
              ElementsAre());
  cache_.SetReachable(true);
  EXPECT_THAT(News(), ElementsAre("connected"));
}

TEST_F(CacheLinkTest, MakesALostSessionAnew) {
  CacheLink link(Options());
  EXPECT_THAT(News(), ElementsAre("connected"));
  cache_.DropSession();
  EXPECT_THAT(News(), ElementsAre("lost"));
  link.Reconnect(std::move(client_), /*hangs=*/false);
  EXPECT_THAT(News(), ElementsAre("connected"));
}

TEST_F(CacheLinkTest, TellsOfAHangBeforeItConnectsAgain) {
  CacheLink link(Options());
  EXPECT_THAT(News(), ElementsAre("connected"));
  cache_.SetReachable(false);
  link.Reconnect(std::move(client_), /*hangs=*/true);
  EXPECT_THAT(News(), ElementsAre("hang told"));
  cache_.SetReachable(true);
  EXPECT_THAT(News(), ElementsAre("connected"));
}

TEST_F(CacheLinkTest, ASessionThatIsLostWhileItIsMadeIsToldInOrder) {
  CacheLinkOptions options = Options();
  options.connect = [this](uint64_t epoch, CacheEvents events) {
    const auto on_closed = events.on_closed;
    auto client = cache_.Connector()(epoch, std::move(events));
    on_closed(absl::UnavailableError("gone again"));
    return client;
  };
  CacheLink link(std::move(options));
  std::vector<std::string> news = News();
  if (news.size() == 1) news.push_back(News().at(0));
  EXPECT_THAT(news, ElementsAre("connected", "lost"));
}

TEST_F(CacheLinkTest, ARefusalIsFinal) {
  CacheLinkOptions options = Options();
  options.connect = [](uint64_t, const CacheEvents&) {
    return absl::UnauthenticatedError("another instance's token");
  };
  CacheLink link(std::move(options));
  EXPECT_THAT(News(), ElementsAre("another instance's token"));
}

TEST_F(CacheLinkTest, EndsWhileItTries) {
  cache_.SetReachable(false);
  CacheLink link(Options());
}

}  // namespace
}  // namespace wintserve
