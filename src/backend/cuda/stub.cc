#include "core/check.h"
#include "ops/backend.h"

namespace twilight {

std::unique_ptr<Backend> make_cuda_backend(int device) {
  fail(ErrorCode::kUnsupported, "backend", "this build has no CUDA backend, got cuda:", device,
       ", accepted cpu, ref");
}

std::vector<std::string> cuda_devices() { return {}; }
bool has_cuda_backend() { return false; }

}  // namespace twilight
