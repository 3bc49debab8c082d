#ifndef TWILIGHT_ENGINE_C_API_H_
#define TWILIGHT_ENGINE_C_API_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "core/check.h"
#include "kvcache/paged_kv_view.h"
#include "quant/index_format.h"
#include "twilight/c.h"
#include "twilight/device.h"
#include "twilight/policy.h"

/// What the files of the C interface share: no exception passes, structs are read by the size their
/// caller gave, and views become those of the ops after the checks that raw memory needs.
struct twl_context {
  twilight::Device device;
};

namespace twilight::c_api {

/// Keeps the text for twl_last_error; cuts it, allocates nothing.
void set_last_error(const char* text) noexcept;
[[nodiscard]] twl_status status_of(ErrorCode code) noexcept;

/// Runs `body` and turns what it throws into a status.
template <typename Body>
twl_status guarded(Body&& body) noexcept {
  try {
    body();
    return TWL_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return status_of(error.code());
  } catch (const std::bad_alloc&) {
    set_last_error("[memory] out of memory");
    return TWL_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return TWL_INTERNAL;
  } catch (...) {
    set_last_error("[internal] unknown exception");
    return TWL_INTERNAL;
  }
}

inline void require_pointer(const void* pointer, const char* where, const char* name) {
  require(pointer != nullptr, where, name, ", got null, accepted a valid pointer");
}

/// Smallest struct_size accepted: through the last field of the first version that had the struct.
template <typename T>
inline constexpr std::size_t kFirstSize = sizeof(T);
template <>
inline constexpr std::size_t kFirstSize<twl_policy> = offsetof(twl_policy, candidate_mass);
template <>
inline constexpr std::size_t kFirstSize<twl_index_view> = offsetof(twl_index_view, value_bits);

/// Refuses to fill a struct whose caller cannot see what the library has to tell.
template <typename T>
void require_whole(const T* from, const char* where, const char* name) {
  if (from->struct_size >= sizeof(T)) return;
  fail(ErrorCode::kUnsupported, where, name, ".struct_size, got ", from->struct_size, ", accepted ",
       sizeof(T), " or more for this policy");
}

/// Checks struct_size of a struct this library fills.
template <typename T>
void require_size(const T* from, const char* where, const char* name) {
  require_pointer(from, where, name);
  require(from->struct_size >= kFirstSize<T>, where, name, ".struct_size, got ", from->struct_size,
          ", accepted ", kFirstSize<T>, " or more");
}

/// A copy of a caller's struct; fields past its size are zero. A caller newer than this library is
/// accepted where what it adds is zero.
template <typename T>
[[nodiscard]] T read_struct(const T* from, const char* where, const char* name) {
  require_size(from, where, name);
  // Far above any struct of ours, and small enough not to run over a page of garbage.
  constexpr std::size_t kLargest = 4096;
  const std::size_t size = from->struct_size;
  require(size <= kLargest, where, name, ".struct_size, got ", size, ", accepted ", kFirstSize<T>,
          " to ", kLargest);
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  for (std::size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      fail(ErrorCode::kUnsupported, where, name, ".struct_size, got ", size,
           " with fields this version does not know, accepted up to ", sizeof(T));
    }
  }
  T out{};
  std::memcpy(&out, from, std::min(size, sizeof(T)));
  return out;
}

[[nodiscard]] SparsePolicy read_policy(const twl_policy* policy, const char* where);
[[nodiscard]] DType read_dtype(std::int32_t dtype, const char* where, const char* name);

/// Checks shapes and plane alignment; strides and null planes are left to the ops.
[[nodiscard]] PagedKvView read_kv(const twl_kv_view* view, const char* where,
                                  std::int32_t* num_pages = nullptr);
/// Checks lengths against `max_tokens` and the block table against the pages that exist.
void check_tables(const PagedKvView& kv, std::int32_t num_pages, std::int64_t max_tokens,
                  const char* where);
/// `layout` is the order of codes of the backend that will read it.
[[nodiscard]] KeyIndexView read_index(const twl_index_view* view, IndexLayout layout,
                                      const char* where);

}  // namespace twilight::c_api

#endif  // TWILIGHT_ENGINE_C_API_H_
