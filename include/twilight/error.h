#ifndef TWILIGHT_ERROR_H_
#define TWILIGHT_ERROR_H_

#include <stdexcept>
#include <string>

#include "twilight/export.h"

namespace twilight {

/// What kind of mistake an `Error` reports.
enum class ErrorCode {
  kInvalidArgument,  ///< a value the caller passed is outside what is accepted
  kInvalidFile,      ///< a file is malformed, truncated or inconsistent
  kNotFound,         ///< a file or name does not exist
  kIo,               ///< the system could not read or write
  kUnsupported,      ///< valid, but this build, machine or backend cannot do it
  kOutOfMemory,      ///< a pool or the system has no room left
  kInternal,         ///< a bug in this library
};

/// Thrown at the public boundary for caller mistakes, bad files and missing backends. The text is
/// one line: `[where] what, got VALUE, accepted SET`. Expected outcomes (no free page) are never
/// thrown.
class TWILIGHT_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message);
  ~Error() override;

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace twilight

#endif  // TWILIGHT_ERROR_H_
