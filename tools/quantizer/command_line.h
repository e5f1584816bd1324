// The command line of `wintserve quantize`.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "tools/quantizer/make_quantizer.h"
#include "tools/quantizer/output/scheme.h"

namespace wintserve::quantizer {

struct QuantizeOptions {
  std::filesystem::path model;
  std::filesystem::path output;
  SchemeOptions scheme;
  MethodOptions method;
  double max_shard_gib = 4;
  int num_threads = 1;
  bool overwrite_partial = false;
};

struct QuantizeCommand {
  // Exactly one of these three holds.
  std::string error;  // one line for stderr; exit with kExitUsage
  std::string print;  // help for stdout; exit with kExitOk
  bool run = false;

  QuantizeOptions options;
};

// args: without the program's name. num_cores: what --threads is by default.
QuantizeCommand ParseQuantizeCommand(const std::vector<std::string>& args, int num_cores);

}  // namespace wintserve::quantizer
