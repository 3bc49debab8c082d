#include "server/scheduler.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "server/batch_loop.h"
#include "twilight/error.h"

namespace twilight::server {
namespace {

/// No shutdown waits longer; also keeps the end of the wait a time that a clock has.
constexpr std::chrono::hours kLongestWait{24};
/// How long somebody who asked for live views is taken to be interested.
constexpr std::chrono::seconds kWatchFor{5};

}  // namespace

RequestSink::~RequestSink() = default;
// NOLINTNEXTLINE(performance-unnecessary-value-param): what overrides it keeps the vector.
void RequestSink::on_prompt(std::vector<TokenLogprobs> /*tokens*/) {}

struct Scheduler::Impl {
  Impl(const Device& device, const Model& model_in, const SchedulerOptions& options)
      : model(model_in), loop(device, model_in, options), snapshot(loop.stats()) {
    thread = std::thread([this] { run(); });
  }

  void run() {
    for (;;) {
      std::vector<std::unique_ptr<Task>> tasks;
      std::set<Id> ids;
      bool clear = false;
      bool end = false;
      bool watching = false;
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] {
          return quit || clear_cache || !incoming.empty() || !cancels.empty() || !loop.idle();
        });
        if (quit && incoming.empty() && loop.idle()) return;
        tasks.swap(incoming);
        waiting += tasks.size();
        ids.swap(cancels);
        std::swap(clear, clear_cache);
        end = stop;
        watching = Clock::now() - last_watch < kWatchFor;
        if (!watching) live.clear();
      }
      for (auto& task : tasks) loop.accept(std::move(task));
      loop.cancel(ids);
      if (clear) loop.clear_prefix_cache();
      if (end) loop.end_all(EndReason::kShutdown);
      loop.watch(watching ? BatchLoop::LiveVisitor([this](Id id, LiveKept kept) {
        const std::lock_guard lock(mutex);
        if (kept.num_layers == 0) {
          live.erase(id);
        } else {
          live[id] = std::move(kept);
        }
      })
                          : BatchLoop::LiveVisitor());
      try {
        loop.step();
      } catch (...) {  // nothing a request does gets here; memory may have run out
        loop.end_all(EndReason::kError);
      }
      const SchedulerStats stats = loop.stats();
      {
        const std::lock_guard lock(mutex);
        snapshot = stats;
        waiting = loop.queued();
      }
      loop.deliver_ends();
      {
        const std::lock_guard lock(mutex);
        idle = loop.idle() && incoming.empty();
      }
      ended.notify_all();
    }
  }

  Model model;
  BatchLoop loop;  // the thread's alone, but for `check` and `options`

  mutable std::mutex mutex;
  std::condition_variable wake;   // something to do
  std::condition_variable ended;  // nothing left
  std::vector<std::unique_ptr<Task>> incoming;
  std::set<Id> cancels;
  bool clear_cache = false;
  bool draining = false;  // no new requests
  bool stop = false;      // end what there is
  bool quit = false;      // then leave
  bool idle = true;
  std::size_t waiting = 0;
  Id next_id = 1;
  std::int64_t accepted = 0;
  std::int64_t refused = 0;
  SchedulerStats snapshot;
  mutable Clock::time_point last_watch{};
  std::map<Id, LiveKept> live;

  std::thread thread;
};

Scheduler::Scheduler(const Device& device, const Model& model, const SchedulerOptions& options)
    : impl_(std::make_unique<Impl>(device, model, options)) {}

Scheduler::~Scheduler() {
  shutdown(std::chrono::milliseconds(0));
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->quit = true;
  }
  impl_->wake.notify_all();
  impl_->thread.join();
}

std::optional<Scheduler::Id> Scheduler::submit(Request request, std::shared_ptr<RequestSink> sink) {
  Impl& im = *impl_;
  if (sink == nullptr) throw Error(ErrorCode::kInvalidArgument, "[request] sink, got null");
  im.loop.check(request);
  Id id = 0;
  {
    const std::lock_guard lock(im.mutex);
    const auto queued = static_cast<std::int64_t>(im.incoming.size() + im.waiting);
    if (im.draining || queued >= im.loop.options().max_queue) {
      ++im.refused;
      return std::nullopt;
    }
    id = im.next_id++;
    ++im.accepted;
    im.idle = false;
    im.incoming.push_back(std::make_unique<Task>(id, std::move(request), std::move(sink)));
  }
  im.wake.notify_one();
  return id;
}

bool Scheduler::serves(const SparsePolicy& policy) const { return impl_->loop.serves(policy); }

void Scheduler::cancel(Id id) {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->cancels.insert(id);
  }
  impl_->wake.notify_one();
}

void Scheduler::shutdown(std::chrono::milliseconds patience) {
  Impl& im = *impl_;
  std::unique_lock lock(im.mutex);
  im.draining = true;
  const auto done = [&] { return im.idle && im.incoming.empty(); };
  if (im.ended.wait_for(lock, std::min<std::chrono::milliseconds>(patience, kLongestWait), done)) {
    return;
  }
  im.stop = true;
  im.wake.notify_one();
  im.ended.wait(lock, done);
}

SchedulerStats Scheduler::stats() const {
  const Impl& im = *impl_;
  const std::lock_guard lock(im.mutex);
  SchedulerStats stats = im.snapshot;
  stats.queued = static_cast<std::int32_t>(im.incoming.size() + im.waiting);
  stats.requests_accepted = im.accepted;
  stats.requests_refused = im.refused;
  return stats;
}

std::optional<LiveKept> Scheduler::live_kept(Id id) const {
  const Impl& im = *impl_;
  const std::lock_guard lock(im.mutex);
  im.last_watch = Clock::now();
  const auto it = im.live.find(id);
  if (it == im.live.end()) return std::nullopt;
  return it->second;
}

const Model& Scheduler::model() const { return impl_->model; }
const SchedulerOptions& Scheduler::options() const { return impl_->loop.options(); }

void Scheduler::clear_prefix_cache() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->clear_cache = true;
  }
  impl_->wake.notify_one();
}

}  // namespace twilight::server
