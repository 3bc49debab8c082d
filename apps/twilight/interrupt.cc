#include "interrupt.h"

#include <unistd.h>

#include <csignal>

namespace twilight::app {
namespace {

volatile std::sig_atomic_t flag = 0;

extern "C" void on_signal(int /*signal*/) {
  if (flag != 0) ::_exit(kInterruptedExit);
  flag = 1;
}

}  // namespace

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() { return flag != 0; }

}  // namespace twilight::app
