#include "launcher/line_sink.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <sstream>
#include <thread>

#include "common/read_file.h"
#include "common/terminal_test_util.h"

namespace wintserve {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Clock = std::chrono::steady_clock;

struct Pipe {
  Pipe() {
    int fds[2];
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    reader.Reset(fds[0]);
    writer.Reset(fds[1]);
  }
  UniqueFd reader;
  UniqueFd writer;
};

std::string ReadToEnd(const UniqueFd& fd) {
  std::string text;
  char buffer[4096];
  ssize_t count;
  while ((count = ::read(fd.get(), buffer, sizeof(buffer))) > 0) text.append(buffer, count);
  return text;
}

TEST(LineSink, WritesWhatItGotInOrderBeforeItGoes) {
  Pipe pipe;
  std::string expected;
  {
    LineSink sink(std::move(pipe.writer));
    for (int i = 0; i < 100; ++i) {
      sink.Write(fmt::format("line {}", i));
      expected += fmt::format("line {}\n", i);
    }
  }
  EXPECT_EQ(ReadToEnd(pipe.reader), expected);
}

TEST(LineSink, AReaderWhoDoesNotReadHoldsNobodyUpAndLearnsWhatIsMissing) {
  Pipe pipe;
  const std::string line(1000, 'x');
  constexpr int kNumLines = 4 * LineSink::kMaxQueuedBytes / 1000;
  auto sink = std::make_unique<LineSink>(std::move(pipe.writer));
  const auto before = Clock::now();
  for (int i = 0; i < kNumLines; ++i) sink->Write(line);
  EXPECT_LT(Clock::now() - before, std::chrono::seconds(30));
  const int64_t num_dropped = sink->num_dropped();
  EXPECT_GT(num_dropped, 0);

  std::string text;
  std::thread reader([&] { text = ReadToEnd(pipe.reader); });
  sink.reset();
  reader.join();
  std::istringstream lines(text);
  int num_whole = 0;
  int num_notes = 0;
  for (std::string read; std::getline(lines, read);) {
    if (read == line) {
      ++num_whole;
    } else {
      ++num_notes;
      EXPECT_EQ(read, fmt::format("... {} lines are missing here: they could not be written",
                                  num_dropped));
    }
  }
  EXPECT_EQ(num_whole, kNumLines - num_dropped);
  EXPECT_EQ(num_notes, 1);
}

TEST(LineSink, IsGoneInASecondThoughNobodyReads) {
  ::signal(SIGPIPE, SIG_IGN);  // the thread that is left behind gets it
  Pipe pipe;
  auto sink = std::make_unique<LineSink>(std::move(pipe.writer));
  for (int i = 0; i < 1000; ++i) sink->Write(std::string(1000, 'x'));
  const auto before = Clock::now();
  sink.reset();
  EXPECT_LT(Clock::now() - before, std::chrono::seconds(30));
}

TEST(LineSink, AClosedConsoleOrAFullDiskDropsAndCounts) {
  ::signal(SIGPIPE, SIG_IGN);
  Pipe pipe;
  pipe.reader.Reset();
  UniqueFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
  ASSERT_TRUE(full.valid());
  for (UniqueFd* fd : {&pipe.writer, &full}) {
    LineSink sink(std::move(*fd));
    for (int i = 0; i < 10; ++i) sink.Write("line");
    for (int i = 0; i < 1000 && sink.num_dropped() < 10; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(sink.num_dropped(), 10);
  }
}

TEST(LineSink, SaysWhatIsMissingOnceTheDiskHasRoomAgain) {
  // A file that may not grow beyond a limit stands in for a disk: half a line fits.
  const std::string path = ::testing::TempDir() + fmt::format("line_sink_test.{}", ::getpid());
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd.valid());
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto previous = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit limited = {15, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limited), 0);
  {
    LineSink sink(std::move(fd));
    for (const char* line : {"0123456789", "half of it", "lost"}) sink.Write(line);
    for (int i = 0; i < 1000 && sink.num_dropped() < 2; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(sink.num_dropped(), 2);
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    sink.Write("later");
  }
  ::signal(SIGXFSZ, previous);
  const auto text = ReadFile(path);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(*text,
            "0123456789\nhalf\n... 2 lines are missing here: they could not be written\nlater\n");
  ::unlink(path.c_str());
}

TEST(LineSink, ARowStaysBelowTheLinesAndIsGoneInTheEnd) {
  TestTerminal terminal;
  {
    LineSink sink(UniqueFd(::dup(terminal.fd())));
    sink.Write("before");
    EXPECT_EQ(terminal.ReadUntil("\n"), "before\n");
    sink.SetRow("row 1");
    EXPECT_TRUE(sink.has_row());
    EXPECT_EQ(terminal.ReadUntil("\033[K"), "\rrow 1\033[K");
    sink.Write("a line");
    EXPECT_EQ(terminal.ReadUntil("row 1\033[K"), "\r\033[Ka line\n\rrow 1\033[K");
    sink.SetRow("row 2");
    EXPECT_EQ(terminal.ReadUntil("row 2\033[K"), "\rrow 2\033[K");
    sink.SetRow("");
    EXPECT_FALSE(sink.has_row());
    EXPECT_EQ(terminal.ReadUntil("\033[K"), "\r\033[K");
    sink.SetRow("");  // is not there
    sink.Write("another");
    EXPECT_EQ(terminal.ReadUntil("another\n"), "another\n");
    sink.SetRow("row 3");
    EXPECT_EQ(terminal.ReadUntil("row 3\033[K"), "\rrow 3\033[K");
    sink.Write("last");
  }
  // Whether the row came once more behind the last line or not.
  const std::string end = terminal.ReadUntilSilent(std::chrono::milliseconds(100));
  EXPECT_TRUE(end == "\r\033[Klast\n" || end == "\r\033[Klast\n\rrow 3\033[K\r\033[K") << end;
}

TEST(LineSink, OfRowsThatNobodyReadsOnlyTheLastIsKept) {
  Pipe pipe;  // full, it holds its writer up as a terminal does that is stopped
  const std::string filling(64 << 10, 'x');
  ASSERT_EQ(::write(pipe.writer.get(), filling.data(), filling.size()), std::ssize(filling));
  auto sink = std::make_unique<LineSink>(std::move(pipe.writer));
  const auto before = Clock::now();
  for (int i = 1; i <= 100'000; ++i) sink->SetRow(fmt::format("row {}", i));
  EXPECT_LT(Clock::now() - before, std::chrono::seconds(30));
  std::string text;
  std::thread reader([&] { text = ReadToEnd(pipe.reader); });
  sink->Write("a line");
  sink.reset();
  reader.join();
  text = text.substr(filling.size());
  EXPECT_LT(std::ranges::count(text, '\r'), 10) << text;
  // Unless the writer has not run until the end, when there is no row any more.
  EXPECT_THAT(text, AnyOf(HasSubstr("\r\033[Ka line\n"), "a line\n"));
}

TEST(LineSink, ARowDoesNotBreakALineThatIsHalfWrittenNorCountAsOne) {
  // As above, a file that may not grow: half a line fits.
  const std::string path = ::testing::TempDir() + fmt::format("line_sink_row.{}", ::getpid());
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd.valid());
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto previous = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit limited = {4, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limited), 0);
  {
    LineSink sink(std::move(fd));
    sink.Write("half of it");
    for (int i = 0; i < 1000 && sink.num_dropped() < 1; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    sink.SetRow("row");
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    sink.Write("later");
    EXPECT_EQ(sink.num_dropped(), 1);
  }
  ::signal(SIGXFSZ, previous);
  const auto text = ReadFile(path);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text,
              StartsWith("half\n... 1 lines are missing here: they could not be written\nlater\n"));
  ::unlink(path.c_str());
}

}  // namespace
}  // namespace wintserve
