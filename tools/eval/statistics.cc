#include "tools/eval/statistics.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace wintserve::eval {

Estimate Accuracy(const std::vector<bool>& is_right) {
  CHECK(!is_right.empty());
  const auto n = static_cast<double>(is_right.size());
  const auto num_right = static_cast<double>(std::count(is_right.begin(), is_right.end(), true));
  Estimate estimate{num_right / n, std::nullopt};
  if (is_right.size() >= 2) {
    estimate.standard_error = std::sqrt(estimate.value * (1 - estimate.value) / (n - 1));
  }
  return estimate;
}

Estimate NatsPerToken(std::span<const Group> groups) {
  double nats = 0;
  double num_tokens = 0;
  for (const Group& group : groups) {
    nats += group.nats;
    num_tokens += static_cast<double>(group.num_tokens);
  }
  CHECK(num_tokens > 0);
  Estimate estimate{nats / num_tokens, std::nullopt};
  if (groups.size() < 2) return estimate;
  double squares = 0;
  for (const Group& group : groups) {
    const double residual = group.nats - estimate.value * static_cast<double>(group.num_tokens);
    squares += residual * residual;
  }
  const auto n = static_cast<double>(groups.size());
  estimate.standard_error = std::sqrt(n / (n - 1) * squares) / num_tokens;
  return estimate;
}

Estimate Perplexity(const Estimate& nats_per_token) {
  Estimate estimate{std::exp(nats_per_token.value), std::nullopt};
  if (nats_per_token.standard_error.has_value()) {
    estimate.standard_error = estimate.value * *nats_per_token.standard_error;
  }
  return estimate;
}

size_t IndexOfLargest(std::span<const double> values) {
  CHECK(!values.empty());
  return static_cast<size_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

}  // namespace wintserve::eval
