// A checkpoint's files as one text, so that a fuzzer can change them and tensors' data take no
// room:
//
//   @NAME SIZE     a .safetensors file: what follows, up to the next such line, is its header's
//                  JSON; then come SIZE zeros as the tensors' data
//   @NAME          any other file, with what follows
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace wintserve {

struct CheckpointFile {
  std::string name;
  std::string content;  // a .safetensors file's without its data
  size_t num_zeros = 0;
};

// Files of other names than "model…", "rank0/model…", "rank1/model…" and config.json are left out,
// and so is data beyond 1 MiB a file.
std::vector<CheckpointFile> SplitCheckpointFiles(std::string_view text);

}  // namespace wintserve
