// What every fuzz target defines.
#pragma once

#include <string_view>

namespace wintserve {

// Whatever bytes it gets, it returns. What must hold of them is a CHECK; memory errors, leaks and
// undefined behaviour are found by the sanitizers of the preset "fuzz".
void FuzzInput(std::string_view input);

}  // namespace wintserve
