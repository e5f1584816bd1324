#include "common/terminal.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "common/terminal_test_util.h"

namespace wintserve {
namespace {

TEST(Terminal, WhatItIsCalledSaysWhatItShows) {
  const TestTerminal terminal;
  const UniqueFd file(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  ::unsetenv("NO_COLOR");
  EXPECT_TRUE(CanMoveCursor(terminal.fd()));
  EXPECT_TRUE(ShowsColours(terminal.fd()));
  EXPECT_FALSE(CanMoveCursor(file.get()));
  EXPECT_FALSE(ShowsColours(file.get()));
  ::setenv("NO_COLOR", "1", 1);
  EXPECT_TRUE(CanMoveCursor(terminal.fd()));
  EXPECT_FALSE(ShowsColours(terminal.fd()));
  ::setenv("NO_COLOR", "", 1);
  EXPECT_TRUE(ShowsColours(terminal.fd())) << "empty is as if it were not set";
  ::unsetenv("NO_COLOR");
  for (const char* term : {"dumb", ""}) {
    ::setenv("TERM", term, 1);
    EXPECT_FALSE(CanMoveCursor(terminal.fd())) << term;
    EXPECT_FALSE(ShowsColours(terminal.fd())) << term;
  }
  ::unsetenv("TERM");
  EXPECT_FALSE(CanMoveCursor(terminal.fd()));
}

TEST(Terminal, ItsWidthIsThatOfThisMoment) {
  TestTerminal terminal(40);
  EXPECT_EQ(TerminalColumns(terminal.fd()), 40);
  terminal.SetColumns(132);
  EXPECT_EQ(TerminalColumns(terminal.fd()), 132);
  terminal.SetColumns(0);  // of one that does not know it
  EXPECT_EQ(TerminalColumns(terminal.fd()), 80);
}

TEST(Terminal, TheFirstVariableThatIsSetTellsTheLocale) {
  using Environment = std::vector<std::pair<const char*, const char*>>;
  const std::pair<Environment, bool> cases[] = {
      {{}, false},
      {{{"LANG", "de_DE.UTF-8"}}, true},
      {{{"LANG", "C.utf8"}}, true},
      {{{"LANG", "C"}}, false},
      {{{"LC_CTYPE", "C"}, {"LANG", "de_DE.UTF-8"}}, false},
      {{{"LC_ALL", ""}, {"LC_CTYPE", "en_US.UTF8"}, {"LANG", "C"}}, true},
  };
  for (const auto& [environment, is_utf8] : cases) {
    for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) ::unsetenv(name);
    std::string what;
    for (const auto& [name, value] : environment) {
      ::setenv(name, value, 1);
      what += std::string(name) + "=" + value + " ";
    }
    EXPECT_EQ(IsUtf8Terminal(), is_utf8) << what;
  }
}

}  // namespace
}  // namespace wintserve
