#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

// Runs a fuzz target without a fuzzer: every file of a corpus, random bytes, then mutations of both
// for a while. The order is the same in every run; only how far it gets depends on time.
//
//   <target> [--seconds=N] [--iterations=N] [--seed=N] [--match=SUFFIX] [FILE | FOLDER]...
//
// An input that kills the process is left in crash-<pid>.bin of the working directory; give it as
// FILE to run it again.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
namespace fs = std::filesystem;

// Larger seeds are replayed but not mutated: a mutation seldom reaches what matters in them.
constexpr std::size_t kMaxMutated = std::size_t{1} << 18;

const std::uint8_t* current_data = nullptr;
std::size_t current_size = 0;
char crash_path[64] = "";

void on_crash(int number) {
  const int file = open(crash_path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
  if (file >= 0) {
    std::size_t done = 0;
    while (done < current_size) {
      const auto wrote = write(file, current_data + done, current_size - done);
      if (wrote <= 0) break;
      done += static_cast<std::size_t>(wrote);
    }
    close(file);
  }
  std::signal(number, SIG_DFL);
  std::raise(number);
}

void run(const Bytes& input) {
  // A copy of the exact size, so a sanitizer sees a read past its end.
  const Bytes exact(input.begin(), input.end());
  current_data = exact.data();
  current_size = exact.size();
  (void)LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::size_t below(std::size_t n) { return n == 0 ? 0 : random_() % n; }

  Bytes random_bytes() {
    Bytes out(below(512));
    for (auto& byte : out) byte = static_cast<std::uint8_t>(random_());
    return out;
  }

  Bytes mutate(Bytes bytes, const Bytes& other) {
    for (std::size_t left = 1 + below(6); left > 0; --left) one(bytes, other);
    return bytes;
  }

 private:
  void one(Bytes& bytes, const Bytes& other) {
    static constexpr std::string_view kTokens[] = {
        "0",    "-1",    "1e999",    "18446744073709551616",
        "null", "true",  "{}",       "[]",
        "\"\"", "\"a\"", "[[[[[[[[", "\\u0000",
        "\xFF", ",",     ":",        "}"};
    const std::size_t at = below(bytes.size() + 1);
    const auto offset = static_cast<std::ptrdiff_t>(at);
    const std::size_t rest = bytes.size() - at;
    switch (below(8)) {
      case 0:
        if (rest > 0) bytes[at] ^= static_cast<std::uint8_t>(1U << below(8));
        break;
      case 1:
        if (rest > 0) bytes[at] = static_cast<std::uint8_t>(random_());
        break;
      case 2:
        bytes.insert(bytes.begin() + offset, static_cast<std::uint8_t>(random_()));
        break;
      case 3: {
        const auto count = static_cast<std::ptrdiff_t>(below(std::min<std::size_t>(rest, 64) + 1));
        bytes.erase(bytes.begin() + offset, bytes.begin() + offset + count);
        break;
      }
      case 4: {  // repeat a piece
        const std::size_t count = below(std::min<std::size_t>(rest, 64) + 1);
        const Bytes piece(bytes.begin() + offset,
                          bytes.begin() + offset + static_cast<std::ptrdiff_t>(count));
        bytes.insert(bytes.begin() + offset, piece.begin(), piece.end());
        break;
      }
      case 5: {  // a piece of another input
        const std::size_t from = below(other.size());
        const std::size_t count = below(std::min<std::size_t>(other.size() - from, 128) + 1);
        const auto begin = other.begin() + static_cast<std::ptrdiff_t>(from);
        bytes.insert(bytes.begin() + offset, begin, begin + static_cast<std::ptrdiff_t>(count));
        break;
      }
      case 6: {  // a word the formats know
        const std::string_view token = kTokens[below(std::size(kTokens))];
        bytes.insert(bytes.begin() + offset, token.begin(), token.end());
        break;
      }
      default:  // overwrite a 32-bit integer with an extreme one
        for (std::size_t i = 0; i < std::min<std::size_t>(rest, 4); ++i) {
          static constexpr std::uint32_t kExtremes[] = {0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
          bytes[at + i] = static_cast<std::uint8_t>(kExtremes[at % 5] >> (8 * i));
        }
        break;
    }
  }

  std::mt19937_64 random_;
};

Bytes read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool flag_value(std::string_view argument, std::string_view name, std::string& value) {
  if (argument.substr(0, name.size()) != name) return false;
  value = argument.substr(name.size());
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 1;
  std::uint64_t iterations = ~std::uint64_t{0};
  std::uint64_t seed = 1;
  std::string match;
  std::vector<fs::path> roots;
  for (int i = 1; i < argc; ++i) {
    std::string value;
    if (flag_value(argv[i], "--seconds=", value)) {
      seconds = std::stod(value);
    } else if (flag_value(argv[i], "--iterations=", value)) {
      iterations = std::stoull(value);
    } else if (flag_value(argv[i], "--seed=", value)) {
      seed = std::stoull(value);
    } else if (!flag_value(argv[i], "--match=", match)) {
      roots.emplace_back(argv[i]);
    }
  }
  (void)std::snprintf(crash_path, sizeof crash_path, "crash-%d.bin", getpid());
  for (const int number : {SIGSEGV, SIGABRT, SIGILL, SIGFPE, SIGBUS, SIGTRAP}) {
    std::signal(number, on_crash);
  }

  std::vector<fs::path> files;
  for (const fs::path& root : roots) {
    if (!fs::exists(root)) {
      std::fprintf(stderr, "no such corpus: %s\n", root.c_str());
      return 1;
    }
    if (fs::is_regular_file(root)) files.push_back(root);
    if (!fs::is_directory(root)) continue;
    for (fs::recursive_directory_iterator it(root), end; it != end; ++it) {
      const std::string name = it->path().filename().string();
      const bool matches = name.size() >= match.size() &&
                           name.compare(name.size() - match.size(), match.size(), match) == 0;
      if (it->is_regular_file() && matches) files.push_back(it->path());
    }
  }
  if (files.empty() && !roots.empty()) {
    std::fprintf(stderr, "the corpus has no file that ends in '%s'\n", match.c_str());
    return 1;
  }
  std::sort(files.begin(), files.end());

  Mutator mutator(seed);
  std::vector<Bytes> pool;
  for (const fs::path& path : files) {
    Bytes bytes = read_file(path);
    run(bytes);
    if (bytes.size() <= kMaxMutated) pool.push_back(std::move(bytes));
  }
  run({});
  for (int i = 0; i < 32; ++i) {
    pool.push_back(mutator.random_bytes());
    run(pool.back());
  }
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::uint64_t done = 0;
  for (; done < iterations && std::chrono::steady_clock::now() < stop; ++done) {
    // Every other time a file of the corpus where there is one.
    const std::size_t from_files = pool.size() - 32;
    const std::size_t pick =
        done % 2 == 0 && from_files > 0 ? mutator.below(from_files) : mutator.below(pool.size());
    run(mutator.mutate(pool[pick], pool[mutator.below(pool.size())]));
  }
  std::printf("%zu files, %llu mutations\n", files.size(), static_cast<unsigned long long>(done));
  return 0;
}
