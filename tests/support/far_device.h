#ifndef TWILIGHT_TESTS_SUPPORT_FAR_DEVICE_H_
#define TWILIGHT_TESTS_SUPPORT_FAR_DEVICE_H_

#include <memory>
#include <utility>

#include "core/thread_pool.h"
#include "engine/device_impl.h"
#include "support/far_backend.h"

namespace twilight::test {

/// A device whose memory the host cannot touch.
struct FarDevice {
  explicit FarDevice(IndexLayout layout = IndexLayout::kTokenLanes, bool reference = false)
      : pool(2), device(make(layout, reference)) {}

  Device make(IndexLayout layout, bool reference) {
    auto far = std::make_unique<FarBackend>(
        reference ? make_ref_backend() : make_cpu_backend(pool, "auto"), layout);
    backend = far.get();
    return Device(std::make_shared<Device::Impl>(std::move(far), 1));
  }

  ThreadPool pool;
  FarBackend* backend = nullptr;
  Device device;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_FAR_DEVICE_H_
