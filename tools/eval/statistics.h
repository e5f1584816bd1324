// Means with their standard errors.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace wintserve::eval {

struct Estimate {
  double value = 0;
  // Of `value`, for items drawn at random from all there might be; none of fewer than two items.
  std::optional<double> standard_error;
};

// Share of items that are right. Standard error: sqrt(p (1 - p) / (n - 1)), the sample's standard
// deviation by the square root of its size. REQUIRES: at least one item.
Estimate Accuracy(const std::vector<bool>& is_right);

// What a group of tokens (a window, a chat) adds up to.
struct Group {
  double nats = 0;
  int64_t num_tokens = 0;
};

// Nats per token over all groups, r = sum(nats) / sum(tokens). The tokens of a group depend on each
// other, so the groups are what is drawn: the error is that of a ratio of two sums over n groups
// (Cochran, Sampling Techniques, 3rd ed., 2.11), sqrt(n / (n - 1) sum (nats_i - r tokens_i)^2) /
// sum(tokens). REQUIRES: at least one token.
Estimate NatsPerToken(std::span<const Group> groups);

// exp(r), and its error by the derivative.
Estimate Perplexity(const Estimate& nats_per_token);

// Index of the first of the largest values. REQUIRES: at least one.
size_t IndexOfLargest(std::span<const double> values);

}  // namespace wintserve::eval
