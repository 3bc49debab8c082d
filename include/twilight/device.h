#ifndef TWILIGHT_DEVICE_H_
#define TWILIGHT_DEVICE_H_

#include <memory>
#include <string>
#include <vector>

#include "twilight/export.h"

namespace twilight {

struct DeviceOptions {
  /// "cpu" (SIMD), "ref" (scalar reference, slow) or "cuda:N" where the build has it.
  std::string device = "cpu";
  /// Worker threads; 0 takes the processors this process may use.
  int threads = 0;
  /// Instruction set of the CPU kernels: "auto", or one by name; an unknown name is an error that
  /// lists them.
  std::string isa = "auto";
};

/// Where work runs: kernels and threads. A cheap handle, copies share it. Objects made on one
/// device share its threads, so only one of them may be working at a time.
class TWILIGHT_API Device {
 public:
  explicit Device(const DeviceOptions& options = {});
  ~Device();
  Device(const Device&);
  Device& operator=(const Device&);

  /// One line for people, e.g. "cpu (avx512_bf16, 2 threads)".
  [[nodiscard]] std::string description() const;
  [[nodiscard]] int threads() const;
  /// Whether products read quantised weights as the file holds them. Otherwise engines keep a copy
  /// in f16.
  [[nodiscard]] bool takes_weight_blocks() const;

  struct Impl;
  explicit Device(std::shared_ptr<Impl> impl);
  [[nodiscard]] Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<Impl> impl_;
};

/// A device that DeviceOptions::device takes, or a kind that is missing and why.
struct DeviceLine {
  std::string name;         ///< "cpu", "ref", "cuda:0" ...; "cuda" where there is none
  std::string description;  ///< for people
};
[[nodiscard]] TWILIGHT_API std::vector<DeviceLine> list_devices();

}  // namespace twilight

#endif  // TWILIGHT_DEVICE_H_
