// fuzz [--seconds S] [--seed N] [--target NAME] [--first I] [--inputs N]
//
// Input I of a target depends on the seed and I alone. Targets share the seconds in turns. A finding names the
// input; `--seed N --target NAME --first I --inputs 1` runs it again.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz/targets.h"
#include "tests/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

using namespace dynplan::fuzz;

namespace {

struct Options {
  double seconds = 10;
  uint64_t seed = 1;
  std::string target;
  int64_t first = 0, inputs = std::numeric_limits<int64_t>::max();
};

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = words[i];
    if (i + 1 == count) throw std::invalid_argument("expected a value after " + name);
    const std::string value = words[i + 1];
    if (name == "--seconds")
      options.seconds = std::stod(value);
    else if (name == "--seed")
      options.seed = std::stoull(value);
    else if (name == "--target")
      options.target = value;
    else if (name == "--first")
      options.first = std::stoll(value);
    else if (name == "--inputs")
      options.inputs = std::stoll(value);
    else
      throw std::invalid_argument("expected --seconds, --seed, --target, --first or --inputs, got " + name);
  }
  return options;
}

uint64_t seed_of(const Options& options, const Target& target, int64_t input) {
  uint64_t seed = options.seed;
  for (const char* letter = target.name; *letter != '\0'; ++letter) seed = seed * 1099511628211u + *letter;
  return Source(seed)() + static_cast<uint64_t>(input);
}

// What a sanitizer's report is about.
struct Running {
  const char* target = "";
  uint64_t seed = 0;
  int64_t input = 0;
} running;

void tell_input() {
  std::fprintf(stderr, "finding: --seed %llu --target %s --first %lld --inputs 1\n",
               static_cast<unsigned long long>(running.seed), running.target,
               static_cast<long long>(running.input));
}

// False at the first finding.
bool run_one(const Options& options, const Target& target, int64_t input) {
  running = {target.name, options.seed, input};
  Source random(seed_of(options, target, input));
  try {
    target.one(random);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "unexpected exception: %s\n", error.what());
    ++dynplan::test::failures;
  }
  if (dynplan::test::failures == 0) return true;
  tell_input();
  return false;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int count, char** words) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(&tell_input);
#endif
  Options options;
  try {
    options = parse(count, words);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fuzz: %s\n", error.what());
    return 2;
  }
  std::vector<Target> targets;
  for (const Target& target : kTargets)
    if (options.target.empty() || options.target == target.name) targets.push_back(target);
  if (targets.empty()) {
    std::fprintf(stderr, "fuzz: no target is named %s\n", options.target.c_str());
    return 2;
  }
  constexpr double kTurn = 0.5;  // seconds
  std::vector<int64_t> inputs(targets.size());
  std::vector<double> spent(targets.size());
  const auto start = std::chrono::steady_clock::now();
  bool more = true;
  while (more && seconds_since(start) < options.seconds) {
    more = false;
    for (size_t t = 0; t < targets.size(); ++t) {
      const auto turn = std::chrono::steady_clock::now();
      for (; inputs[t] < options.inputs && seconds_since(turn) < kTurn; ++inputs[t])
        if (!run_one(options, targets[t], options.first + inputs[t])) return 1;
      spent[t] += seconds_since(turn);
      more |= inputs[t] < options.inputs;
    }
  }
  int64_t total = 0;
  for (size_t t = 0; t < targets.size(); ++t) {
    std::printf("%-22s %12lld inputs %8.1f s\n", targets[t].name, static_cast<long long>(inputs[t]), spent[t]);
    total += inputs[t];
  }
  std::printf("%-22s %12lld inputs %8.1f s, seed %llu, no finding\n", "all", static_cast<long long>(total),
              seconds_since(start), static_cast<unsigned long long>(options.seed));
}
