#include "bench_data.h"

#include <cuda_bf16.h>

namespace twilight::bench {
namespace {

constexpr float kKeyNoise = 1.0F;
constexpr float kScoreNoise = 1.2F;
constexpr float kHeadNoise = 0.3F;

__device__ std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}
__device__ float uniform(std::uint64_t bits) {
  return (static_cast<float>(bits >> 40) + 0.5F) * 0x1p-24F;
}
/// Two standard normal numbers of a key.
__device__ float2 normals(std::uint64_t key) {
  const std::uint64_t h = mix(key);
  const float u = uniform(h);
  const float a = static_cast<float>(h & 0xffffffU) * 0x1p-24F * 6.2831853F;
  const float r = sqrtf(-2.0F * __logf(u));
  return make_float2(r * __cosf(a), r * __sinf(a));
}
/// Channel d of the direction that (sequence, head) attends to; a unit vector in expectation.
__device__ float direction(std::int64_t unit, int d, int dim) {
  const float2 z = normals(static_cast<std::uint64_t>(unit) * 8192 + static_cast<unsigned>(d / 2) +
                           (1ULL << 60));
  return (d % 2 == 0 ? z.x : z.y) * rsqrtf(static_cast<float>(dim));
}

__global__ void fill_rows(DataShape s, std::int64_t pool_pages, const std::int32_t* table,
                          __nv_bfloat16* k, __nv_bfloat16* v) {
  // A block a (page, sequence, head): 16 rows.
  const int page = static_cast<int>(blockIdx.x);
  const int seq = static_cast<int>(blockIdx.y);
  const int head = static_cast<int>(blockIdx.z);
  const std::int64_t unit = static_cast<std::int64_t>(seq) * s.num_kv_heads + head;
  const std::int64_t physical = table[static_cast<std::int64_t>(seq) * (s.tokens / 16) + page];
  const std::int64_t base = (head * pool_pages + physical) * 16 * s.head_dim;
  const float factor =
      __expf(s.heavy_spread * normals(static_cast<std::uint64_t>(unit) + (1ULL << 61)).x);
  const float share = fminf(s.heavy_tokens * factor / 0.6F / static_cast<float>(s.tokens), 1.0F);
  const float query = kScoreNoise / kKeyNoise;  // |q| / sqrt(D)
  for (int i = static_cast<int>(threadIdx.x); i < 16 * s.head_dim / 2;
       i += static_cast<int>(blockDim.x)) {
    const int slot = 2 * i / s.head_dim;
    const int d = 2 * i % s.head_dim;
    const std::int64_t token = page * 16 + slot;
    const std::uint64_t id = static_cast<std::uint64_t>(unit * s.tokens + token);
    const float run =
        uniform(mix(static_cast<std::uint64_t>(unit * s.tokens + token / 8) + (5ULL << 58)));
    float strength = 0;
    if (run < share && uniform(mix(id + (6ULL << 58))) < 0.6F) {
      strength = (7.5F + 1.5F * normals(id + (7ULL << 58)).x) / query;
    }
    const float2 kn = normals(id * 128 + static_cast<unsigned>(d / 2) + (1ULL << 57));
    const float2 vn = normals(id * 128 + static_cast<unsigned>(d / 2) + (1ULL << 58));
    const float k0 = kKeyNoise * kn.x + strength * direction(unit, d, s.head_dim);
    const float k1 = kKeyNoise * kn.y + strength * direction(unit, d + 1, s.head_dim);
    *reinterpret_cast<__nv_bfloat162*>(k + base + 2 * i) = __floats2bfloat162_rn(k0, k1);
    *reinterpret_cast<__nv_bfloat162*>(v + base + 2 * i) = __floats2bfloat162_rn(vn.x, vn.y);
  }
}

__global__ void fill_queries(DataShape s, float* q, __nv_bfloat16* q16) {
  const int seq = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int group = s.num_q_heads / s.num_kv_heads;
  const std::int64_t unit = static_cast<std::int64_t>(seq) * s.num_kv_heads + head / group;
  const std::int64_t row = static_cast<std::int64_t>(seq) * s.num_q_heads + head;
  const float length = kScoreNoise / kKeyNoise * sqrtf(static_cast<float>(s.head_dim));
  for (int d = static_cast<int>(threadIdx.x); d < s.head_dim; d += static_cast<int>(blockDim.x)) {
    const float2 z = normals(static_cast<std::uint64_t>(row * s.head_dim + d) + (3ULL << 60));
    const float x = length * (direction(unit, d, s.head_dim) +
                              kHeadNoise * z.x * rsqrtf(static_cast<float>(s.head_dim)));
    q[row * s.head_dim + d] = x;
    q16[row * s.head_dim + d] = __float2bfloat16_rn(x);
  }
}

__global__ void __launch_bounds__(512)
    sum_words(const uint4* data, std::size_t count, std::uint32_t* sink) {
  std::uint32_t sum = 0;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(data + i);
    const uint4 b = __ldcs(data + i + stride);
    const uint4 c = __ldcs(data + i + 2 * stride);
    const uint4 d = __ldcs(data + i + 3 * stride);
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    sum += c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) sum += data[i].x;
  if (sum == 0x12345678U) *sink = sum;
}

}  // namespace

void make_data(const DataShape& shape, std::int64_t pool_pages, const std::int32_t* table, void* k,
               void* v, float* q, void* q16) {
  const dim3 grid(static_cast<unsigned>(shape.tokens / 16), static_cast<unsigned>(shape.num_seqs),
                  static_cast<unsigned>(shape.num_kv_heads));
  fill_rows<<<grid, 256>>>(shape, pool_pages, table, static_cast<__nv_bfloat16*>(k),
                           static_cast<__nv_bfloat16*>(v));
  fill_queries<<<
      dim3(static_cast<unsigned>(shape.num_seqs), static_cast<unsigned>(shape.num_q_heads)), 128>>>(
      shape, q, static_cast<__nv_bfloat16*>(q16));
}

void read_memory(const void* data, std::size_t bytes, void* sink, int blocks, cudaStream_t stream) {
  sum_words<<<blocks, 512, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16,
                                        static_cast<std::uint32_t*>(sink));
}

}  // namespace twilight::bench
