#include <algorithm>
#include <cstdint>

#include <cuda.h>

#include "backend/cuda/fast/prefill_args.h"
#include "backend/cuda/fast/stages.cuh"
#include "backend/cuda/fast/warpgroup.cuh"

// prefill_async_kernel, sm_90a: a block takes 128 query tokens of one head, each of two groups of
// four warps 64 of them; a third group has tiles of 128 keys and values copied over the page table,
// two stages of each. A group starts the scores of a tile and the values of the tile before, and
// makes the weights of the former while the latter run; that and the other group's products keep
// the tensor cores busy. A row's result depends on neither the run it comes in nor its place there:
// tiles begin at multiples of 128 keys. Copies by thread instead of by the copy unit bound it at
// 415 of 565 TFLOP/s. Making the two groups take turns at starting products was 2 % slower.
// Tests: tests/cuda/attend_cuda_test.cc. Benchmark: bench/cuda_prefill_bench.cc.
namespace twilight::cuda_fast {
namespace {

constexpr int kGroup = 128;  // threads
constexpr int kThreads = 3 * kGroup;
constexpr int kKeys = 128;
constexpr int kStages = 2;
constexpr int kRowBytes = 128;  // of a tile in shared memory, 64 channels
constexpr int kHalfBytes = kKeys * kRowBytes;

/// Byte of 16-byte piece `piece` (of D / 8) of a row of a tile [D / 64][128][64].
__device__ __forceinline__ std::uint32_t tile_byte(int row, int piece) {
  return static_cast<std::uint32_t>(piece / 8 * kHalfBytes) + piece_at<8>(row, piece % 8);
}

/// Shared memory of a block: queries, then stages of keys and of values, then barriers.
template <int kDim>
struct Layout {
  static constexpr int kTile = kKeys * kDim * 2;
  static constexpr int kKeysAt = kTile;
  static constexpr int kValuesAt = kKeysAt + kStages * kTile;
  static constexpr int kBarriersAt = kValuesAt + kStages * kTile;
  static constexpr int kBytes = kBarriersAt + 4 * kStages * 8 + 1024;  // base rounded up

  std::uint32_t base;
  __device__ std::uint32_t keys(int stage) const { return base + kKeysAt + stage * kTile; }
  __device__ std::uint32_t values(int stage) const { return base + kValuesAt + stage * kTile; }
  /// 0: keys have arrived, 1: values have, 2: keys are done with, 3: values are.
  __device__ std::uint32_t barrier(int what, int stage) const {
    return base + kBarriersAt + 8 * (what * kStages + stage);
  }
};

/// Keys and values as [head, page, slot, channel] for the copy unit; boxes are 64 channels by
/// min(P, 128) slots.
struct PrefillMaps {
  CUtensorMap keys;
  CUtensorMap values;
};

/// One group's copies: all tiles of keys and values in turn. Whole tiles go through the copy unit
/// where pages have 8 tokens or more; the last one is copied by row, with zeros behind the end.
template <int kDim>
__device__ __forceinline__ void copy_tiles(const PrefillArgs& args, const PrefillMaps& maps,
                                           const Layout<kDim>& smem, int kv_head, int num_tiles,
                                           int keys_end) {
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int box = min(1 << args.page_shift, kKeys);  // keys
  const int boxes = args.page_shift >= 3 ? kDim / 64 * (kKeys / box) : 0;
  const auto copy_boxes = [&](std::uint32_t to, const CUtensorMap& map, int first,
                              std::uint32_t barrier) {
    if (thread >= boxes) {
      arrive(barrier);
      return;
    }
    const int half = thread % (kDim / 64);
    const int row = thread / (kDim / 64) * box;
    const int page = args.table[(first + row) >> args.page_shift];
    arrive_expecting(barrier, box * kRowBytes);
    copy_box(to + static_cast<std::uint32_t>(half * kHalfBytes + row * kRowBytes), map, 64 * half,
             (first + row) & ((1 << args.page_shift) - 1), page, kv_head, barrier);
  };
  const auto copy_rows = [&](std::uint32_t to, const std::uint8_t* plane, std::int64_t page_bytes,
                             std::int64_t token_bytes, int first, std::uint32_t barrier) {
    constexpr int kPieces = kDim / 8;
    constexpr int kStep = kGroup / kPieces;  // rows
    const int piece = thread % kPieces;
#pragma unroll 4
    for (int i = 0; i < kKeys / kStep; ++i) {
      const int row = thread / kPieces + i * kStep;
      const int key = min(first + row, keys_end - 1);
      const int slot = key & ((1 << args.page_shift) - 1);
      copy_async(
          to + tile_byte(row, piece),
          plane + args.table[key >> args.page_shift] * page_bytes + slot * token_bytes + 16 * piece,
          first + row < keys_end);
    }
    arrive_after_copies(barrier);
  };
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const int first = tile * kKeys;
    const bool by_box = boxes > 0 && first + kKeys <= keys_end;
    const std::uint32_t parity = (static_cast<std::uint32_t>(tile / kStages) & 1U) ^ 1U;
    wait_phase(smem.barrier(2, stage), parity);
    if (by_box) {
      copy_boxes(smem.keys(stage), maps.keys, first, smem.barrier(0, stage));
    } else {
      copy_rows(smem.keys(stage), args.k + kv_head * args.k_head_bytes, args.k_page_bytes,
                args.k_token_bytes, first, smem.barrier(0, stage));
    }
    wait_phase(smem.barrier(3, stage), parity);
    if (by_box) {
      copy_boxes(smem.values(stage), maps.values, first, smem.barrier(1, stage));
    } else {
      copy_rows(smem.values(stage), args.v + kv_head * args.v_head_bytes, args.v_page_bytes,
                args.v_token_bytes, first, smem.barrier(1, stage));
    }
  }
}

/// Rounds the block's queries into shared memory; two groups' threads.
template <typename E, int kDim>
__device__ __forceinline__ void put_queries(const PrefillArgs& args, const Layout<kDim>& smem,
                                            int first, int head) {
  constexpr int kPieces = kDim / 8;
  const int thread = static_cast<int>(threadIdx.x) - kGroup;
#pragma unroll 1
  for (int i = thread; i < kPrefillRows * kPieces; i += 2 * kGroup) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    std::uint32_t word[4] = {};
    if (first + row < args.num_tokens) {
      const float* q = args.q + (first + row) * args.q_token_stride + head * kDim + 8 * piece;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        word[k] = pack_pair<E>(q[2 * k] * args.scale_log2, q[2 * k + 1] * args.scale_log2);
      }
    }
    asm volatile(
        "st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem.base + tile_byte(row, piece)),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
        : "memory");
  }
  show_to_products();
}

/// Weights of a tile from its scores, in place, under the rows' new maxima. Returns what sums under
/// the old ones are worth.
__device__ __forceinline__ float2 make_weights(float (&s)[64], float (&top)[2], float (&total)[2]) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = top[r];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      largest = fmaxf(largest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
    const float shift = largest == -INFINITY ? 0.0F : largest;
    factor[r] = exp2_fast(top[r] - shift);
    top[r] = largest;
    float added = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int c = 4 * j + 2 * r; c < 4 * j + 2 * r + 2; ++c) {
        s[c] = exp2_fast(s[c] - shift);
        added += s[c];
      }
    }
    total[r] = total[r] * factor[r] + added;
  }
  return {factor[0], factor[1]};
}

/// One group's 64 rows.
template <typename E, int kDim>
__device__ __forceinline__ void attend_rows(const PrefillArgs& args, const Layout<kDim>& smem,
                                            int group, int first, int head, int before,
                                            int num_tiles) {
  constexpr int kSums = kDim / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  const int row = first + 64 * group + 16 * warp + lane / 4;
  const int column = 2 * (lane % 4);
  const std::uint64_t queries =
      tile_descriptor(smem.base + static_cast<std::uint32_t>(group * 64 * kRowBytes), 0);
  float s[64];
  float sums[kSums];
  std::uint32_t weights[32];
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;

  const auto start_scores = [&](int tile) {
    const std::uint64_t keys = tile_descriptor(smem.keys(tile % kStages), 0);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const auto at = static_cast<std::uint64_t>((i / 4 * kHalfBytes + i % 4 * 32) / 16);
      product_tiles<E>(s, queries + at, keys + at, i > 0 ? 1 : 0);
    }
    commit_products();
  };
  const auto start_values = [&](int tile) {
    const std::uint64_t values = tile_descriptor(smem.values(tile % kStages), kHalfBytes);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      product_rows<E>(sums, weights + 4 * i, values + static_cast<std::uint64_t>(i * 2048 / 16), 1);
    }
    commit_products();
  };
  const auto hide_later_keys = [&](int tile) {
    const int key0 = tile * kKeys;
    if (key0 + kKeys - 1 <= before + first + 64 * group) return;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int key = key0 + 8 * (i / 4) + column + i % 2;
      if (key > before + row + 8 * (i % 4 / 2)) s[i] = -INFINITY;
    }
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack_pair<E>(s[2 * i], s[2 * i + 1]);
  };
  const auto parity = [](int tile) { return static_cast<std::uint32_t>(tile / kStages) & 1U; };
  const auto done_with = [&](int what, int tile) {
    if (lane == 0) arrive(smem.barrier(what, tile % kStages));
  };

  wait_phase(smem.barrier(0, 0), 0);
  show_to_products();
  begin_products();
  start_scores(0);
  wait_products<0>();
  pin(s);
  done_with(2, 0);
  hide_later_keys(0);
  make_weights(s, top, total);
  round_weights();
#pragma unroll 1
  for (int tile = 1; tile < num_tiles; ++tile) {
    wait_phase(smem.barrier(0, tile % kStages), parity(tile));
    wait_phase(smem.barrier(1, (tile - 1) % kStages), parity(tile - 1));
    show_to_products();
    begin_products();
    start_scores(tile);
    start_values(tile - 1);
    wait_products<1>();
    pin(s);
    done_with(2, tile);
    hide_later_keys(tile);
    const float2 factor = make_weights(s, top, total);
    wait_products<0>();
    pin(sums);
    done_with(3, tile - 1);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] *= i % 4 < 2 ? factor.x : factor.y;
    round_weights();
  }
  wait_phase(smem.barrier(1, (num_tiles - 1) % kStages), parity(num_tiles - 1));
  show_to_products();
  begin_products();
  start_values(num_tiles - 1);
  wait_products<0>();
  pin(sums);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r] + __shfl_xor_sync(kFullMask, total[r], 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    const int token = row + 8 * r;
    if (token >= args.num_tokens) continue;
    const float inverse = 1.0F / sum;
    float* at = args.out + token * args.out_token_stride + head * kDim + column;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      at[8 * j] = sums[4 * j + 2 * r] * inverse;
      at[8 * j + 1] = sums[4 * j + 2 * r + 1] * inverse;
    }
  }
}

template <typename E, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_async_kernel(const __grid_constant__ PrefillArgs args,
                         const __grid_constant__ PrefillMaps maps) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  const Layout<kDim> smem{(address + 1023U) & ~1023U};
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1;
  const int head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kPrefillRows;
  const int before = args.length[0] - args.num_tokens;
  const int keys_end = before + min(first + kPrefillRows, args.num_tokens);
  const int num_tiles = (keys_end + kKeys - 1) / kKeys;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int what = 0; what < 2; ++what) init_barrier(smem.barrier(what, stage), kGroup);
      for (int what = 2; what < 4; ++what) init_barrier(smem.barrier(what, stage), 8);
    }
  }
  if (group >= 0) put_queries<E, kDim>(args, smem, first, head);
  __syncthreads();
  if (group < 0) {
    give_registers<40>();
    copy_tiles<kDim>(args, maps, smem, head / args.group, num_tiles, keys_end);
  } else {
    take_registers<232>();
    attend_rows<E, kDim>(args, smem, group, first, head, before, num_tiles);
  }
}

/// Describes a plane to the copy unit. Pages and heads have no end there: the page table says which
/// exist.
cudaError_t make_map(CUtensorMap& map, const std::uint8_t* plane, std::int64_t token_bytes,
                     std::int64_t page_bytes, std::int64_t head_bytes, int page_size, bool bf16,
                     int dim) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  constexpr std::uint64_t kMany = std::uint64_t{1} << 31;
  const std::uint64_t sizes[4] = {static_cast<std::uint64_t>(dim),
                                  static_cast<std::uint64_t>(page_size), kMany, 1 << 20};
  const std::uint64_t strides[3] = {static_cast<std::uint64_t>(token_bytes),
                                    static_cast<std::uint64_t>(page_bytes),
                                    static_cast<std::uint64_t>(head_bytes)};
  const std::uint32_t box[4] = {64, static_cast<std::uint32_t>(std::min(page_size, kKeys)), 1, 1};
  const std::uint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = reinterpret_cast<Encode>(entry)(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<std::uint8_t*>(plane), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename E, int kDim>
cudaError_t launch(const PrefillArgs& args, const PrefillMaps& maps, int num_q_heads,
                   cudaStream_t stream) {
  constexpr int kBytes = Layout<kDim>::kBytes;
  const auto kernel = prefill_async_kernel<E, kDim>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((args.num_tokens + kPrefillRows - 1) / kPrefillRows),
                  static_cast<unsigned>(num_q_heads));
  kernel<<<grid, kThreads, kBytes, stream>>>(args, maps);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_prefill_async(const PrefillArgs& args, bool bf16, int dim, int num_q_heads,
                                 cudaStream_t stream) {
  const auto run = dim == 64 ? (bf16 ? launch<Bf16, 64> : launch<Half, 64>)
                             : (bf16 ? launch<Bf16, 128> : launch<Half, 128>);
  PrefillMaps maps;
  cudaError_t error = make_map(maps.keys, args.k, args.k_token_bytes, args.k_page_bytes,
                               args.k_head_bytes, args.page_size, bf16, dim);
  if (error != cudaSuccess) return error;
  error = make_map(maps.values, args.v, args.v_token_bytes, args.v_page_bytes, args.v_head_bytes,
                   args.page_size, bf16, dim);
  if (error != cudaSuccess) return error;
  return run(args, maps, num_q_heads, stream);
}

}  // namespace twilight::cuda_fast
