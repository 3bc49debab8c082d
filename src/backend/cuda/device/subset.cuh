#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_SUBSET_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_SUBSET_CUH_

#include <cstdint>

namespace twilight::cuda {

/// Which sequences a kernel works on, for device code: those of `ids` (device memory), or the run
/// [first, first + count) where that is null.
struct DeviceSubset {
  const std::int32_t* ids = nullptr;
  std::int32_t first = 0;
  std::int32_t count = 0;

  [[nodiscard]] constexpr std::int32_t at(std::int64_t i) const {
    return ids == nullptr ? first + static_cast<std::int32_t>(i) : ids[i];
  }
};

/// p of each (sequence, query head): an array in device memory, or one number for all.
struct DeviceProbabilities {
  const float* values = nullptr;  ///< [B, Hq]
  float uniform = 1.0F;

  [[nodiscard]] constexpr float at(std::int64_t i) const {
    return values == nullptr ? uniform : values[i];
  }
};

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_SUBSET_CUH_
