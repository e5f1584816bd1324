// What the API server sends to an engine worker, plans included.
#include <string>
#include <variant>

#include "api_server/work_queue/message_codec.h"
#include "api_server/work_queue/plan_codec.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {
namespace {

std::string Encode(const ServerEvent& event) {
  return std::visit(
      [](const auto& message) {
        if constexpr (requires { message.plan; }) {
          return EncodePlanMessage(message.plan).message;
        } else {
          return EncodeServerMessage(message);
        }
      },
      event);
}

}  // namespace

void FuzzInput(std::string_view input) {
  const auto event = DecodeServerMessage(input);
  if (!event.ok()) {
    CHECK(absl::IsInvalidArgument(event.status()), "{}", event.status().ToString());
    return;
  }
  const std::string bytes = Encode(*event);
  const auto again = DecodeServerMessage(bytes);
  CHECK(again.ok() && again->index() == event->index(), "{}", again.status().ToString());
  CHECK(Encode(*again) == bytes);
}

}  // namespace wintserve
