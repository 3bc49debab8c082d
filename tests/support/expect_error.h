#ifndef TWILIGHT_TESTS_SUPPORT_EXPECT_ERROR_H_
#define TWILIGHT_TESTS_SUPPORT_EXPECT_ERROR_H_

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "twilight/error.h"

namespace twilight::test {

/// Expects `call` to throw Error(code) whose text is one line, starts with `[`, and contains every
/// one of `parts`.
template <typename Call>
void expect_error(ErrorCode code, std::initializer_list<std::string> parts, Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), code) << text;
    EXPECT_EQ(text.substr(0, 1), "[") << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    for (const std::string& part : parts) {
      EXPECT_NE(text.find(part), std::string::npos) << "no \"" << part << "\" in: " << text;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown";
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_EXPECT_ERROR_H_
