// Text for calibration: records of a file as sequences of token ids.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/tokenizer.h"

namespace wintserve::quantizer {

using TokenSequence = std::vector<int32_t>;

struct CalibrationLimits {
  int64_t max_records = 0;  // 0: all
  int64_t max_tokens = 0;   // of all sequences together; the last one is cut to it. 0: all
  int64_t max_sequence_tokens = 2048;  // >= 1
};

struct CalibrationText {
  std::vector<TokenSequence> sequences;  // none is empty
  int64_t num_records = 0;               // that the sequences come from
  int64_t num_cut_records = 0;  // that were longer than a sequence may be, and lost their end
  int64_t num_tokens = 0;
};

// A file named *.jsonl holds a record a line (tools/text/records.h), each an object with either
//   "text"      a string, a document, or
//   "messages"  a chat, [{"role", "content"}, …]
// encoded as tools/text/encode_text.h says. Other keys are ignored. A record makes one sequence,
// cut to max_sequence_tokens; an empty text makes none.
// Any other file is plain text: its tokens alone, in pieces of max_sequence_tokens, each a record.
// Errors: NOT_FOUND or what else errno says of the file; INVALID_ARGUMENT for a line that is no
// such record, as FILE:LINE: FIELD: what is wrong, and for a file without a token.
absl::StatusOr<CalibrationText> LoadCalibrationText(const std::filesystem::path& path,
                                                    const Tokenizer& tokenizer,
                                                    const CalibrationLimits& limits);

}  // namespace wintserve::quantizer
