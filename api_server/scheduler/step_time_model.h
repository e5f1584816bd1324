// How long steps take, as measured, and how much prefill fits beside the decodes.
#pragma once

#include <vector>

namespace wintserve {

// What a plan asked of the workers.
struct StepWork {
  int num_decodes = 0;
  int num_prefill_tokens = 0;
  int num_copies = 0;
};

// Exponentially weighted estimates. One measurement counts for at most twice and at least half of
// the estimate, so that an outlier (a page fault, a busy machine) moves it little and a lasting
// change is followed within a few steps.
// Threading: thread-compatible.
class StepTimeModel {
 public:
  StepTimeModel(int max_decodes, double restore_us_per_block);

  void Add(const StepWork& work, double step_us);

  // Prefill tokens that lengthen a step of num_decodes decodes to at most `slowdown` times its
  // length. Negative: not known yet. REQUIRES: num_decodes > 0.
  double PrefillTokensWithin(double slowdown, int num_decodes) const;

  // Copying a block back from the host beats computing its tokens, or nothing is known yet. To be
  // asked once a prompt: each no forgets a little of what made copies look slow, since only a yes
  // measures them again.
  bool RestoreIsWorthwhile(int block_size_tokens);

 private:
  double DecodeUs(int num_decodes) const;

  std::vector<double> decode_us_;  // of a step of that many decodes and nothing else; 0: unknown
  double prefill_us_per_token_ = 0;
  double restore_us_per_block_;
};

}  // namespace wintserve
