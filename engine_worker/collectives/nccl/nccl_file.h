// The shared library of NCCL as a file: whether it is there and has what is asked for. Built and
// tested everywhere, also where neither NCCL nor CUDA is.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace wintserve {

// Stays loaded until the process ends.
class NcclFile {
 public:
  static constexpr char kName[] = "libnccl.so.2";

  // By name where the system looks for libraries, or by path. UNAVAILABLE: it is not there or no
  // library; the message says why, and what to do.
  static absl::StatusOr<NcclFile> Open(const std::string& name = kName);

  // Its address. UNAVAILABLE: the library has none of that name.
  absl::StatusOr<void*> Find(const char* function) const;

 private:
  NcclFile(std::string name, void* library) : name_(std::move(name)), library_(library) {}

  std::string name_;
  void* library_;
};

}  // namespace wintserve
