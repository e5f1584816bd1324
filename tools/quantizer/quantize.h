// `wintserve quantize`, from options to a checkpoint.
#pragma once

#include <atomic>
#include <string>

#include "tools/quantizer/command_line.h"

namespace wintserve::quantizer {

struct QuantizeResult {
  int exit_code = 0;     // of common/exit_code.h
  std::string error;     // one line
  bool stopped = false;  // by *stop
  std::string summary;   // where there is no error: what was made, for stdout
};

// Tells how far it is on stderr. Ends early, with a partial output that can be gone on with, once
// *stop is true.
QuantizeResult Quantize(const QuantizeOptions& options, const std::atomic<bool>* stop);

}  // namespace wintserve::quantizer
