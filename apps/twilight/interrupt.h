#ifndef TWILIGHT_APPS_INTERRUPT_H_
#define TWILIGHT_APPS_INTERRUPT_H_

namespace twilight::app {

/// From now on the first Ctrl-C (or SIGTERM) only sets a flag, so work ends cleanly with what it
/// has; a second one ends the program at once.
void catch_interrupts();
[[nodiscard]] bool interrupted();

/// Exit status of a program that was interrupted, as shells expect it.
inline constexpr int kInterruptedExit = 130;

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INTERRUPT_H_
