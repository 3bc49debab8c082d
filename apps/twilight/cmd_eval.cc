#include "commands.h"

namespace twilight::app {

void add_eval(CLI::App& /*app*/, Action& /*action*/) {}

}  // namespace twilight::app
