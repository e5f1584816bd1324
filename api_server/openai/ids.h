// Identifiers that the outside sees.
#pragma once

#include <string>

namespace wintserve {

// A random (version 4) UUID: 36 characters. Thread-safe.
std::string NewUuid();

}  // namespace wintserve
