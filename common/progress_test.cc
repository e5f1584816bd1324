#include "common/progress.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "common/terminal_test_util.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr int64_t kGib = int64_t{1} << 30;

ProgressState Loading() {
  return {.label = "loading",
          .noun = "",
          .note = "layer 12",
          .done = 20 * kGib,
          .total = 80 * kGib,
          .done_before = 0,
          .seconds = 10};
}

TEST(ProgressLine, SaysHowMuchOfWhatHowFastAndHowLongYet) {
  EXPECT_EQ(ProgressLine(Loading()),
            "loading: 20.0 of 80.0 GiB (25%), 2.00 GiB/s, 30 s left; layer 12");
}

TEST(ProgressLine, WhatAnEarlierRunDidTellsNothingAboutTheSpeed) {
  ProgressState state = Loading();
  state.done_before = 10 * kGib;
  EXPECT_THAT(ProgressLine(state), HasSubstr("1.00 GiB/s, 1 min 0 s left"));
  state.done_before = 20 * kGib;
  EXPECT_EQ(ProgressLine(state), "loading: 20.0 of 80.0 GiB (25%); layer 12");
}

TEST(ProgressLine, ASlowRateIsNotRoundedAway) {
  ProgressState state = Loading();
  state.seconds = 20 * 1024 / 50;
  EXPECT_THAT(ProgressLine(state), HasSubstr("25%), 50.1 MiB/s, "));
}

TEST(ProgressLine, CountsThingsByTheirName) {
  EXPECT_EQ(ProgressLine({.label = "calibrating",
                          .noun = "experts",
                          .note = "",
                          .done = 3,
                          .total = 6400,
                          .done_before = 0,
                          .seconds = 6}),
            "calibrating: 3 of 6400 experts (0%), 0.50/s, 3 h 33 min left");
}

TEST(ProgressLine, WithoutATotalNothingIsSaidOfTheEnd) {
  EXPECT_EQ(ProgressLine({.label = "reading",
                          .noun = "",
                          .note = "",
                          .done = 3 << 20,
                          .total = 0,
                          .done_before = 0,
                          .seconds = 2}),
            "reading: 3.0 MiB, 1.50 MiB/s");
}

TEST(ProgressLine, MoreThanTheTotalIsNotMoreThanAll) {
  ProgressState state = Loading();
  state.done = 81 * kGib;
  EXPECT_THAT(ProgressLine(state), HasSubstr("(100%)"));
  EXPECT_THAT(ProgressLine(state), Not(HasSubstr("left")));
}

TEST(ProgressBar, FillsAsFarAsTheTaskIs) {
  ProgressState state = Loading();
  EXPECT_EQ(ProgressBar(state, 200, false),
            "loading ##########------------------------------   25%  20.0/80.0 GiB  30 s left  "
            "2.00 GiB/s  layer 12");
  EXPECT_THAT(ProgressBar(state, 200, true), StartsWith("loading ━━━━━━━━━━─"));
  state.done = 21 * kGib;
  EXPECT_THAT(ProgressBar(state, 200, true), StartsWith("loading ━━━━━━━━━━╸─"));
  state.done = 80 * kGib;
  EXPECT_THAT(ProgressBar(state, 200, false),
              HasSubstr(" ######################################## "));
}

TEST(ProgressBar, NeverExceedsTheTerminalWhateverItsWidth) {
  for (const bool with_total : {true, false}) {
    ProgressState state = Loading();
    if (!with_total) state.total = 0;
    for (int columns = 0; columns < 130; ++columns) {
      EXPECT_LE(ProgressBar(state, columns, false).size(), static_cast<size_t>(columns)) << columns;
    }
  }
}

TEST(ProgressBar, ANarrowTerminalLosesTheNoteBeforeTheTimeAndThatBeforeThePercentage) {
  const ProgressState state = Loading();
  const std::string medium = ProgressBar(state, 60, false);
  EXPECT_THAT(medium, Not(HasSubstr("layer 12")));
  EXPECT_THAT(medium, HasSubstr("30 s left"));
  const std::string narrow = ProgressBar(state, 30, false);
  EXPECT_THAT(narrow, Not(HasSubstr("left")));
  EXPECT_THAT(narrow, HasSubstr("25%"));
}

// The lines that a task of the given length writes.
std::vector<std::string> LinesOf(std::chrono::milliseconds interval, size_t num_lines) {
  Mutex mu;
  CondVar changed;
  std::vector<std::string> lines;
  Progress progress({.label = "loading",
                     .total = 1000,
                     .noun = "tensors",
                     .write_line =
                         [&](std::string_view line) {
                           const MutexLock lock(&mu);
                           lines.emplace_back(line);
                           changed.NotifyAll();
                         },
                     .line_interval = interval});
  EXPECT_FALSE(progress.has_bar());
  progress.Add(250);
  progress.SetNote("layer 3");
  const MutexLock lock(&mu);
  // Those from before, and one that was on its way.
  const size_t num_early = num_lines > 0 ? lines.size() + 1 : 0;
  changed.WaitFor(&mu, std::chrono::seconds(30),
                  [&]() { return lines.size() >= num_early + num_lines; });
  return {lines.begin() + static_cast<int64_t>(std::min(num_early, lines.size())), lines.end()};
}

TEST(Progress, WritesALineEveryInterval) {
  const std::vector<std::string> lines = LinesOf(std::chrono::milliseconds(20), 3);
  ASSERT_GE(lines.size(), 3u);
  EXPECT_THAT(lines[2], StartsWith("loading: 250 of 1000 tensors (25%), "));
  EXPECT_THAT(lines[2], HasSubstr("; layer 3"));
}

TEST(Progress, AShortTaskIsSilent) { EXPECT_TRUE(LinesOf(std::chrono::hours(1), 0).empty()); }

std::string ReadAll(int fd) {
  std::string text;
  char buffer[4096];
  ssize_t count;
  while ((count = ::read(fd, buffer, sizeof(buffer))) > 0) text.append(buffer, count);
  return text;
}

TEST(Progress, LinesGoToADescriptorThatIsNoTerminal) {
  int fds[2];
  ASSERT_EQ(::pipe2(fds, O_CLOEXEC), 0);
  const UniqueFd reader(fds[0]);
  UniqueFd writer(fds[1]);
  {
    Progress progress({.label = "loading", .line_interval = std::chrono::hours(1), .fd = fds[1]});
    progress.Print("a line");
  }
  writer.Reset();
  EXPECT_EQ(ReadAll(reader.get()), "a line\n");
}

TEST(Progress, ABarIsRedrawnInPlaceLinesGoAboveItAndAtTheEndItIsGone) {
  TestTerminal terminal;
  {
    Progress progress({.label = "loading", .total = 4, .noun = "tensors", .fd = terminal.fd()});
    EXPECT_TRUE(progress.has_bar());
    progress.Add(2);
    const std::string bar = terminal.ReadUntil("50%");
    EXPECT_THAT(bar, StartsWith("\rloading "));
    EXPECT_THAT(bar, HasSubstr("\rloading #####"));
    EXPECT_THAT(bar, Not(HasSubstr("\n")));
    progress.Print("a line");
    EXPECT_THAT(terminal.ReadUntil("\n"), ::testing::EndsWith("\r\033[Ka line\n"));
    EXPECT_THAT(terminal.ReadUntil("\033[K"), StartsWith("\rloading #####"));
  }
  ASSERT_EQ(::write(terminal.fd(), "end", 3), 3);
  EXPECT_THAT(terminal.ReadUntil("end"), ::testing::EndsWith("\r\033[Kend"));
}

TEST(Progress, ATerminalThatCannotMoveItsCursorGetsLines) {
  const TestTerminal terminal;
  ::setenv("TERM", "dumb", 1);
  EXPECT_FALSE(Progress({.label = "loading", .fd = terminal.fd()}).has_bar());
}

}  // namespace
}  // namespace wintserve
