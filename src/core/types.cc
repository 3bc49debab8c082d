#include "twilight/types.h"

#include "core/check.h"

namespace twilight {

Error::Error(ErrorCode code, const std::string& message)
    : std::runtime_error(message), code_(code) {}
Error::~Error() = default;

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBf16:
      return "bf16";
  }
  fail(ErrorCode::kInternal, "dtype_name", "unknown dtype ", static_cast<int>(dtype));
}

DType parse_dtype(std::string_view name) {
  if (name == "f32") return DType::kF32;
  if (name == "f16") return DType::kF16;
  if (name == "bf16") return DType::kBf16;
  fail(ErrorCode::kInvalidArgument, "dtype", "unknown dtype, got '", name,
       "', accepted f32, f16, bf16");
}

}  // namespace twilight
