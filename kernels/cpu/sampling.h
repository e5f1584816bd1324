// Draws the next token of a sequence from its logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve::kernels::cpu {

// The random numbers of a draw are a pure function of (seed, position, choice_index).
struct SampleRequest {
  float temperature = 1.0f;  // >= 0; 0 is greedy and needs no random number
  float top_p = 1.0f;        // (0, 1]; 1 keeps all
  int32_t top_k = 0;         // >= 0; 0 keeps all
  int64_t seed = 0;
  uint32_t position = 0;  // of the drawn token in its sequence
  uint32_t choice_index = 0;
  // Ids that must not be drawn, in rising order, each once, none negative; those that are no ids of
  // the logits do not matter. If they are all that there is, they count for nothing.
  std::span<const int32_t> masked_ids = {};
};

// Uniform in [0, 1): the upper 24 bits of word 0 of Philox4x32-10 with key = seed (low, high half)
// and counter = (position, choice_index, 0, 0).
float UniformDraw(int64_t seed, uint32_t position, uint32_t choice_index);

// In this order: masked ids drop out, as if the vocabulary did not have them; logits / temperature;
// the top_k largest (of equal ones the lower ids); softmax; the fewest of the most probable ids (of
// equally probable ones the lower) whose mass reaches top_p, at least one; one draw by inverse CDF.
// The CDF runs in id order when nothing was cut, otherwise in order of falling probability and,
// among equal ones, rising id. Greedy: the largest logit, the lowest id of equal ones.
//
// Weights are float32, masses float64. top_p counts as reached within 2^-21 of the whole mass, the
// rounding of float32 weights; otherwise {0.5, 0.3, 0.2} with top_p 0.8 might keep all three.
//
// Owns scratch memory that grows to the largest vocabulary seen.
// Threading: thread-compatible. The result depends on the arguments only, not on earlier calls.
class Sampler {
 public:
  // logits [vocabulary]: ids at and above logits.size() do not take part.
  // INVALID_ARGUMENT: a logit is NaN or infinite (the message names the id; masked ones count), or
  // logits is empty.
  // REQUIRES: a request in the ranges above.
  absl::StatusOr<int32_t> Sample(std::span<const float> logits, const SampleRequest& request);

 private:
  // Copies the logits of ids that are not masked to unmasked_.
  void DropMasked(std::span<const float> logits, std::span<const int32_t> masked_ids);
  int32_t Draw(std::span<const float> logits, float maximum, const SampleRequest& request);

  // An id with its rank in a descending order, packed so that plain integer order is that order.
  using Candidate = uint64_t;

  // Nothing was cut: weights_ in id order. FillWeights returns their mass.
  double FillWeights(std::span<const float> logits, float maximum, float temperature);
  int32_t DrawFromAll(double total, float uniform) const;

  // top_k: candidates_ become the chosen ids, ordered by logit, then reordered by weight.
  void KeepTopK(std::span<const float> logits, size_t top_k);
  void RankByWeight(std::span<const float> logits, float maximum, float temperature);
  int32_t DrawFromCandidates(float top_p, float uniform);

  // top_p alone: candidates_ grow by bands of falling weight until they hold the mass, because
  // sorting the vocabulary would cost more than everything else together.
  int32_t DrawFromTopP(double total, float top_p, float uniform);
  void AppendBand(float low, float high);

  // Counts further candidates as kept until their mass is `enough`. False: they do not suffice.
  bool ExtendTopP(double enough, size_t* num_kept, double* mass) const;
  int32_t DrawFromFirst(size_t num_kept, double target) const;

  std::vector<float> unmasked_;       // logits
  std::vector<float> weights_;        // by id: exp((logit - maximum) / temperature)
  std::vector<double> block_masses_;  // sums of kBlock weights
  std::vector<Candidate> candidates_;
};

}  // namespace wintserve::kernels::cpu
