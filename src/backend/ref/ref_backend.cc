#include "backend/ref/ref_backend.h"

#include "core/check.h"
#include "ops/validate.h"

namespace twilight {

std::unique_ptr<Backend> make_ref_backend() { return std::make_unique<ref::RefBackend>(); }

namespace ref {

std::string RefBackend::description() const { return "ref: scalar, double accumulation, 1 thread"; }

Support RefBackend::supports(const StepCaps& caps, DType /*cache_dtype*/,
                             const IndexFormat& format) const {
  const auto no = [](const auto&... parts) { return Support{false, cat(parts...)}; };
  if (caps.head_dim < 1 || caps.head_dim > kMaxHeadDim) {
    return no("head_dim ", caps.head_dim, ", accepted 1 to ", kMaxHeadDim);
  }
  if (caps.page_size < 1 || caps.page_size > kMaxPageSize) {
    return no("page_size ", caps.page_size, ", accepted 1 to ", kMaxPageSize);
  }
  if (caps.num_kv_heads < 1 || caps.num_q_heads < 1 || caps.num_q_heads % caps.num_kv_heads != 0) {
    return no("query heads ", caps.num_q_heads, ", accepted positive multiples of the ",
              caps.num_kv_heads, " KV heads");
  }
  if (format.key_bits != 0 && format.key_bits != 2 && format.key_bits != 4 &&
      format.key_bits != 8) {
    return no("key_bits ", format.key_bits, ", accepted 0, 2, 4 or 8");
  }
  const int unit = head_dim_unit(format);
  if (caps.head_dim % unit != 0) {
    return no("head_dim ", caps.head_dim, ", accepted multiples of ", unit,
              " with this index format");
  }
  return {};
}

std::size_t RefBackend::workspace_bytes(const StepCaps& /*caps*/) const { return 0; }

}  // namespace ref
}  // namespace twilight
