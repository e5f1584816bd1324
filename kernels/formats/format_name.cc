#include "kernels/formats/format_name.h"

#include "common/check.h"

namespace wintserve::formats {

std::string_view FormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return "float32";
    case WeightFormat::kBfloat16:
      return "bfloat16";
    case WeightFormat::kWint8:
      return "wint8";
    case WeightFormat::kWint4:
      return "wint4";
    case WeightFormat::kWint2:
      return "wint2";
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

}  // namespace wintserve::formats
