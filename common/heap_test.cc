#include "common/heap.h"

#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/child_process.h"

namespace wintserve {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kHeapIsGlibcs = false;
#else
constexpr bool kHeapIsGlibcs = true;
#endif

// Private memory of this process.
int64_t AnonymousKib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("RssAnon:")) return std::stoll(line.substr(8));
  }
  return -1;
}

TEST(HeapTrimmer, GivesTheMemoryOfABurstBack) {
  if (!kHeapIsGlibcs) GTEST_SKIP() << "a sanitizer has a heap of its own";
  constexpr int64_t kBurstKib = 64 << 10;
  constexpr int64_t kPieceKib = 16;
  constexpr size_t kKeptOneIn = 64;  // what is still in use lies scattered, as after real requests
  const int64_t before = AnonymousKib();
  std::vector<std::unique_ptr<std::string>> pieces;
  for (int64_t kib = 0; kib < kBurstKib; kib += kPieceKib) {
    pieces.push_back(std::make_unique<std::string>(kPieceKib << 10, 'x'));
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (i % kKeptOneIn != kKeptOneIn - 1) pieces[i].reset();
  }
  ASSERT_GT(AnonymousKib() - before, kBurstKib / 2)
      << "the heap has kept nothing: a test of nothing";

  const HeapTrimmer trimmer(std::chrono::milliseconds(5));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (AnonymousKib() - before > kBurstKib / 8 && std::chrono::steady_clock::now() < deadline) {
    ::usleep(1000);
  }
  EXPECT_LE(AnonymousKib() - before, kBurstKib / 8);
}

// Piece after piece of one size, a thread each, with small ones in between that stay.
int64_t KibKeptOfLargePieces() {
  constexpr int kThreads = 8;
  const int64_t before = AnonymousKib();
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<std::string>> small(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&small, i] {
      for (int round = 0; round < 3; ++round) {
        const std::string large(8 << 20, 'x');
        small[i] = std::make_unique<std::string>(4 << 10, large[round]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return AnonymousKib() - before;
}

TEST(LargePieces, GoBackAtOnceWhereTheHeapWouldKeepThem) {
  if (!kHeapIsGlibcs) GTEST_SKIP() << "a sanitizer has a heap of its own";
  ASSERT_GT(KibKeptOfLargePieces(), 8 << 10) << "the heap has kept nothing: a test of nothing";
  ReturnFreeMemory();
  ReturnLargePiecesAtOnce();
  EXPECT_LT(KibKeptOfLargePieces(), 2 << 10);
}

TEST(HeapTrimmer, EndsAtOnce) {
  const auto begin = std::chrono::steady_clock::now();
  { const HeapTrimmer trimmer(std::chrono::hours(1)); }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

// Whether what a thread frees stays its own, which glibc counts as in use.
bool ThreadKeepsWhatItFrees() {
  void* volatile piece = std::malloc(600);
  const size_t in_use = ::mallinfo2().uordblks;
  std::free(piece);
  return ::mallinfo2().uordblks == in_use;
}

// Whether a second thread gets an arena of its own, by glibc's account.
bool ThreadsHaveArenas() {
  std::thread([] { std::free(std::malloc(600)); }).join();
  char* text = nullptr;
  size_t size = 0;
  FILE* const stream = ::open_memstream(&text, &size);
  ::malloc_info(/*options=*/0, stream);
  std::fclose(stream);
  const bool found = std::string(text, size).find("<heap nr=\"1\">") != std::string::npos;
  std::free(text);
  return found;
}

// Run by the tests below in a process of its own, since the variable counts at a start alone.
constexpr int kReported = 8;
constexpr int kKeeps = 1;
constexpr int kHasArenas = 2;
TEST(HeapInAChild, DISABLED_Report) {
  std::_Exit(kReported | (ThreadKeepsWhatItFrees() ? kKeeps : 0) |
             (ThreadsHaveArenas() ? kHasArenas : 0));
}

// kKeeps, kHasArenas
int InAChild(const std::vector<std::string>& environment) {
  ChildOptions options;
  options.argv = {"/proc/self/exe", "--gtest_also_run_disabled_tests",
                  "--gtest_filter=HeapInAChild.DISABLED_Report"};
  options.environment = environment;
  auto child = ChildProcess::Spawn(options);
  EXPECT_TRUE(child.ok()) << child.status();
  const auto ended = child->Wait(/*timeout_ms=*/20'000);
  EXPECT_TRUE(ended.has_value() && (ended->code & kReported) != 0);
  return ended->code & ~kReported;
}

class HeapTunablesTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!kHeapIsGlibcs) GTEST_SKIP() << "a sanitizer has a heap of its own";
    ASSERT_EQ(InAChild({}), kKeeps | kHasArenas) << "glibc has changed: nothing needs to be set";
  }
};

TEST_F(HeapTunablesTest, TakeFromThreadsWhatTheyFree) {
  for (const char* inherited : {static_cast<const char*>(nullptr), "", "glibc.malloc.perturb=1"}) {
    EXPECT_EQ(InAChild({HeapTunables(HeapArenas::kGlibcsChoice, inherited)}), kHasArenas);
    EXPECT_EQ(InAChild({HeapTunables(HeapArenas::kOne, inherited)}), 0);
  }
}

TEST_F(HeapTunablesTest, LeaveTheLastWordToTheOperator) {
  EXPECT_EQ(InAChild({HeapTunables(HeapArenas::kOne,
                                   "glibc.malloc.tcache_count=7:glibc.malloc.arena_max=4")}),
            kKeeps | kHasArenas);
}

}  // namespace
}  // namespace wintserve
