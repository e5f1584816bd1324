#include "tools/quantizer/output/totals.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/check.h"

namespace wintserve::quantizer {
namespace {

const char* FormatOf(const PlannedStep& step) {
  switch (step.format) {
    case StoredFormat::kPlain:
      return step.tensors.front().type == TensorType::kF32 ? "float32" : "bf16";
    case StoredFormat::kWint8:
      return "wint8";
    case StoredFormat::kWint4:
      return "wint4";
    case StoredFormat::kWint2:
      return "wint2";
  }
  CHECK(false, "format={}", static_cast<int>(step.format));
}

const char* PartOf(const MatrixRef& ref) {
  switch (ref.role) {
    case MatrixRole::kEmbedding:
      return "embedding";
    case MatrixRole::kHead:
      return "head";
    case MatrixRole::kQkv:
    case MatrixRole::kOutput:
      return "attention";
    case MatrixRole::kRouter:
      return "router";
    case MatrixRole::kGateUp:
    case MatrixRole::kDown:
      return ref.expert == kDenseMlp        ? "dense MLP"
             : ref.expert == kSharedExperts ? "shared experts"
                                            : "experts";
  }
  CHECK(false, "role={}", static_cast<int>(ref.role));
}

std::string Line(std::string_view name, const KindTotals& kind) {
  return fmt::format("{:<24} {:>9} {:>12.3f} {:>9.3f} {:>11.3e}\n", name, kind.num_matrices,
                     static_cast<double>(kind.num_weights) / 1e6, kind.bits_per_weight(),
                     kind.error.nmse());
}

}  // namespace

std::string KindOf(const PlannedStep& step) {
  return fmt::format("{} {}", FormatOf(step), PartOf(std::get<MatrixRef>(step.ref)));
}

void KindTotals::Add(const KindTotals& other) {
  num_matrices += other.num_matrices;
  num_weights += other.num_weights;
  stored_bytes += other.stored_bytes;
  error.Add(other.error);
}

double KindTotals::bits_per_weight() const {
  return num_weights == 0 ? 0 : 8.0 * static_cast<double>(stored_bytes) / num_weights;
}

void Totals::Add(const PlannedStep& step, const WeightError& error) {
  KindTotals added{1, step.k * step.n, 0, error};
  for (const PlannedTensor& tensor : step.tensors) added.stored_bytes += tensor.size_bytes;
  kinds[KindOf(step)].Add(added);
}

KindTotals Totals::Sum() const {
  KindTotals sum;
  for (const auto& [name, kind] : kinds) sum.Add(kind);
  return sum;
}

nlohmann::json Totals::ToJson() const {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, kind] : kinds) {
    json[name] = {kind.num_matrices, kind.num_weights, kind.stored_bytes, kind.error.error,
                  kind.error.norm};
  }
  return json;
}

Totals Totals::FromJson(const nlohmann::json& json) {
  Totals totals;
  if (!json.is_object()) return totals;
  for (const auto& [name, entry] : json.items()) {
    const bool is_ours = entry.is_array() && entry.size() == 5 &&
                         std::all_of(entry.begin(), entry.end(),
                                     [](const auto& value) { return value.is_number(); });
    if (!is_ours) return {};
    totals.kinds[name] = {entry[0], entry[1], entry[2], {entry[3], entry[4]}};
  }
  return totals;
}

std::string TotalsTable(const Totals& totals) {
  std::string text = fmt::format("{:<24} {:>9} {:>12} {:>9} {:>11}\n", "", "matrices",
                                 "10^6 weights", "bits each", "NMSE");
  for (const auto& [name, kind] : totals.kinds) text += Line(name, kind);
  return text + Line("all", totals.Sum());
}

}  // namespace wintserve::quantizer
