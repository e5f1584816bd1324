// What a descriptor can show, if it is a terminal.
#pragma once

namespace wintserve {

// A terminal whose row can be drawn anew: TERM says what it is, and not that it is "dumb".
bool CanMoveCursor(int fd);

// CanMoveCursor, and nobody has asked for text without colours: NO_COLOR is not set, or empty.
bool ShowsColours(int fd);

// How wide it is now; 80 where that cannot be told.
int TerminalColumns(int fd);

// Whether the environment's locale is one of UTF-8.
bool IsUtf8Terminal();

}  // namespace wintserve
