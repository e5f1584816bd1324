#include "api_server/llm/offline.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <future>
#include <string>

#include "common/unique_fd.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

constexpr char kRequest[] =
    R"({"prompt":"a","chat":false,"temperature":0,"top_p":null,"top_k":0,"max_tokens":9,)"
    R"("seed":null,"stop":[],"print_ids":false})";

// Stdout goes to `fd` for as long as the object lives.
class StdoutTo {
 public:
  explicit StdoutTo(const UniqueFd& fd) {
    std::fflush(stdout);
    saved_.Reset(::dup(STDOUT_FILENO));
    ::dup2(fd.get(), STDOUT_FILENO);
  }
  ~StdoutTo() {
    std::fflush(stdout);
    std::clearerr(stdout);
    ::dup2(saved_.get(), STDOUT_FILENO);
  }
  StdoutTo(const StdoutTo&) = delete;
  StdoutTo& operator=(const StdoutTo&) = delete;

 private:
  UniqueFd saved_;
};

struct Pipe {
  Pipe() {
    int fds[2];
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    read_end.Reset(fds[0]);
    write_end.Reset(fds[1]);
  }
  UniqueFd read_end;
  UniqueFd write_end;
};

TEST(GenerateOffline, PrintsTheTextAndALineBreak) {
  FakeLlm llm;
  llm.SetPieces({"床前", "明月光"});
  Pipe pipe;
  {
    const StdoutTo redirection(pipe.write_end);
    const absl::Status status = GenerateOffline(&llm, kRequest);
    EXPECT_TRUE(status.ok()) << status;
  }
  char text[100] = {};
  ASSERT_GT(::read(pipe.read_end.get(), text, sizeof(text) - 1), 0);
  EXPECT_STREQ(text, "床前明月光\n");
}

TEST(GenerateOffline, StopsWithoutAnErrorWhenNobodyReadsAnyMore) {
  ::signal(SIGPIPE, SIG_IGN);  // as the API server does
  FakeLlm llm;
  llm.HoldUpdates();
  Pipe pipe;
  const StdoutTo redirection(pipe.write_end);
  auto end = std::async(std::launch::async, [&] { return GenerateOffline(&llm, kRequest); });
  ASSERT_TRUE(llm.WaitForSubmitted(1));
  pipe.read_end.Reset();
  llm.Send(1, TextUpdate(0, "x"));
  EXPECT_TRUE(llm.WaitForCancelled(1));
  llm.Send(1, TextUpdate(0, "y", FinishReason::kStop));
  EXPECT_TRUE(end.get().ok());
}

TEST(GenerateOffline, NamesWhatKeepsItFromPrinting) {
  FakeLlm llm;
  const UniqueFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
  ASSERT_TRUE(full.valid());
  const StdoutTo redirection(full);
  EXPECT_EQ(GenerateOffline(&llm, kRequest).message(),
            "cannot write to stdout: No space left on device");
}

}  // namespace
}  // namespace wintserve
