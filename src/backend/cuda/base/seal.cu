#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/rotate.cuh"
#include "quant/code_place.h"

// seal_pages_kernel: a block per (page, KV head), a thread per channel where sums run over tokens
// and 16 threads per token where they run over channels: the lanes of quant/lane_sum.h. Tokens pass
// through shared memory 16 at a time, so any page size fits. Every operation and its order are
// those of quant/page_codec.cc; this file is compiled without contraction. Bound by latency. Tests:
// tests/cuda/index_cuda_test.cc (byte for byte).
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = kEstimateTileTokens;
constexpr int kLanes = 16;
constexpr float kF16Largest = 65504.0F;
static_assert(kTile * kLanes == kThreads && kMaxHeadDim <= kThreads);

struct Shared {
  float rows[kTile][kMaxHeadDim];
  float centres[kSubCentroids][kMaxHeadDim];
  float energies[kTile];
  std::uint32_t tile[kTile * kMaxHeadDim / 4 + kTile];  ///< codes, scales, zeros
  float reduce[32];
  std::uint8_t codes[kMaxHeadDim];
  PageParams params;
  int deviant;
};

__device__ std::uint16_t f16_bits(float x) {
  const float low = x < -kF16Largest ? -kF16Largest : x;
  return f32_to_f16(low > kF16Largest ? kF16Largest : low);
}

struct LowerOf {
  __device__ float operator()(float a, float b) const { return b < a ? b : a; }
};
struct HigherOf {
  __device__ float operator()(float a, float b) const { return a < b ? b : a; }
};

/// Sum over the 16 lanes of a token in the order of lane_sum; every lane gets it.
__device__ float fold_lanes(float x) {
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    x += __shfl_down_sync(kFullMask, x, width, kLanes);
  }
  return __shfl_sync(kFullMask, x, 0, kLanes);
}

template <typename Op>
__device__ float reduce_lanes(float x, const Op& op) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = op(x, __shfl_xor_sync(kFullMask, x, step, kLanes));
  return x;
}

/// Asymmetric codes of `levels` + 1 steps from lo to hi.
struct Quantiser {
  std::uint16_t scale_bits;
  std::uint16_t zero_bits;
  float scale;
  float zero;
  float levels;

  __device__ Quantiser(float top, float lo, float hi)
      : scale_bits(f16_bits((hi - lo) / top)),
        zero_bits(f16_bits(lo)),
        scale(f16_to_f32(scale_bits)),
        zero(f16_to_f32(zero_bits)),
        levels(top) {}
  [[nodiscard]] __device__ unsigned code(float x) const {
    if (scale == 0.0F) return 0;
    const float steps = rintf((x - zero) / scale);
    return static_cast<unsigned>(!(steps > 0.0F) ? 0.0F : LowerOf()(steps, levels));
  }
};

__device__ std::uint16_t bf16_floor_bits(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  const bool away = (bits >> 31) != 0 && (bits & 0xffffU) != 0;
  return static_cast<std::uint16_t>((bits >> 16) + (away ? 1U : 0U));
}

template <typename T>
class Page {
 public:
  __device__ Page(const SealPagesParams& params, Shared& shared)
      : kv_(params.kv),
        index_(params.index),
        format_(params.index.format),
        s_(shared),
        page_(params.pages[blockIdx.x]),
        head_(blockIdx.y),
        head_dim_(params.kv.head_dim),
        page_size_(params.kv.page_size),
        d_(static_cast<int>(threadIdx.x)),
        t_(static_cast<int>(threadIdx.x) / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes) {}

  __device__ void encode() {
    if (threadIdx.x == 0) s_.params = {};
    __syncthreads();
    if (num_centroids(format_.summary) > 0 || format_.key_bits == 2) encode_rotated();
    if (format_.summary == SummaryKind::kQuestBf16 || format_.summary == SummaryKind::kQuest4) {
      encode_quest();
    }
    if (format_.key_bits == 4 || format_.key_bits == 8) encode_plain();
    if (format_.value_bits != 0) encode_value_mean();
    __syncthreads();
    if (threadIdx.x == 0 && format_.has_params()) {
      *reinterpret_cast<PageParams*>(index_.params + page_ * index_.params_page_stride +
                                     head_ * index_.params_head_stride) = s_.params;
    }
  }

 private:
  [[nodiscard]] __device__ float element(const PagePlane& plane, int slot, int d) const {
    return to_f32(row_of<T>(kv_, plane, page_, head_, slot)[d]);
  }

  /// Rows first .. first + 15 of the page into shared memory; zeros past its end.
  __device__ void load_tile(const PagePlane& plane, int first) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * head_dim_; i += kThreads) {
      const int slot = first + i / head_dim_;
      s_.rows[i / head_dim_][i % head_dim_] =
          slot < page_size_ ? element(plane, slot, i % head_dim_) : 0.0F;
    }
    __syncthreads();
  }

  /// x [D] of shared memory as 4-bit codes at `codes`, decoded in place; returns the scale's bits.
  __device__ std::uint16_t encode_nibbles(float* x, std::byte* codes) {
    __syncthreads();
    const float largest =
        block_reduce(d_ < head_dim_ ? HigherOf()(0.0F, fabsf(x[d_])) : 0.0F, HigherOf(), s_.reduce);
    const std::uint16_t bits = f16_bits(largest / 7.5F);
    const float scale = f16_to_f32(bits);
    if (d_ < head_dim_) {
      float code = 7;
      if (scale > 0) {
        const float steps = rintf(x[d_] / scale + 7.5F);
        code = !(steps > 0.0F) ? 0.0F : LowerOf()(steps, 15.0F);
      }
      s_.codes[d_] = static_cast<std::uint8_t>(code);
      x[d_] = scale * (code - 7.5F);
    }
    __syncthreads();
    if (d_ < head_dim_ && d_ % 8 < 4) {
      codes[nibble_place(d_).byte] = static_cast<std::byte>(s_.codes[d_] | s_.codes[d_ + 4] << 4);
    }
    __syncthreads();
    return bits;
  }

  __device__ void clear_tile() {
    for (int i = threadIdx.x; i < kTile * kMaxHeadDim / 4 + kTile; i += kThreads) s_.tile[i] = 0;
    __syncthreads();
  }
  __device__ void put_code(int bits, int d, unsigned code) {
    const CodePlace place = code_place(format_.layout, bits, head_dim_, t_, d);
    const auto byte = static_cast<int>(place.byte);
    atomicOr(&s_.tile[byte / 4], code << (place.shift + 8 * (byte % 4)));
  }
  __device__ void put_f16(int bits, int place, std::uint16_t value) {
    const int byte = static_cast<int>(estimate_code_bytes(bits, head_dim_)) + place;
    reinterpret_cast<std::uint16_t*>(s_.tile)[byte / 2] = value;
  }
  __device__ void store_tile(int bits, int tile) {
    __syncthreads();
    const auto bytes = static_cast<int>(estimate_tile_bytes(bits, head_dim_));
    auto* out = reinterpret_cast<std::uint32_t*>(index_.estimate(page_, head_) +
                                                 std::int64_t{tile} * bytes);
    for (int i = threadIdx.x; i < bytes / 4; i += kThreads) out[i] = s_.tile[i];
  }

  /// Rotated residuals of a tile, given the decoded centres.
  __device__ void load_residuals(int first, int run) {
    load_tile(kv_.k, first);
    rotate_rows(&s_.rows[0][0], kTile, kMaxHeadDim, head_dim_);
    for (int i = threadIdx.x; i < kTile * head_dim_; i += kThreads) {
      const int slot = first + i / head_dim_;
      if (slot < page_size_) {
        s_.rows[i / head_dim_][i % head_dim_] -= s_.centres[slot / run][i % head_dim_];
      }
    }
    __syncthreads();
  }

  __device__ void encode_rotated() {
    const SummaryKind centring = format_.own_centre() ? SummaryKind::kCentroid : format_.summary;
    const int run = centroid_tokens(centring, page_size_);
    const int means = num_centroids(centring);
    for (int i = 0; i < means; ++i) {
      if (d_ < head_dim_) s_.centres[i][d_] = 0;
    }
    for (int first = 0; first < page_size_; first += kTile) {
      load_tile(kv_.k, first);
      rotate_rows(&s_.rows[0][0], kTile, kMaxHeadDim, head_dim_);
      const int end = min(kTile, page_size_ - first);
      for (int r = 0; d_ < head_dim_ && r < end; ++r) {
        s_.centres[(first + r) / run][d_] += s_.rows[r][d_];
      }
    }
    std::byte* codes = index_.centres(page_, head_, page_size_, head_dim_);
    for (int i = 0; i < means; ++i) {
      const int tokens = min(run, page_size_ - i * run);
      if (d_ < head_dim_ && tokens > 0) s_.centres[i][d_] /= static_cast<float>(tokens);
      const std::uint16_t bits = encode_nibbles(s_.centres[i], codes + i * nibble_bytes(head_dim_));
      if (threadIdx.x == 0) s_.params.centre_scale[i] = bits;
    }

    float total = 0;
    float farthest = -1;
    for (int first = 0; first < page_size_; first += kTile) {
      load_residuals(first, run);
      const float* row = s_.rows[t_];
      float sum = 0;
      for (int d = lane_; d < head_dim_; d += kLanes) sum += row[d] * row[d];
      const float energy = fold_lanes(sum);
      if (lane_ == 0) s_.energies[t_] = energy;
      if (format_.key_bits == 2) {
        clear_tile();
        if (first + t_ < page_size_) encode_residual(row, energy);
        store_tile(2, first / kTile);
      }
      __syncthreads();
      for (int r = 0; threadIdx.x == 0 && r < min(kTile, page_size_ - first); ++r) {
        total += s_.energies[r];
        if (s_.energies[r] > farthest) {
          farthest = s_.energies[r];
          s_.deviant = first + r;
        }
      }
    }
    if (threadIdx.x == 0) {
      if (farthest < 0) s_.deviant = 0;
      s_.params.variance = f16_bits(total / static_cast<float>(page_size_ * head_dim_));
    }
    __syncthreads();
    if (format_.summary != SummaryKind::kCentroid) return;
    const int deviant = s_.deviant;
    load_residuals(deviant / kTile * kTile, run);
    const std::uint16_t bits = encode_nibbles(
        s_.rows[deviant % kTile], index_.summary(page_, head_) + nibble_bytes(head_dim_));
    if (threadIdx.x == 0) s_.params.centre_scale[1] = bits;
  }

  /// Half a warp per token; the two tokens of a warp may end on either side of the page's end.
  __device__ void encode_residual(const float* row, float energy) {
    const unsigned lanes = 0xffffU << (threadIdx.x % 32 / kLanes * kLanes);
    const float rms = sqrtf(energy / static_cast<float>(head_dim_));
    float matched = 0;
    float levels = 0;
    for (int d = lane_; d < head_dim_; d += kLanes) {
      const float r = row[d];
      const float level = fabsf(r) > rms ? 1.5F : 0.5F;
      matched += fabsf(r) * level;
      levels += level * level;
      put_code(2, d, r >= 0 ? 2U + (r > rms ? 1U : 0U) : 1U - (r < -rms ? 1U : 0U));
    }
#pragma unroll
    for (int width = kLanes / 2; width > 0; width /= 2) {
      matched += __shfl_down_sync(lanes, matched, width, kLanes);
      levels += __shfl_down_sync(lanes, levels, width, kLanes);
    }
    if (lane_ == 0) put_f16(2, scale_place(format_.layout, 2, t_), f16_bits(matched / levels));
  }

  __device__ void encode_quest() {
    __syncthreads();
    float lo = INFINITY;
    float hi = -INFINITY;
    for (int slot = 0; d_ < head_dim_ && slot < page_size_; ++slot) {
      const float x = element(kv_.k, slot, d_);
      lo = LowerOf()(lo, x);
      hi = HigherOf()(hi, x);
    }
    lo += 0.0F;
    hi += 0.0F;
    std::byte* record = index_.summary(page_, head_);
    if (format_.summary == SummaryKind::kQuestBf16) {
      if (d_ >= head_dim_) return;
      auto* out = reinterpret_cast<std::uint16_t*>(record);
      out[d_] = bf16_floor_bits(lo);
      out[head_dim_ + d_] = static_cast<std::uint16_t>(bf16_floor_bits(-hi) ^ 0x8000U);
      return;
    }
    encode_quest4_vector(lo, record, record + head_dim_);
    encode_quest4_vector(hi, record + head_dim_ / 2, record + head_dim_ + 4);
    if (threadIdx.x < 4) reinterpret_cast<std::uint16_t*>(record + head_dim_ + 8)[threadIdx.x] = 0;
  }

  __device__ void encode_quest4_vector(float x, std::byte* codes, std::byte* numbers) {
    const bool in = d_ < head_dim_;
    const float lo = block_reduce(in ? x : INFINITY, LowerOf(), s_.reduce) + 0.0F;
    const float hi = block_reduce(in ? x : -INFINITY, HigherOf(), s_.reduce) + 0.0F;
    const Quantiser quantiser(15.0F, lo, hi);
    if (in) s_.codes[d_] = static_cast<std::uint8_t>(quantiser.code(x));
    __syncthreads();
    const int half = head_dim_ / 2;
    if (d_ < half) codes[d_] = static_cast<std::byte>(s_.codes[d_] | s_.codes[d_ + half] << 4);
    if (threadIdx.x == 0) {
      reinterpret_cast<std::uint16_t*>(numbers)[0] = quantiser.scale_bits;
      reinterpret_cast<std::uint16_t*>(numbers)[1] = quantiser.zero_bits;
    }
    __syncthreads();
  }

  __device__ void encode_plain() {
    const int bits = format_.key_bits;
    for (int first = 0; first < page_size_; first += kTile) {
      load_tile(kv_.k, first);
      clear_tile();
      const float* row = s_.rows[t_];
      float lo = INFINITY;
      float hi = -INFINITY;
      for (int d = lane_; d < head_dim_; d += kLanes) {
        lo = LowerOf()(lo, row[d]);
        hi = HigherOf()(hi, row[d]);
      }
      lo = reduce_lanes(lo, LowerOf()) + 0.0F;
      hi = reduce_lanes(hi, HigherOf()) + 0.0F;
      if (first + t_ < page_size_) {
        const Quantiser quantiser(static_cast<float>((1 << bits) - 1), lo, hi);
        for (int d = lane_; d < head_dim_; d += kLanes) put_code(bits, d, quantiser.code(row[d]));
        if (lane_ == 0) {
          put_f16(bits, scale_place(format_.layout, bits, t_), quantiser.scale_bits);
          put_f16(bits, zero_place(format_.layout, bits, t_), quantiser.zero_bits);
        }
      }
      store_tile(bits, first / kTile);
    }
  }

  __device__ void encode_value_mean() {
    __syncthreads();
    float* mean = s_.centres[0];
    if (d_ < head_dim_) {
      float sum = 0;
      for (int slot = 0; slot < page_size_; ++slot) sum += element(kv_.v, slot, d_);
      mean[d_] = sum / static_cast<float>(page_size_);
    }
    const std::uint16_t scale_bits = encode_nibbles(mean, index_.value_mean(page_, head_));
    if (threadIdx.x == 0) s_.params.value_scale = scale_bits;
  }

  const PagedKvView& kv_;
  const KeyIndexView& index_;
  const IndexFormat& format_;
  Shared& s_;
  std::int64_t page_;
  std::int64_t head_;
  int head_dim_;
  int page_size_;
  int d_;     ///< channel of this thread, where threads take channels
  int t_;     ///< token of the tile, where 16 threads take a token
  int lane_;  ///< one of those 16
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    seal_pages_kernel(const __grid_constant__ SealPagesParams params) {
  __shared__ Shared shared;
  Page<T>(params, shared).encode();
}

}  // namespace

void seal_pages(const SealPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0) return;
  const dim3 grid(static_cast<unsigned>(params.num_pages),
                  static_cast<unsigned>(params.kv.num_kv_heads));
  for_dtype(params.kv.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    seal_pages_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  });
  check_launch("seal_pages");
}

}  // namespace twilight::cuda::base
