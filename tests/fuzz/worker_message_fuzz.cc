// What an engine worker sends.
#include <cmath>
#include <string>

#include "api_server/work_queue/message_codec.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  const auto message = DecodeWorkerMessage(input);
  if (!message.ok()) {
    CHECK(absl::IsInvalidArgument(message.status()), "{}", message.status().ToString());
    return;
  }
  // What is understood can be said again, in one way only.
  const std::string bytes = EncodeWorkerMessage(*message);
  const auto again = DecodeWorkerMessage(bytes);
  CHECK(again.ok() && again->index() == message->index(), "{}", again.status().ToString());
  CHECK(EncodeWorkerMessage(*again) == bytes);
}

}  // namespace wintserve
