// What makes KV content comparable beyond the weights' files.
#pragma once

#include <string>

#include "api_server/text/tokenizer.h"

namespace wintserve {

// Hexadecimal, of the bytes of config.json in the model's directory (rope and normalisation
// settings; nothing when there is none) and of what every id of the vocabulary stands for.
std::string ModelDigest(const std::string& model_path, const Tokenizer& tokenizer);

}  // namespace wintserve
