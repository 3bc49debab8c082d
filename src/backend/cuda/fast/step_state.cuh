#ifndef TWILIGHT_BACKEND_CUDA_FAST_STEP_STATE_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_STEP_STATE_CUH_

#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/step_args.h"
#include "quant/rotation.h"

/// What the phases of the fused step share: compile-time shapes, a block's shared memory, its part
/// of the problem.
///
/// A problem is one (sequence, KV head). kCluster blocks serve it: page tiles go round robin over
/// them, candidate pages in contiguous runs. Lanes are numbered 4 g + t, g in 0..7, t in 0..3.
namespace twilight::cuda_fast {

inline constexpr int kPage = 16;
inline constexpr int kBins = 1024;
/// Kept tokens whose exact scores are in shared memory at a time.
inline constexpr int kChunk = 1024;
/// Entries of the boundary list of pruning.
inline constexpr int kBoundaryList = 256;
/// Page scores are log2 shares in steps of 1 / kLogSteps, so are masses and centre products.
inline constexpr float kLogSteps = 256.0F;

enum class Scheme {
  kAdaptive,  ///< kCentroid summaries, 2-bit estimates, group mean
  kHalves,    ///< the same with kHalfCentroid summaries
  kQuarters,  ///< the same with kSubCentroid summaries
  kPaper,     ///< kQuestBf16 summaries, 4-bit estimates, per head
};

template <int kDim_, int kHeads_, int kThreads_, int kCluster_, Scheme kScheme_, typename Element_>
struct Config {
  static constexpr int kDim = kDim_;
  static constexpr int kHeads = kHeads_;  ///< query heads of a group, padded: 1, 2, 4, 8
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads_ / 32;
  static constexpr int kCluster = kCluster_;
  static constexpr Scheme kScheme = kScheme_;
  static constexpr bool kPaper = kScheme_ == Scheme::kPaper;
  static constexpr int kMeans =  ///< of a page
      kScheme_ == Scheme::kQuarters ? 4
      : kScheme_ == Scheme::kHalves ? 2
                                    : 1;
  /// Centre products of candidates come from their summaries again, not from the score phase.
  static constexpr bool kCentresAgain = kMeans == 4;
  static constexpr int kKeptCentres = kept_centres(kMeans);
  using Element = Element_;
  /// Heads a lane holds after an int8 product: head t, and head t + 4 of eight.
  static constexpr int kLaneHeads = kHeads_ == 8 ? 2 : 1;
  static constexpr int kSteps = kDim_ / 32;  ///< int8 mma steps over D
  static constexpr int kQueryRows = kHeads_ == 8 ? 16 : 8;
  static constexpr int kRowPad = 8;
  /// Warps share tokens in the value phase by pairs, each one half of D = 128.
  static constexpr int kHalves = kDim_ / 64;
  static constexpr int kValueGroups = kWarps / kHalves;
};

struct Problem {
  int seq;
  int kv_head;
  int n;  ///< N
  int sealed_candidates;
};

/// Small per-block state.
template <class C>
struct Fixed {
  Problem problem;
  /// Row 2 h holds the high parts of head h's query in steps of q_step, row 2 h + 1 the low parts.
  /// 16 bytes more a row: eight rows of one piece meet no bank twice.
  alignas(16) std::int8_t q_codes[C::kQueryRows][C::kDim + 16];
  /// Scaled query as attention takes it: rows of high parts, then of low parts.
  alignas(16) std::uint16_t q_rows[C::kQueryRows][C::kDim + C::kRowPad];
  /// Its negative and positive channels in bf16, for Quest's min and max vectors.
  alignas(16) std::uint16_t q_signed[C::kPaper ? 2 : 1][C::kPaper ? C::kQueryRows : 1]
                                    [C::kPaper ? C::kDim + C::kRowPad : 8];
  float q_step[8];
  float q_sum[8];     ///< q_step times the sum of the integer query
  float q_spread[8];  ///< log2 gain of a page's mass per unit of its variance
  float norm[8];      ///< log2 shift of the weights
  float head_sum[8];  ///< sum of the weights over all candidates
  float head_max[8];  ///< largest log2 estimate
  float top[8];       ///< log2 shift of the exact weights
  float rescale[8];   ///< of what earlier chunks summed
  float2 reduce[C::kWarps][8];
  float remote[C::kCluster][8][2];
  std::uint32_t warp_counts[32];
  std::uint32_t group_counts[C::kWarps * 8 + 64];
  float p[8];  ///< of each row that is pruned
  std::uint32_t segments[C::kCluster][8];
  std::uint32_t kept_totals[8];
  std::uint32_t list_count[8];
  std::uint32_t mass_total[8];
  std::uint32_t above_count[8];
  std::uint32_t count[8];
  std::uint32_t row_above[8];
  std::uint32_t row_target[8];
  int row_bin[8];
  std::uint32_t threshold[8];
  std::uint32_t own_count[8];
  std::uint32_t found[4];
  std::uint32_t select_total;
  std::uint32_t select_forced;
  float estimate_max[C::kCluster][8];
  float dropped_mass[C::kCluster][8];
  const std::uint8_t* planes[kNumPlanes];  ///< of this KV head
  const std::int32_t* table;               ///< of this sequence
};

/// One block's view of its problem. What it knows of the problem is in shared memory, so that it
/// holds no registers across phases.
template <class C>
struct Step {
  const StepArgs& args;
  std::uint8_t* base;
  Fixed<C>& s;

  [[nodiscard]] __device__ static int tid() { return static_cast<int>(threadIdx.x); }
  [[nodiscard]] __device__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  [[nodiscard]] __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  [[nodiscard]] __device__ static int g() { return static_cast<int>(threadIdx.x % 32 / 4); }
  [[nodiscard]] __device__ static int t() { return static_cast<int>(threadIdx.x % 4); }
  [[nodiscard]] __device__ static int rank() { return cluster_rank<C::kCluster>(); }
  [[nodiscard]] __device__ int seq() const { return s.problem.seq; }
  [[nodiscard]] __device__ int kv_head() const { return s.problem.kv_head; }
  [[nodiscard]] __device__ int n() const { return s.problem.n; }
  [[nodiscard]] __device__ int sealed() const { return s.problem.n / kPage; }
  [[nodiscard]] __device__ const std::int32_t* table() const { return s.table; }
  // After selection: candidates with the open page, and this block's run of them. The last block
  // owns the open page.
  [[nodiscard]] __device__ int sealed_candidates() const { return s.problem.sealed_candidates; }
  [[nodiscard]] __device__ int open() const { return n() % kPage != 0 ? 1 : 0; }
  [[nodiscard]] __device__ int candidates() const { return sealed_candidates() + open(); }
  [[nodiscard]] __device__ int share() const {
    return (sealed_candidates() + C::kCluster - 1) / C::kCluster;
  }
  [[nodiscard]] __device__ int begin() const { return min(rank() * share(), sealed_candidates()); }
  [[nodiscard]] __device__ int owned_sealed() const {
    return min(share(), sealed_candidates() - begin());
  }
  [[nodiscard]] __device__ int owned() const {
    return owned_sealed() + (rank() == C::kCluster - 1 ? open() : 0);
  }

  // Region A while selecting.
  __device__ std::uint32_t* scores() const { return reinterpret_cast<std::uint32_t*>(base); }
  /// With kCentresAgain a page and head has 16 bits: its mass alone.
  __device__ std::uint16_t* mass_scores() const { return reinterpret_cast<std::uint16_t*>(base); }
  /// Second centre products, [owned pages, heads].
  __device__ std::uint16_t* second_centres() const {
    return reinterpret_cast<std::uint16_t*>(base + args.smem.second_centres);
  }
  __device__ float2* tile_mass() const {
    return reinterpret_cast<float2*>(base + args.smem.tile_mass);
  }
  __device__ float* tile_centre() const {
    return reinterpret_cast<float*>(base + args.smem.tile_centre);
  }
  using Key = std::conditional_t<C::kPaper, std::uint32_t, std::uint16_t>;
  __device__ Key* keys() const { return reinterpret_cast<Key*>(base + args.smem.keys); }
  // Region A while pruning.
  /// [owned, g, heads]: bf16 weights of tokens g (low half) and g + 8.
  __device__ std::uint32_t* weights() const { return reinterpret_cast<std::uint32_t*>(base); }
  __device__ std::uint32_t* histogram() const {
    return reinterpret_cast<std::uint32_t*>(base + args.smem.histogram);
  }
  __device__ std::uint32_t* boundary() const {
    return reinterpret_cast<std::uint32_t*>(base + args.smem.boundary);
  }
  __device__ float* page_sums() const {
    return reinterpret_cast<float*>(base + args.smem.page_sums);
  }
  // Region A while attending. A row is physical page * 16 + slot.
  __device__ std::uint32_t* rows() const { return reinterpret_cast<std::uint32_t*>(base); }
  __device__ float* chunk_scores() const {
    return reinterpret_cast<float*>(base + args.smem.chunk_scores);
  }
  __device__ float* partials() const { return reinterpret_cast<float*>(base + args.smem.partials); }
  __device__ std::uint32_t* select_histogram() const {
    return reinterpret_cast<std::uint32_t*>(base + args.smem.select_histogram);
  }
  __device__ std::uint32_t* select_mass() const {
    return reinterpret_cast<std::uint32_t*>(base + args.smem.select_mass);
  }
  __device__ std::uint8_t* ring() const { return base + args.smem.ring; }
  // Region B.
  __device__ std::int32_t* candidate_pages() const {  // all blocks' candidates
    return reinterpret_cast<std::int32_t*>(base + args.smem.candidates);
  }
  __device__ std::int32_t* physical() const { return candidate_pages() + args.smem.max_candidates; }
  /// [owned, kKeptCentres, heads]: centre products; once pruned [owned, heads]: the dropped
  /// weights.
  __device__ float* page_values() const {
    return reinterpret_cast<float*>(physical() + args.smem.owned);
  }
  __device__ std::uint16_t* masks() const {
    return reinterpret_cast<std::uint16_t*>(page_values() +
                                            args.smem.owned * C::kKeptCentres * C::kHeads);
  }

  [[nodiscard]] __device__ int problem() const { return seq() * args.num_kv_heads + kv_head(); }
  /// A plane's records of this KV head.
  [[nodiscard]] __device__ const std::uint8_t* plane(PlaneId id) const {
    // Eight heads leave few registers: there the compiler spills what it loads from shared memory,
    // and less of what it multiplies anew.
    if constexpr (C::kLaneHeads > 1) {
      return args.planes[id].data + kv_head() * args.planes[id].head_stride;
    }
    return s.planes[id];
  }
  [[nodiscard]] __device__ const std::uint8_t* record(PlaneId id, int page) const {
    return plane(id) + static_cast<std::uint64_t>(static_cast<std::uint32_t>(page)) *
                           args.planes[id].page_stride;
  }
  __device__ void stamp(int i) const {
    if (args.stamps != nullptr && tid() == 0 && rank() == 0) {
      args.stamps[static_cast<std::int64_t>(blockIdx.x) / C::kCluster * kStamps + i] =
          nanoseconds();
    }
  }
};

/// Address of a row, physical page * 16 + slot.
template <class C>
__device__ __forceinline__ const std::uint8_t* row_address(const Step<C>& step, PlaneId plane,
                                                           std::int32_t token_stride,
                                                           std::uint32_t row) {
  return step.record(plane, static_cast<int>(row / kPage)) +
         std::uint64_t{row % kPage} * static_cast<std::uint32_t>(token_stride);
}

/// Bits of rotation_sign for channels 32 i .. 32 i + 31, set where it is -1.
__host__ __device__ constexpr std::uint32_t rotation_bits(int i) {
  std::uint32_t bits = 0;
  for (int d = 0; d < 32; ++d) {
    if (rotation_sign(32 * i + d) < 0) bits |= std::uint32_t{1} << d;
  }
  return bits;
}

/// Loads that depend on no other: issued first, so that their latencies overlap.
template <class C>
struct FirstLoads {
  static constexpr int kPer = C::kDim / 32;
  static constexpr int kSlots = C::kQueryRows / 2;
  static_assert(kSlots <= C::kWarps);
  float x[kPer];  ///< of head `warp`
  int pages[2];   ///< table entries of this warp's first tile
  int next[2];    ///< and of its second

  __device__ void load(const StepArgs& args, int seq, int kv_head) {
    const int warp = Step<C>::warp();
    const int lane = Step<C>::lane();
#pragma unroll
    for (int j = 0; j < kPer; ++j) x[j] = 0;
    if (warp < args.group) {
      const float* q =
          args.q + seq * args.q_seq_stride + (kv_head * args.group + warp) * C::kDim + lane * kPer;
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] = q[j];
    }
    const std::int32_t* table = args.block_table + seq * args.table_stride;
    const int most = static_cast<int>(args.table_stride) - 1;
    const int tile = warp * C::kCluster + Step<C>::rank();
    const int stride = C::kWarps * C::kCluster;
    if constexpr (C::kCentresAgain) {  // entry lane % 16 of the tile
      pages[0] = table[min(16 * tile + lane % 16, most)];
      return;
    }
    constexpr int kTile = C::kPaper ? 8 : 16;
#pragma unroll
    for (int k = 0; k < (C::kPaper ? 1 : 2); ++k) {
      pages[k] = table[min(kTile * tile + Step<C>::g() + 8 * k, most)];
      next[k] = table[min(kTile * (tile + stride) + Step<C>::g() + 8 * k, most)];
    }
  }
};

/// Scales, rotates and quantises the group's queries. Ends without a barrier.
template <class C>
__device__ void prepare_query(const Step<C>& step, const FirstLoads<C>& first) {
  constexpr int kPer = C::kDim / 32;
  constexpr int kSlots = C::kQueryRows / 2;
  Fixed<C>& s = step.s;
  const int lane = step.lane();
  const int h = step.warp();
  if (h < kSlots) {
    float x[kPer];
#pragma unroll
    for (int j = 0; j < kPer; ++j) x[j] = first.x[j] * (step.args.scale * kLog2E);
    using Element = typename C::Element;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const Element hi = to_element<Element>(x[j]);
      const Element lo = to_element<Element>(x[j] - from_element(hi));
      s.q_rows[h][lane * kPer + j] = *reinterpret_cast<const std::uint16_t*>(&hi);
      s.q_rows[kSlots + h][lane * kPer + j] = *reinterpret_cast<const std::uint16_t*>(&lo);
    }
    if constexpr (C::kPaper) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const Bf16 hi = to_element<Bf16>(x[j]);
        const Bf16 lo = to_element<Bf16>(x[j] - from_element(hi));
        const int part = x[j] > 0 ? 1 : 0;
        s.q_signed[part][h][lane * kPer + j] = *reinterpret_cast<const std::uint16_t*>(&hi);
        s.q_signed[part][kSlots + h][lane * kPer + j] =
            *reinterpret_cast<const std::uint16_t*>(&lo);
        s.q_signed[1 - part][h][lane * kPer + j] = 0;
        s.q_signed[1 - part][kSlots + h][lane * kPer + j] = 0;
      }
    } else {
      constexpr std::uint32_t kSigns[4] = {rotation_bits(0), rotation_bits(1), rotation_bits(2),
                                           rotation_bits(3)};
      std::uint32_t signs = kSigns[0];
#pragma unroll
      for (int i = 1; i < kPer; ++i) signs = lane * kPer / 32 == i ? kSigns[i] : signs;
      signs >>= lane * kPer % 32;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        x[j] = __uint_as_float(__float_as_uint(x[j]) ^ ((signs >> j & 1U) << 31));
      }
#pragma unroll
      for (int dist = 1; dist < kPer; dist *= 2) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if ((j & dist) == 0) {
            const float a = x[j];
            const float b = x[j + dist];
            x[j] = a + b;
            x[j + dist] = a - b;
          }
        }
      }
#pragma unroll
      for (int dist = 1; dist < 32; dist *= 2) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const float other = __shfl_xor_sync(kFullMask, x[j], dist);
          x[j] = (lane & dist) == 0 ? x[j] + other : other - x[j];
        }
      }
      constexpr float kNorm = C::kDim == 128 ? 0.08838834764831845F : 0.125F;
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] *= kNorm;
    }
    float largest = 0;
    float sum = 0;
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      largest = fmaxf(largest, fabsf(x[j]));
      sum += fabsf(x[j]);
      squares += x[j] * x[j];
    }
    largest = warp_max(largest);
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    // 127 * 128 steps fit two signed bytes; twelve times the sum of the integers stays below 2^22,
    // so that products with 2-bit codes, times 4, fit the mantissa of a float.
    float unit = fmaxf(largest * (1.0F / 16256.0F), sum * (12.05F / 4194304.0F));
    if (!(unit > 0)) unit = 1;
    const float inverse = 1.0F / unit;
    int total = 0;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int qi = min(max(__float2int_rn(x[j] * inverse), -16256), 16256);
      const int lo = ((qi + 64) & 127) - 64;
      s.q_codes[2 * h][lane * kPer + j] = static_cast<std::int8_t>((qi - lo) >> 7);
      s.q_codes[2 * h + 1][lane * kPer + j] = static_cast<std::int8_t>(lo);
      total += qi;
    }
    total = __reduce_add_sync(kFullMask, total);
    if (lane == 0) {
      s.q_step[h] = unit;
      s.q_sum[h] = unit * static_cast<float>(total);
      s.q_spread[h] = 0.5F * kLn2 * squares;
    }
  }
}

/// A lane's part of the integer query: B fragments of all steps.
template <class C>
struct QueryCodes {
  std::uint32_t b[C::kLaneHeads][2 * C::kSteps];

  __device__ void load(const Step<C>& step) {
#pragma unroll
    for (int i = 0; i < C::kLaneHeads; ++i) {
      const auto* row = reinterpret_cast<const uint4*>(
          &step.s.q_codes[8 * i + step.g()][step.t() * (C::kDim / 4)]);
#pragma unroll
      for (int j = 0; j < 2 * C::kSteps; j += 4) {
        const uint4 words = row[j / 4];
        b[i][j] = words.x, b[i][j + 1] = words.y, b[i][j + 2] = words.z, b[i][j + 3] = words.w;
      }
    }
  }
};

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_STEP_STATE_CUH_
