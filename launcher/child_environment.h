// Which variables of the launcher's environment its children get.
#pragma once

#include <string_view>

namespace wintserve {

// Whether the variable of that name is one that the programs of an instance, or the libraries in
// them, may need. Whoever starts `wintserve serve` has keys in its environment, of ours
// (FD_API_KEY, which the launcher has read by then) and of others: what is not known to be of use
// does not go further.
bool IsForChildren(std::string_view name);

}  // namespace wintserve
