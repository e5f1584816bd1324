// In a file of its own, so that a test with the real scheduler gets the scheduler's
// RetryAfterSeconds instead.
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

constexpr char kRetryAfterPayload[] = "fake-retry-after";

}  // namespace

absl::Status QueueFullError(int retry_after_seconds) {
  absl::Status status = absl::ResourceExhaustedError("the queue is full");
  status.SetPayload(kRetryAfterPayload, absl::Cord(absl::StrCat(retry_after_seconds)));
  return status;
}

int RetryAfterSeconds(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterPayload);
  int seconds = 0;
  const bool is_known = payload.has_value() && absl::SimpleAtoi(std::string(*payload), &seconds);
  return is_known ? seconds : 1;
}

}  // namespace wintserve
