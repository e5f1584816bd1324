// A terminal for tests of what is drawn there.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <string_view>

#include "common/unique_fd.h"

namespace wintserve {

// A terminal that nobody looks at, and whose bytes come as they were written. For the process TERM
// and the locale are those of an "xterm" without UTF-8 from then on.
class TestTerminal {
 public:
  explicit TestTerminal(int columns = 40) : master_(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC)) {
    EXPECT_EQ(::grantpt(master_.get()) | ::unlockpt(master_.get()), 0);
    path_ = ::ptsname(master_.get());
    slave_ = UniqueFd(::open(path_.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
    termios modes = {};
    EXPECT_EQ(::tcgetattr(slave_.get(), &modes), 0);
    ::cfmakeraw(&modes);
    EXPECT_EQ(::tcsetattr(slave_.get(), TCSANOW, &modes), 0);
    SetColumns(columns);
    ::setenv("TERM", "xterm", 1);
    ::setenv("LC_ALL", "C", 1);
  }
  int fd() const { return slave_.get(); }
  const std::string& path() const { return path_; }

  void SetColumns(int columns) {
    const winsize size = {.ws_row = 10,
                          .ws_col = static_cast<unsigned short>(columns),
                          .ws_xpixel = 0,
                          .ws_ypixel = 0};
    EXPECT_EQ(::ioctl(slave_.get(), TIOCSWINSZ, &size), 0);
  }

  // What comes until `text` has come, at most for a minute.
  std::string ReadUntil(std::string_view text) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    std::string read;
    while (read.find(text) == read.npos && std::chrono::steady_clock::now() < deadline) {
      pollfd wait = {master_.get(), POLLIN, 0};
      char byte = 0;
      if (::poll(&wait, 1, 100) == 1 && ::read(master_.get(), &byte, 1) == 1) read += byte;
    }
    EXPECT_NE(read.find(text), read.npos) << "got no " << text << " but: " << read;
    return read;
  }
  // What has come so far; waits until nothing came for that long.
  std::string ReadUntilSilent(std::chrono::milliseconds silence) {
    std::string read;
    pollfd wait = {master_.get(), POLLIN, 0};
    char byte = 0;
    while (::poll(&wait, 1, static_cast<int>(silence.count())) == 1 &&
           ::read(master_.get(), &byte, 1) == 1) {
      read += byte;
    }
    return read;
  }

 private:
  UniqueFd master_;
  std::string path_;
  UniqueFd slave_;
};

}  // namespace wintserve
