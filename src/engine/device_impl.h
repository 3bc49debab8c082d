#ifndef TWILIGHT_ENGINE_DEVICE_IMPL_H_
#define TWILIGHT_ENGINE_DEVICE_IMPL_H_

#include <memory>

#include "core/thread_pool.h"
#include "ops/backend.h"
#include "twilight/device.h"

namespace twilight {

/// The only owner of threads and of a backend.
struct Device::Impl {
  explicit Impl(const DeviceOptions& options);

  ThreadPool pool;
  std::unique_ptr<Backend> backend;
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_DEVICE_IMPL_H_
