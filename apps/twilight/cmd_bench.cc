#include "commands.h"

namespace twilight::app {

void add_bench(CLI::App& /*app*/, Action& /*action*/) {}

}  // namespace twilight::app
