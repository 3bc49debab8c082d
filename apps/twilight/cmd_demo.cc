#include "commands.h"

namespace twilight::app {

void add_demo(CLI::App& /*app*/, Action& /*action*/) {}

}  // namespace twilight::app
