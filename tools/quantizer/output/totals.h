// What a run has made so far, by kinds of matrices: for the summary, and for the journal.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "tools/quantizer/output/tensor_plan.h"
#include "tools/quantizer/output/weight_error.h"

namespace wintserve::quantizer {

// "wint2 experts", "wint8 attention", "bf16 embedding". REQUIRES: a step that makes a matrix.
std::string KindOf(const PlannedStep& step);

struct KindTotals {
  int64_t num_matrices = 0;
  int64_t num_weights = 0;
  int64_t stored_bytes = 0;  // with scales
  WeightError error;

  void Add(const KindTotals& other);
  double bits_per_weight() const;
};

struct Totals {
  std::map<std::string, KindTotals> kinds;

  // REQUIRES: a step that makes a matrix.
  void Add(const PlannedStep& step, const WeightError& error);
  KindTotals Sum() const;

  nlohmann::json ToJson() const;
  // Of what ToJson() has made; anything else gives no kinds.
  static Totals FromJson(const nlohmann::json& json);
};

// A line for each kind and one for all: matrices, weights, bits a weight, normalised mean square
// error.
std::string TotalsTable(const Totals& totals);

}  // namespace wintserve::quantizer
