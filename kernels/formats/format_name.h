// What error messages call a weight format.
#pragma once

#include <string_view>

#include "kernels/formats/matrix.h"

namespace wintserve::formats {

// "wint2"
std::string_view FormatName(WeightFormat format);

}  // namespace wintserve::formats
