// Verbs that are programs of their own.
#pragma once

#include <string>
#include <vector>

namespace wintserve {

// Becomes the program of that name in the directory of our own binary, with default signal handlers
// and nothing blocked. argv includes argv[0], which may be any text. Returns only where that does
// not work, with one line that says why.
std::string BecomeSibling(const std::string& program, std::vector<std::string> argv);

}  // namespace wintserve
