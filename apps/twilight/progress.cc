#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "interrupt.h"

namespace twilight::app {
namespace {

constexpr int kBarCells = 24;
constexpr auto kRedrawInterval = std::chrono::milliseconds(100);

}  // namespace

bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }
bool stdout_is_terminal() { return ::isatty(STDOUT_FILENO) == 1; }

ProgressBar::ProgressBar(std::string label, std::string unit, bool enabled)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      enabled_(enabled && stderr_is_terminal()),
      start_(std::chrono::steady_clock::now()) {}

ProgressBar::~ProgressBar() { clear(); }

void ProgressBar::update(std::int64_t done, std::int64_t total) {
  if (!enabled_ || total <= 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (drawn_ && done < total && now - last_ < kRedrawInterval) return;
  last_ = now;
  drawn_ = true;
  const double share = std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0);
  const int filled = static_cast<int>(share * kBarCells);
  std::string bar;
  for (int cell = 0; cell < kBarCells; ++cell) bar += cell < filled ? "█" : "░";
  const double seconds = std::chrono::duration<double>(now - start_).count();
  std::string tail;
  if (!unit_.empty()) {
    tail = "  " + std::to_string(done) + " / " + std::to_string(total) + " " + unit_;
    if (seconds > 0.5 && done > 0) {
      char rate[64];
      std::snprintf(rate, sizeof(rate), "  %.0f %s/s, %.0f s left",
                    static_cast<double>(done) / seconds, unit_.c_str(),
                    seconds * (1 - share) / std::max(share, 1e-9));
      tail += rate;
    }
  }
  std::fprintf(stderr, "\r\033[K%s %s %3.0f %%%s", label_.c_str(), bar.c_str(), share * 100,
               tail.c_str());
  std::fflush(stderr);
}

void ProgressBar::clear() {
  if (!drawn_) return;
  std::fprintf(stderr, "\r\033[K");
  std::fflush(stderr);
  drawn_ = false;
}

Progress ProgressBar::callback() {
  return [this](std::int64_t done, std::int64_t total) {
    update(done, total);
    return !interrupted();
  };
}

}  // namespace twilight::app
