#ifndef TWILIGHT_ENGINE_DEVICE_IMPL_H_
#define TWILIGHT_ENGINE_DEVICE_IMPL_H_

#include <memory>
#include <utility>

#include "core/thread_pool.h"
#include "ops/backend.h"
#include "twilight/device.h"

namespace twilight {

/// The only owner of threads and of a backend.
struct Device::Impl {
  explicit Impl(const DeviceOptions& options);
  /// A backend made elsewhere, for tests.
  Impl(std::unique_ptr<Backend> backend_in, int threads)
      : pool(threads), backend(std::move(backend_in)) {}

  ThreadPool pool;
  std::unique_ptr<Backend> backend;
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_DEVICE_IMPL_H_
