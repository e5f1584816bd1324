#include "api_server/scheduler/waiting_queue.h"

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace wintserve {
namespace {

using testing::ElementsAre;

// A queue and what waits in it; the ids of sequences are their arrival numbers.
class Queue {
 public:
  explicit Queue(int max_seqs_per_tenant) : queue(max_seqs_per_tenant) {}

  // tenant "": none.
  Sequence* Insert(int priority, const std::string& tenant) {
    auto request = std::make_shared<Request>();
    if (!tenant.empty()) request->tenant = &tenants[tenant];
    Sequence& sequence = sequences_.emplace_back();
    sequence.request = std::move(request);
    sequence.rank = {priority, static_cast<uint64_t>(sequences_.size())};
    queue.Insert(&sequence, /*num_tokens=*/10);
    return &sequence;
  }

  // What a step looks at that starts nobody.
  std::vector<uint64_t> Walk() const {
    std::vector<uint64_t> ids;
    QueueWalk walk(queue);
    while (const Sequence* sequence = walk.Next()) {
      ids.push_back(sequence->rank.arrival);
      walk.CountIn();
    }
    return ids;
  }

  void Check() const {
    const absl::Status status = queue.CheckInvariants(tenants);
    ASSERT_TRUE(status.ok()) << status;
  }

  std::unordered_map<std::string, Tenant> tenants;
  WaitingQueue queue;

 private:
  std::list<Sequence> sequences_;
};

TEST(WaitingQueue, ASequenceOfATenantAtItsCapIsParkedAndNoWalkMeetsIt) {
  Queue q(/*max_seqs_per_tenant=*/2);
  for (int i = 0; i < 10'000; ++i) q.Insert(0, "a");
  EXPECT_EQ(q.queue.num_in_line(), 2);
  EXPECT_THAT(q.Walk(), ElementsAre(1, 2));
  QueueWalk walk(q.queue);
  q.queue.Start(walk.Next());
  q.queue.Start(walk.Next());
  EXPECT_EQ(walk.Next(), nullptr);
  q.Insert(0, "");
  q.Insert(0, "b");
  EXPECT_EQ(q.queue.num_in_line(), 2);
  EXPECT_EQ(q.queue.size(), 10'000);
  EXPECT_THAT(q.Walk(), ElementsAre(10'001, 10'002));
  q.Check();
}

TEST(WaitingQueue, TheFirstOfTheParkedTakesItsOldPlaceInLineWhenItsTenantHasRoom) {
  Queue q(1);
  q.queue.Start(q.Insert(0, "a"));
  for (const char* tenant : {"", "a", "", "a"}) q.Insert(0, tenant);
  EXPECT_THAT(q.Walk(), ElementsAre(2, 4));
  q.queue.StopRunning(&q.tenants["a"]);
  EXPECT_THAT(q.Walk(), ElementsAre(2, 3, 4));
  q.Check();
}

TEST(WaitingQueue, ALowerPriorityValueTakesTheRoomOfItsTenant) {
  Queue q(1);
  Sequence* first = q.Insert(1, "a");
  q.Insert(1, "");
  Sequence* urgent = q.Insert(0, "a");
  EXPECT_THAT(q.Walk(), ElementsAre(3, 2));
  q.queue.Remove(urgent);
  EXPECT_THAT(q.Walk(), ElementsAre(1, 2));
  q.queue.Remove(first);
  EXPECT_THAT(q.Walk(), ElementsAre(2));
  q.Check();
}

TEST(WaitingQueue, WhoIsPassedOverLeavesTheRoomToTheNextOfItsTenant) {
  Queue q(1);
  for (const char* tenant : {"a", "", "a", "a"}) q.Insert(0, tenant);
  QueueWalk walk(q.queue);
  EXPECT_EQ(walk.Next()->rank.arrival, 1u);  // it is passed over
  EXPECT_EQ(walk.Next()->rank.arrival, 2u);
  Sequence* next = walk.Next();
  EXPECT_EQ(next->rank.arrival, 3u);
  q.queue.Start(next);
  EXPECT_EQ(walk.Next(), nullptr);
  EXPECT_THAT(q.Walk(), ElementsAre(2));
  q.Check();
}

class WaitingQueuePrediction : public testing::Test {
 protected:
  static constexpr int kSeconds = 300;  // ten times as long as a drain rate remembers

  void PassSecond() { q_.queue.Advance(now_us_ += 1'000'000); }
  void Insert(int count, const std::string& tenant) {
    for (int i = 0; i < count; ++i) q_.Insert(0, tenant);
  }
  // A step in which one sequence of the tenant ends and the first one in line starts.
  void Turn(const std::string& tenant) {
    q_.queue.StopRunning(&q_.tenants[tenant]);
    StartFirst();
  }
  void StartFirst() {
    QueueWalk walk(q_.queue);
    q_.queue.Start(walk.Next());
  }
  std::optional<double> WaitSeconds(const std::string& tenant, int priority = 0) {
    q_.Check();
    return q_.queue.WaitSeconds(priority, tenant.empty() ? nullptr : &q_.tenants[tenant]);
  }

  Queue q_{/*max_seqs_per_tenant=*/1};

 private:
  int64_t now_us_ = 0;
};

TEST_F(WaitingQueuePrediction, CountsAllThatGoBeforeByPriority) {
  Insert(kSeconds + 20, "");
  for (int i = 0; i < 5; ++i) q_.Insert(/*priority=*/7, "");
  for (int i = 0; i < kSeconds; ++i) {
    PassSecond();
    StartFirst();
  }
  EXPECT_NEAR(*WaitSeconds("", 0), 21, 0.1);
  EXPECT_NEAR(*WaitSeconds("", 7), 26, 0.1);
  EXPECT_NEAR(*WaitSeconds("", -1), 1, 0.1);
}

TEST_F(WaitingQueuePrediction, OfTenantsAtTheirCapOnlyTheirOwnNewcomersWait) {
  Insert(1, "a");
  StartFirst();
  Insert(kSeconds + 1000, "a");
  for (int i = 0; i < kSeconds; ++i) {
    PassSecond();
    Turn("a");
  }
  EXPECT_EQ(WaitSeconds(""), std::nullopt);
  EXPECT_EQ(WaitSeconds("b"), std::nullopt);
  EXPECT_NEAR(*WaitSeconds("a"), 1001, 1);
  PassSecond();
  q_.queue.StopRunning(&q_.tenants["a"]);  // and the next one is about to start
  EXPECT_EQ(WaitSeconds(""), std::nullopt);
}

// However fast a tenant's sequences follow one another, the others do not come forward by it.
TEST_F(WaitingQueuePrediction, TheLineMovesAtItsOwnPace) {
  Insert(1, "a");
  StartFirst();
  Insert(kSeconds * 10 + 1000, "a");
  Insert(kSeconds / 5 + 10, "");
  for (int i = 1; i <= kSeconds; ++i) {
    PassSecond();
    for (int turn = 0; turn < 10; ++turn) Turn("a");
    if (i % 5 == 0) StartFirst();
  }
  EXPECT_NEAR(*WaitSeconds(""), 55, 1);
}

TEST_F(WaitingQueuePrediction, WhoComesOutOfParkingBehindOthersStandsInLineLikeThem) {
  Insert(1, "a");
  StartFirst();
  Insert(kSeconds, "");
  Insert(2, "a");
  q_.queue.StopRunning(&q_.tenants["a"]);
  for (int i = 0; i < kSeconds; ++i) {
    PassSecond();
    StartFirst();
  }
  EXPECT_NEAR(*WaitSeconds(""), 2, 0.1);  // one of a stands in line, the other is parked
  EXPECT_NEAR(*WaitSeconds("b"), 2, 0.1);
}

// Against a walk over all that wait.
class Comparison {
 public:
  explicit Comparison(uint32_t seed) : rng_(seed), cap_(1 + Below(3)), q_(cap_) {}

  void Run() {
    for (int i = 0; i < 300 && !testing::Test::HasFailure(); ++i) {
      switch (Below(5)) {
        case 0:
        case 1:
          Insert();
          break;
        case 2:
          if (!waiting_.empty()) Remove();
          break;
        case 3:
          StopOne();
          break;
        default:
          Walk();
      }
      q_.Check();
      ASSERT_EQ(q_.queue.size(), static_cast<int>(waiting_.size()));
      ASSERT_EQ(q_.queue.num_tokens(), 10 * static_cast<int64_t>(waiting_.size()));
    }
  }

 private:
  int Below(int bound) { return static_cast<int>(rng_() % bound); }

  void Insert() {
    const char* const tenants[] = {"", "a", "b", "c"};
    Sequence* sequence = q_.Insert(Below(3), tenants[Below(4)]);
    waiting_.insert(sequence);
  }

  void Remove() {
    Sequence* sequence = *std::next(waiting_.begin(), Below(static_cast<int>(waiting_.size())));
    waiting_.erase(sequence);
    q_.queue.Remove(sequence);
    if (Below(2) == 0) return;
    q_.queue.Insert(sequence, 10);  // it comes back to its old place
    waiting_.insert(sequence);
  }

  void StopOne() {
    for (auto& [name, tenant] : q_.tenants) {
      if (num_running_[&tenant] == 0) continue;
      --num_running_[&tenant];
      return q_.queue.StopRunning(&tenant);
    }
  }

  void Walk() {
    QueueWalk walk(q_.queue);
    std::map<const Tenant*, int> counted_in;
    const auto all = waiting_;
    for (Sequence* sequence : all) {
      Tenant* tenant = sequence->request->tenant;
      if (tenant != nullptr && num_running_[tenant] + counted_in[tenant] >= cap_) continue;
      ASSERT_EQ(walk.Next(), sequence);
      switch (Below(5)) {
        case 0:
          return;
        case 1:
          walk.CountIn();
          ++counted_in[tenant];
          break;
        case 2:
        case 3:
          q_.queue.Start(sequence);
          waiting_.erase(sequence);
          if (tenant == nullptr) break;
          ++num_running_[tenant];
          if (Below(2) == 0) break;
          q_.queue.StopRunning(tenant);  // a single token was all it wanted
          --num_running_[tenant];
          break;
        default:
          break;  // passed over
      }
    }
    ASSERT_EQ(walk.Next(), nullptr);
  }

  std::mt19937 rng_;
  const int cap_;
  Queue q_;
  std::set<Sequence*, ByRank> waiting_;
  std::map<const Tenant*, int> num_running_;
};

TEST(WaitingQueueProperty, MeetsThoseThatAWalkOverAllWouldMeetInTheSameOrder) {
  const uint32_t first_seed = std::random_device{}();
  for (uint32_t i = 0; i < 500 && !testing::Test::HasFailure(); ++i) {
    SCOPED_TRACE(fmt::format("seed={}", first_seed + i));
    Comparison(first_seed + i).Run();
  }
}

}  // namespace
}  // namespace wintserve
