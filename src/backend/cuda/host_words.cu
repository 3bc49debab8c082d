#include <algorithm>
#include <cstring>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/host_words.h"

namespace twilight::cuda {
namespace {

// Arguments of a kernel may take 4 KiB everywhere and 32,764 bytes from sm_70 on.
constexpr int kSmallWords = 256;
constexpr int kLargeWords = 8000;

template <int kWords>
struct Words {
  std::uint32_t word[kWords];
};

template <int kWords>
__global__ void send_words_kernel(const __grid_constant__ Words<kWords> from, std::uint32_t* to,
                                  int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.word[i];
}

template <int kWords>
void send(const std::uint32_t* host, std::uint32_t* device, std::int64_t count,
          cudaStream_t stream) {
  Words<kWords> words;
  std::memcpy(words.word, host, static_cast<std::size_t>(count) * sizeof(std::uint32_t));
  send_words_kernel<kWords><<<1, 256, 0, stream>>>(words, device, static_cast<int>(count));
  check_launch("send_words");
}

}  // namespace

void send_words(const void* host, void* device, std::int64_t count, cudaStream_t stream) {
  const auto* from = static_cast<const std::uint32_t*>(host);
  auto* to = static_cast<std::uint32_t*>(device);
  for (std::int64_t at = 0; at < count;) {
    const std::int64_t words = std::min<std::int64_t>(count - at, kLargeWords);
    if (words <= kSmallWords) {
      send<kSmallWords>(from + at, to + at, words, stream);
    } else {
      send<kLargeWords>(from + at, to + at, words, stream);
    }
    at += words;
  }
}

std::int64_t subset_words(const StepCaps& caps) {
  return std::int64_t{caps.max_seqs} * (1 + caps.num_q_heads) + 32;
}

DeviceSubset device_subset(const SeqSubset& seqs, Arena& arena, cudaStream_t stream) {
  DeviceSubset subset{.ids = nullptr, .first = 0, .count = seqs.count};
  if (seqs.ids == nullptr || seqs.count == 0) return subset;
  subset.first = seqs.ids[0];
  if (seqs.ids[seqs.count - 1] - seqs.ids[0] == seqs.count - 1) return subset;
  auto* ids = arena.take<std::int32_t>("sequence ids", seqs.count);
  send_words(seqs.ids, ids, seqs.count, stream);
  subset.ids = ids;
  return subset;
}

DeviceProbabilities device_probabilities(const float* p, const SeqSubset& seqs,
                                         std::int32_t num_seqs, std::int32_t num_q_heads,
                                         Arena& arena, cudaStream_t stream) {
  if (p == nullptr || seqs.count == 0) return {};
  DeviceProbabilities out{.values = nullptr, .uniform = p[std::int64_t{seqs.at(0)} * num_q_heads]};
  bool equal = true;
  for (std::int32_t i = 0; i < seqs.count && equal; ++i) {
    const float* row = p + std::int64_t{seqs.at(i)} * num_q_heads;
    equal = std::all_of(row, row + num_q_heads, [&](float x) { return x == out.uniform; });
  }
  if (equal) return out;
  const std::int64_t count = std::int64_t{num_seqs} * num_q_heads;
  auto* values = arena.take<float>("p", count);
  send_words(p, values, count, stream);
  out.values = values;
  return out;
}

}  // namespace twilight::cuda
