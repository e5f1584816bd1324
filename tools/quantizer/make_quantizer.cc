#include "tools/quantizer/make_quantizer.h"

#include "tools/quantizer/output/rounding_quantizer.h"

namespace wintserve::quantizer {

absl::StatusOr<RunIdentity> IdentityOf(const MethodOptions& options) {
  const bool is_natural = options.k_order == formats::KOrder::kNatural;
  return RunIdentity{{"--k-order", is_natural ? "natural" : "mma64"}};
}

absl::StatusOr<std::unique_ptr<MatrixQuantizer>> MakeQuantizer(const MethodOptions& options,
                                                               const Source& source,
                                                               const ModelConfig& /*target*/,
                                                               kernels::cpu::ThreadPool* pool) {
  return std::make_unique<RoundingQuantizer>(source.config, *source.checkpoint,
                                             Wint2Options{.k_order = options.k_order}, pool);
}

}  // namespace wintserve::quantizer
