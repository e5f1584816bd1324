// Ranks that die, or never come, while NCCL connects the others.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <thread>

#include "engine_worker/collectives/nccl/nccl_test_util.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr double kAbortMs = 1000;  // as NcclCollective::Create promises
constexpr double kLeaveMs = 1000;  // as its destructor does: a rank that is stopped may yet write

void Pause(milliseconds time) { std::this_thread::sleep_for(time); }

// A rank of two that joins a group, as a worker does. The group is left again at once.
struct Joining {
  std::shared_ptr<MappedMemory> memory;
  int rank = 0;
  int num_gpus = 2;                             // 1: both ranks are on it
  std::function<void()> before_init = nullptr;  // see NcclGroup

  // What came of it; `on_waiting` gets what aborts the group.
  absl::Status Run(const std::function<void(std::function<void()> abort)>& on_waiting) const {
    Must(kernels::cuda::UseDevice(rank % num_gpus));
    const Stream stream = Must(kernels::cuda::CreateStream());
    auto control = Must(ShmCollective::Create(
        memory,
        {.group_epoch = 7, .rank = rank, .world_size = 2, .slot_bytes = kNcclControlSlotBytes}));
    on_waiting(control->AbortFunction());
    return NcclCollective::Create(std::move(control), {.stream = stream.get(),
                                                       .max_peer_bytes = NcclGroup::kMeasured,
                                                       .before_init = before_init})
        .status();
  }
};

// Joins on a thread of its own. The time that it takes counts from Abort().
class JoiningThread {
 public:
  explicit JoiningThread(Joining joining)
      : thread_([this, joining = std::move(joining)] {
          status_ = joining.Run([this](std::function<void()> abort) {
            abort_ = std::move(abort);
            can_abort_ = true;
          });
          returned_ = steady_clock::now();
          has_returned_ = true;
        }) {}

  bool has_returned() const { return has_returned_; }
  void Abort() {
    while (!can_abort_) Pause(milliseconds(1));
    aborted_ = steady_clock::now();
    abort_();
  }
  absl::Status Wait() {
    thread_.join();
    return status_;
  }
  // After Wait(); negative if it had returned before.
  double ms_after_abort() const {
    return std::chrono::duration<double, std::milli>(returned_ - aborted_).count();
  }

 private:
  std::function<void()> abort_;
  std::atomic<bool> can_abort_ = false;
  std::atomic<bool> has_returned_ = false;
  absl::Status status_;
  steady_clock::time_point aborted_;
  steady_clock::time_point returned_;
  std::thread thread_;  // last: it uses the rest
};

// A rank that is stopped between the meeting and its call of NCCL. Needs no second GPU: NCCL
// compares the devices later.
TEST(NcclJoin, AnAbortEndsTheWaitForARankThatNeverComes) {
  const std::string reason = ReasonToSkip(1);
  if (!reason.empty()) GTEST_SKIP() << reason;
  const int num_gpus = std::min(2, kernels::cuda::NumVisibleDevices());
  // Twice each: what is left of the first must not be in the way of the second.
  for (const int waiting : {0, 1, 0, 1}) {
    const auto memory = NewGroupMemory(Gpus("", 2, 0));
    std::atomic<bool> has_met = false;
    std::atomic<bool> is_over = false;
    JoiningThread stopped(
        {.memory = memory, .rank = 1 - waiting, .num_gpus = num_gpus, .before_init = [&] {
           has_met = true;
           while (!is_over) Pause(milliseconds(1));
         }});
    JoiningThread survivor({.memory = memory, .rank = waiting, .num_gpus = num_gpus});
    while (!has_met) Pause(milliseconds(1));
    Pause(milliseconds(500));
    EXPECT_FALSE(survivor.has_returned());
    survivor.Abort();
    const absl::Status status = survivor.Wait();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_LT(survivor.ms_after_abort(), kAbortMs);
    fmt::print("NOTE rank {}, whose peer never comes, is free {:.0f} ms after the abort\n", waiting,
               survivor.ms_after_abort());
    is_over = true;
    EXPECT_EQ(stopped.Wait().code(), absl::StatusCode::kUnavailable);
  }
}

constexpr char kGroupFd[] = "WINTSERVE_TEST_GROUP_FD";
constexpr char kNewsFd[] = "WINTSERVE_TEST_NEWS_FD";

// Rank 1, until it is killed: says when it has met the other. Started by the tests below.
TEST(NcclJoiningProcess, DISABLED_JoinsUntilItIsKilled) {
  const char* const fd = std::getenv(kGroupFd);
  const char* const news = std::getenv(kNewsFd);
  ASSERT_TRUE(fd != nullptr && news != nullptr);
  auto memory = std::make_shared<MappedMemory>(Must(MappedMemory::FromFd(
      UniqueFd(std::atoi(fd)), ShmGroupMemoryBytes(2, kNcclControlSlotBytes))));
  const Joining joining = {.memory = std::move(memory), .rank = 1, .before_init = [news] {
                             ASSERT_EQ(::write(std::atoi(news), "m", 1), 1);
                           }};
  EXPECT_TRUE(joining.Run([](const std::function<void()>&) {}).ok());
  while (true) ::pause();
}

pid_t StartJoiningProcess(const MappedMemory& memory, int news_fd) {
  const int fd = ::dup(memory.fd());  // without close-on-exec
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv(kGroupFd, fmt::format("{}", fd).c_str(), 1);
    ::setenv(kNewsFd, fmt::format("{}", news_fd).c_str(), 1);
    ::execl("/proc/self/exe", "peer", "--gtest_filter=*DISABLED_JoinsUntilItIsKilled",
            "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
    ::_exit(127);
  }
  ::close(fd);
  return child;
}

class NcclJoinTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = ReasonToSkip(2);
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  // Rank 0 joins a process that gets `signal_number` so long after they have met. The abort comes
  // as the launcher would bring it about, which sees a death within milliseconds.
  static void LoseAPeer(milliseconds time, int signal_number) {
    SCOPED_TRACE(fmt::format("signal {} after {} ms", signal_number, time.count()));
    const auto memory = NewGroupMemory(Gpus("", 2, 0));
    int news[2] = {-1, -1};
    ASSERT_EQ(::pipe(news), 0);
    const pid_t peer = StartJoiningProcess(*memory, news[1]);
    JoiningThread survivor({.memory = memory, .rank = 0});
    char byte = 0;
    ASSERT_EQ(::read(news[0], &byte, 1), 1);
    Pause(time);
    ASSERT_EQ(::kill(peer, signal_number), 0);
    Pause(milliseconds(5));
    survivor.Abort();
    const absl::Status status = survivor.Wait();
    EXPECT_TRUE(status.ok() || absl::IsUnavailable(status)) << status;
    EXPECT_LT(survivor.ms_after_abort(), status.ok() ? kAbortMs + kLeaveMs : kAbortMs);
    fmt::print("NOTE signal {} {} ms after the meeting: {}, {:.0f} ms after the abort\n",
               signal_number, time.count(), status.ok() ? "joined and left" : "not joined",
               survivor.ms_after_abort());
    ASSERT_EQ(::kill(peer, SIGKILL), 0);
    ASSERT_EQ(::waitpid(peer, nullptr, 0), peer);
    ::close(news[0]);
    ::close(news[1]);
  }

  static void JoinAndCompute() {
    const auto memory = NewGroupMemory(Gpus("", 2, 0));
    std::string differences[2];
    const auto run = [&](int self) {
      CudaRank rank(memory, self, 2, NcclGroup::kMeasured);
      differences[self] = RunMix(rank, 20, {1, 5000, 262144, 3 << 20});
    };
    std::thread other([&] { run(1); });
    run(0);
    other.join();
    EXPECT_EQ(differences[0], "");
    EXPECT_EQ(differences[1], "");
  }
};

// A join takes about half a second.
constexpr int kMoments[] = {0, 5, 15, 30, 60, 100, 150, 200, 300, 400, 600};

TEST_F(NcclJoinTest, OutlivesAPeerThatIsKilledAtAnyMomentOfItsJoinAndJoinsAnotherGroup) {
  for (const int moment : kMoments) LoseAPeer(milliseconds(moment), SIGKILL);
  JoinAndCompute();
}

TEST_F(NcclJoinTest, OutlivesAPeerThatIsStoppedAtAnyMomentOfItsJoinAndJoinsAnotherGroup) {
  for (const int moment : {0, 60, 200}) LoseAPeer(milliseconds(moment), SIGSTOP);
  JoinAndCompute();
}

}  // namespace
}  // namespace wintserve
