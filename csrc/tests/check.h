// What a C++ test needs and no more: EXPECT counts failures, finish() turns them into an exit status.
#pragma once

#include <cstdio>

namespace dynplan::test {

inline int failures = 0;

inline void expect(bool condition, const char* text, const char* file, int line) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: expected %s\n", file, line, text);
}

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace dynplan::test

#define EXPECT(condition) dynplan::test::expect((condition), #condition, __FILE__, __LINE__)
