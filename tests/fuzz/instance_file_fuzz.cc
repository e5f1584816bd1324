// What the launcher hands to a child.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/check.h"
#include "common/config/instance.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  const UniqueFd file(::memfd_create("fuzz-instance", MFD_ALLOW_SEALING | MFD_CLOEXEC));
  CHECK(file.valid());
  CHECK(::write(file.get(), input.data(), input.size()) == static_cast<ssize_t>(input.size()));
  CHECK(::fcntl(file.get(), F_ADD_SEALS,
                F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0);
  const auto instance = ReadInstance(file.get());
  if (!instance.ok()) {
    CHECK(absl::IsInvalidArgument(instance.status()), "{}", instance.status().ToString());
    return;
  }
  const auto written = WriteInstance(*instance);
  CHECK(written.ok(), "{}", written.status().ToString());
  const auto again = ReadInstance(written->get());
  CHECK(again.ok(), "{}", again.status().ToString());
  CHECK(again->token == instance->token && again->rank == instance->rank);
}

}  // namespace wintserve
