#include "backend/cuda/fast/prefill.h"

#include <bit>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/prefill_args.h"
#include "backend/cuda/fast/stages.cuh"

// prefill_kernel: a block takes 128 query tokens of one head, a warp 16 of them, and walks the keys
// they see in tiles of 64 under an online softmax. Tiles of keys and values arrive by asynchronous
// copies, one ahead; their rows lie in shared memory with 16-byte pieces exchanged by the row's low
// three bits, so that matrix loads meet no bank twice. Queries stay in registers as operands; a
// tile's weights become operands without a shuffle. Bound by the tensor cores' synchronous
// products. Tests: tests/cuda/attend_cuda_test.cc.
namespace twilight::cuda_fast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = kPrefillRows;
static_assert(kRows == 16 * kWarps);
constexpr int kKeys = 64;

template <int kDim>
__device__ __forceinline__ void load_tile(const PrefillArgs& args, std::uint32_t to,
                                          const std::uint8_t* plane, std::int64_t page_bytes,
                                          std::int64_t token_bytes, int first, int end) {
  constexpr int kPieces = kDim / 8;
#pragma unroll
  for (int i = 0; i < kKeys * kPieces / kThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = at / kPieces;
    const int piece = at % kPieces;
    const int key = min(first + row, end - 1);
    const int page = key / args.page_size;
    const int slot = key - page * args.page_size;
    const std::uint8_t* from =
        plane + args.table[page] * page_bytes + slot * token_bytes + 16 * piece;
    copy_async(to + piece_at<kDim / 8>(row, piece), from, first + row < end);
  }
}

template <typename E, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr int kSteps = kDim / 16;
  constexpr int kTileBytes = kKeys * kDim * 2;
  extern __shared__ __align__(128) std::uint8_t memory[];
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows;
  const int row = first + 16 * warp + g;
  const int before = args.length[0] - args.num_tokens;
  const int keys_end = before + min(first + kRows, args.num_tokens);
  const int warp_end = before + first + 16 * warp + 16;  // of the keys that its last row sees
  const int num_tiles = (keys_end + kKeys - 1) / kKeys;
  const int kv_head = head / args.group;
  const std::uint8_t* const keys = args.k + kv_head * args.k_head_bytes;
  const std::uint8_t* const values = args.v + kv_head * args.v_head_bytes;
  const auto fetch_keys = [&](int tile) {
    if (tile < num_tiles) {
      load_tile<kDim>(args, base + (tile & 1) * kTileBytes, keys, args.k_page_bytes,
                      args.k_token_bytes, tile * kKeys, keys_end);
    }
    commit_copies();
  };
  const auto fetch_values = [&](int tile) {
    if (tile < num_tiles) {
      load_tile<kDim>(args, base + (2 + (tile & 1)) * kTileBytes, values, args.v_page_bytes,
                      args.v_token_bytes, tile * kKeys, keys_end);
    }
    commit_copies();
  };
  fetch_keys(0);
  fetch_values(0);

  std::uint32_t q[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = row + 8 * (r % 2);
      float2 x{0, 0};
      if (token < args.num_tokens) {
        const float* at =
            args.q + token * args.q_token_stride + head * kDim + 16 * i + 2 * t + 8 * (r / 2);
        x = float2{at[0], at[1]};
      }
      q[i][r] = pack_pair<E>(x.x * args.scale_log2, x.y * args.scale_log2);
    }
  }
  float out[2 * kSteps][4] = {};
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};
  const int matrix = lane / 8;
  const int matrix_row = lane % 8;

#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int key0 = tile * kKeys;
    const bool sees = key0 < warp_end;
    wait_copies<1>();
    __syncthreads();
    fetch_keys(tile + 1);
    float s[kKeys / 8][4] = {};
    if (sees) {
      const std::uint32_t tile_at = base + (tile & 1) * kTileBytes;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          std::uint32_t x[4];
          load_matrices(x, tile_at + piece_at<kDim / 8>(16 * pair + 8 * (matrix / 2) + matrix_row,
                                                        2 * i + matrix % 2));
          mma_16<E>(s[2 * pair], q[i][0], q[i][1], q[i][2], q[i][3], x[0], x[1]);
          mma_16<E>(s[2 * pair + 1], q[i][0], q[i][1], q[i][2], q[i][3], x[2], x[3]);
        }
      }
      if (key0 + kKeys > before + first + 16 * warp + 1) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int key = key0 + 8 * n + 2 * t + c % 2;
            if (key > before + row + 8 * (c / 2)) s[n][c] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = top[r];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
        const float shift = largest == -INFINITY ? 0.0F : largest;
        const float factor = exp2_fast(top[r] - shift);
        top[r] = largest;
        float added = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int c = 2 * r; c < 2 * r + 2; ++c) {
            s[n][c] = exp2_fast(s[n][c] - shift);
            added += s[n][c];
          }
        }
        total[r] = total[r] * factor + added;
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
          out[n][2 * r] *= factor;
          out[n][2 * r + 1] *= factor;
        }
      }
    }
    wait_copies<1>();
    __syncthreads();
    fetch_values(tile + 1);
    if (sees) {
      const std::uint32_t tile_at = base + (2 + (tile & 1)) * kTileBytes;
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        const std::uint32_t a0 = pack_pair<E>(s[2 * i][0], s[2 * i][1]);
        const std::uint32_t a1 = pack_pair<E>(s[2 * i][2], s[2 * i][3]);
        const std::uint32_t a2 = pack_pair<E>(s[2 * i + 1][0], s[2 * i + 1][1]);
        const std::uint32_t a3 = pack_pair<E>(s[2 * i + 1][2], s[2 * i + 1][3]);
#pragma unroll
        for (int pair = 0; pair < kSteps; ++pair) {
          std::uint32_t x[4];
          load_transposed(x, tile_at + piece_at<kDim / 8>(16 * i + 8 * (matrix % 2) + matrix_row,
                                                          2 * pair + matrix / 2));
          mma_16<E>(out[2 * pair], a0, a1, a2, a3, x[0], x[1]);
          mma_16<E>(out[2 * pair + 1], a0, a1, a2, a3, x[2], x[3]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r] + __shfl_xor_sync(kFullMask, total[r], 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    const int token = row + 8 * r;
    if (token >= args.num_tokens) continue;
    const float inverse = 1.0F / sum;
    float* at = args.out + token * args.out_token_stride + head * kDim + 2 * t;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      at[8 * n] = out[n][2 * r] * inverse;
      at[8 * n + 1] = out[n][2 * r + 1] * inverse;
    }
  }
}

template <typename E, int kDim>
void launch(const PrefillArgs& args, int num_q_heads, cudaStream_t stream) {
  constexpr int kBytes = 4 * kKeys * kDim * 2;
  TWILIGHT_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(&prefill_kernel<E, kDim>),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(static_cast<unsigned>((args.num_tokens + kRows - 1) / kRows),
                  static_cast<unsigned>(num_q_heads));
  prefill_kernel<E, kDim><<<grid, kThreads, kBytes, stream>>>(args);
  cuda::check_launch("prefill");
}

#ifdef TWILIGHT_CUDA_SM90A
/// Whether the current device runs code for sm_90a: Hopper, and nothing after it.
bool has_async_products() {
  int device = 0;
  int major = 0;
  TWILIGHT_CUDA(cudaGetDevice(&device));
  TWILIGHT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;
}
#endif

bool aligned(const PagePlane& plane) {
  return reinterpret_cast<std::uintptr_t>(plane.data) % 16 == 0 && plane.page_stride % 8 == 0 &&
         plane.head_stride % 8 == 0 && plane.token_stride % 8 == 0;
}

}  // namespace

bool prefill_supports(const AttendPrefillParams& params) {
  const PagedKvView& kv = params.kv;
  return !params.full_precision && kv.dtype != DType::kF32 &&
         (kv.head_dim == 64 || kv.head_dim == 128) && aligned(kv.k) && aligned(kv.v);
}

void prefill(const AttendPrefillParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const PagedKvView& kv = params.kv;
  PrefillArgs args(kv);
  args.q = params.q;
  args.q_token_stride = params.q_token_stride;
  args.num_tokens = params.num_tokens;
  args.group = params.num_q_heads / kv.num_kv_heads;
  args.table = kv.block_table;
  args.length = kv.seq_lens;
  args.page_size = kv.page_size;
  args.scale_log2 = params.scale * kLog2E;
  args.out = params.out;
  args.out_token_stride = params.out_token_stride;
  const bool bf16 = kv.dtype == DType::kBf16;
#ifdef TWILIGHT_CUDA_SM90A
  if (has_async_products() && std::has_single_bit(static_cast<unsigned>(kv.page_size))) {
    args.page_shift = std::countr_zero(static_cast<unsigned>(kv.page_size));
    TWILIGHT_CUDA(launch_prefill_async(args, bf16, kv.head_dim, params.num_q_heads, stream));
    return;
  }
#endif
  const auto run = kv.head_dim == 64 ? (bf16 ? launch<Bf16, 64> : launch<Half, 64>)
                                     : (bf16 ? launch<Bf16, 128> : launch<Half, 128>);
  run(args, params.num_q_heads, stream);
}

}  // namespace twilight::cuda_fast
