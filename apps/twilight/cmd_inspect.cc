#include "commands.h"

namespace twilight::app {

void add_inspect(CLI::App& /*app*/, Action& /*action*/) {}

}  // namespace twilight::app
