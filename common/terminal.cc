#include "common/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace wintserve {
namespace {

constexpr int kDefaultColumns = 80;

// Empty also where it is not set.
std::string_view Environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

bool CanMoveCursor(int fd) {
  const std::string_view term = Environment("TERM");
  return ::isatty(fd) == 1 && !term.empty() && term != "dumb";
}

bool ShowsColours(int fd) { return CanMoveCursor(fd) && Environment("NO_COLOR").empty(); }

int TerminalColumns(int fd) {
  winsize size = {};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kDefaultColumns;
}

bool IsUtf8Terminal() {
  // As the C library decides, without its locale tables: the first that is set counts.
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const std::string_view locale = Environment(name);
    if (locale.empty()) continue;
    for (const char* spelling : {"UTF-8", "utf-8", "UTF8", "utf8"}) {
      if (locale.find(spelling) != locale.npos) return true;
    }
    return false;
  }
  return false;
}

}  // namespace wintserve
