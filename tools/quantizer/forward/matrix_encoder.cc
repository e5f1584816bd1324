#include "tools/quantizer/forward/matrix_encoder.h"

#include "fmt/format.h"

namespace wintserve::quantizer {

std::string MatrixPlace(const MatrixRef& ref) {
  switch (ref.role) {
    case MatrixRole::kEmbedding:
      return "embedding";
    case MatrixRole::kHead:
      return "head";
    case MatrixRole::kQkv:
      return fmt::format("layer {} qkv", ref.layer);
    case MatrixRole::kOutput:
      return fmt::format("layer {} output", ref.layer);
    case MatrixRole::kRouter:
      return fmt::format("layer {} router", ref.layer);
    case MatrixRole::kGateUp:
    case MatrixRole::kDown:
      break;
  }
  const std::string mlp = ref.expert == kDenseMlp        ? "mlp"
                          : ref.expert == kSharedExperts ? "shared experts"
                                                         : fmt::format("expert {}", ref.expert);
  return fmt::format("layer {} {} {}", ref.layer, mlp,
                     ref.role == MatrixRole::kGateUp ? "gate-up" : "down");
}

bool AddsToResidual(MatrixRole role) {
  return role == MatrixRole::kOutput || role == MatrixRole::kDown;
}

}  // namespace wintserve::quantizer
