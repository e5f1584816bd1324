#include "api_server/scheduler/step_time_model.h"

#include <algorithm>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr double kWeight = 0.2;  // of a new measurement: half of it is forgotten after 3 steps
// Copies that took twice as long as computing are tried again after 14 prompts.
constexpr double kKeptByARefusal = 0.95;

void Update(double* estimate, double measured) {
  if (*estimate <= 0) {
    *estimate = measured;
    return;
  }
  const double bounded = std::clamp(measured, *estimate / 2, *estimate * 2);
  *estimate += kWeight * (bounded - *estimate);
}

}  // namespace

StepTimeModel::StepTimeModel(int max_decodes, double restore_us_per_block)
    : decode_us_(max_decodes + 1), restore_us_per_block_(restore_us_per_block) {}

void StepTimeModel::Add(const StepWork& work, double step_us) {
  if (step_us <= 0) return;
  if (work.num_copies > 0) {
    // Beside rows the share of the copies cannot be told.
    if (work.num_decodes + work.num_prefill_tokens > 0) return;
    Update(&restore_us_per_block_, step_us / work.num_copies);
    return;
  }
  if (work.num_prefill_tokens == 0) {
    if (work.num_decodes > 0) Update(&decode_us_[work.num_decodes], step_us);
    return;
  }
  // A step of prefill alone is charged in whole: its fixed part is what a step costs anyway.
  const double decode_us = work.num_decodes > 0 ? DecodeUs(work.num_decodes) : 0;
  const double prefill_us = step_us - decode_us;
  if (prefill_us > 0) Update(&prefill_us_per_token_, prefill_us / work.num_prefill_tokens);
}

// Between the nearest numbers of decodes that were measured; outside of them never more than
// proportional, so that a step is not thought longer than it is.
double StepTimeModel::DecodeUs(int num_decodes) const {
  CHECK(num_decodes > 0 && num_decodes < static_cast<int>(decode_us_.size()), "num_decodes={}",
        num_decodes);
  if (decode_us_[num_decodes] > 0) return decode_us_[num_decodes];
  int below = num_decodes - 1;
  while (below > 0 && decode_us_[below] <= 0) --below;
  const int size = static_cast<int>(decode_us_.size());
  int above = num_decodes + 1;
  while (above < size && decode_us_[above] <= 0) ++above;
  if (above == size) return below > 0 ? decode_us_[below] : 0;
  if (below == 0) return decode_us_[above] * num_decodes / above;
  const double share = static_cast<double>(num_decodes - below) / (above - below);
  return decode_us_[below] + share * (decode_us_[above] - decode_us_[below]);
}

double StepTimeModel::PrefillTokensWithin(double slowdown, int num_decodes) const {
  const double decode_us = DecodeUs(num_decodes);
  if (decode_us <= 0 || prefill_us_per_token_ <= 0) return -1;
  return std::max(0.0, slowdown - 1) * decode_us / prefill_us_per_token_;
}

bool StepTimeModel::RestoreIsWorthwhile(int block_size_tokens) {
  if (prefill_us_per_token_ <= 0) return true;
  if (restore_us_per_block_ < prefill_us_per_token_ * block_size_tokens) return true;
  restore_us_per_block_ *= kKeptByARefusal;
  return false;
}

}  // namespace wintserve
