// One .safetensors file.
#include <string>

#include "common/check.h"
#include "engine_worker/weights/safetensors.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  const auto file = SafetensorsFile::Open(dir.Write("model.safetensors", input));
  if (!file.ok()) {
    CHECK(absl::IsDataLoss(file.status()), "{}", file.status().ToString());
    return;
  }
  CHECK(file->size_bytes() == static_cast<int64_t>(input.size()));
  size_t num_bytes = 0;
  uint8_t sum = 0;
  for (const auto& [name, view] : file->tensors()) {
    int64_t num_elements = 1;
    for (const int64_t size : view.shape) num_elements *= size;
    CHECK(num_elements * TensorTypeBytes(view.type) == static_cast<int64_t>(view.data.size()));
    for (const uint8_t byte : view.data) sum ^= byte;
    num_bytes += view.data.size();
  }
  CHECK(num_bytes == file->data().size(), "{}", sum);
}

}  // namespace wintserve
