#include "twilight/device.h"

#include <charconv>

#include "core/check.h"
#include "engine/device_impl.h"

namespace twilight {
namespace {

std::unique_ptr<Backend> make_backend(const DeviceOptions& options, ThreadPool& pool) {
  const std::string& name = options.device;
  if (name == "cpu") return make_cpu_backend(pool, options.isa);
  if (name == "ref") return make_ref_backend();
  if (name.rfind("cuda:", 0) == 0) {
    int index = 0;
    const auto [stop, error] = std::from_chars(name.data() + 5, name.data() + name.size(), index);
    if (error == std::errc() && stop == name.data() + name.size() && index >= 0) {
      return make_cuda_backend(index);
    }
  }
  fail(ErrorCode::kInvalidArgument, "device", "unknown device, got '", name,
       "', accepted cpu, ref, cuda:N");
}

}  // namespace

Device::Impl::Impl(const DeviceOptions& options)
    : pool(options.threads), backend(make_backend(options, pool)) {}

Device::Device(const DeviceOptions& options) : impl_(std::make_shared<Impl>(options)) {}
Device::Device(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Device::~Device() = default;
Device::Device(const Device&) = default;
Device& Device::operator=(const Device&) = default;

std::string Device::description() const { return impl_->backend->description(); }
std::vector<DeviceLine> list_devices() {
  std::vector<DeviceLine> lines;
  lines.push_back({"cpu", Device({.device = "cpu"}).description()});
  lines.push_back({"ref", "scalar reference, slow"});
  const std::vector<std::string> gpus = cuda_devices();
  for (std::size_t i = 0; i < gpus.size(); ++i) lines.push_back({cat("cuda:", i), gpus[i]});
  if (gpus.empty()) {
    lines.push_back({"cuda", has_cuda_backend() ? "no GPU found" : "not in this build"});
  }
  return lines;
}

bool Device::takes_weight_blocks() const { return impl_->backend->takes_weight_blocks(); }
int Device::threads() const { return impl_->pool.num_threads(); }

}  // namespace twilight
