#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/elements.cuh"

// append_kv_kernel: one block per (token, KV head), a thread per channel.
// copy_pages_kernel: a thread owns the same bytes of every page and walks the list in order, so a
// page that is written by one entry and read by a later one is copied as written; where the order
// does not matter, blocks share the list.
// Bound by bytes. Tests: tests/cuda/index_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams params) {
  const PagedKvView& kv = params.kv;
  const std::int64_t token = blockIdx.x;
  const std::int64_t head = blockIdx.y;
  const std::int64_t page = params.slots[token] / kv.page_size;
  const std::int64_t slot = params.slots[token] % kv.page_size;
  T* k = const_cast<T*>(row_of<T>(kv, kv.k, page, head, slot));
  T* v = const_cast<T*>(row_of<T>(kv, kv.v, page, head, slot));
  const float* new_k = params.k + token * params.k_token_stride + head * kv.head_dim;
  const float* new_v = params.v + token * params.v_token_stride + head * kv.head_dim;
  for (int d = threadIdx.x; d < kv.head_dim; d += kThreads) {
    store_element(k + d, new_k[d]);
    store_element(v + d, new_v[d]);
  }
}

/// Equal pieces of every page: `rows` pieces of `units` units, the i-th of (head, slot).
struct CopyPlane {
  std::byte* data = nullptr;
  std::int64_t page_stride = 0;   ///< bytes
  std::int64_t outer_stride = 0;  ///< bytes
  std::int64_t inner_stride = 0;  ///< bytes
  std::int32_t outer = 0;         ///< heads
  std::int32_t inner = 0;         ///< rows of a head
  std::int32_t units = 0;         ///< units of a row
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(const __grid_constant__ CopyPlane plane, const std::int32_t* from,
                      const std::int32_t* to, int num_pages) {
  const std::int64_t total = std::int64_t{plane.outer} * plane.inner * plane.units;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row = i / plane.units;
    std::byte* at = plane.data + row / plane.inner * plane.outer_stride +
                    row % plane.inner * plane.inner_stride +
                    i % plane.units * static_cast<std::int64_t>(sizeof(Unit));
    for (int p = blockIdx.y; p < num_pages; p += gridDim.y) {
      // Through volatile: what an earlier entry wrote must be read back.
      const Unit value = *reinterpret_cast<const volatile Unit*>(at + from[p] * plane.page_stride);
      *reinterpret_cast<volatile Unit*>(at + to[p] * plane.page_stride) = value;
    }
  }
}

template <typename Unit>
void copy_plane(CopyPlane plane, std::int64_t row_bytes, const CopyPagesParams& params,
                cudaStream_t stream) {
  if (plane.data == nullptr || row_bytes == 0) return;
  plane.units = static_cast<std::int32_t>(row_bytes / static_cast<std::int64_t>(sizeof(Unit)));
  const std::int64_t total = std::int64_t{plane.outer} * plane.inner * plane.units;
  const dim3 grid(blocks_for(total, kThreads, 4096),
                  params.any_order ? std::min(params.num_pages, 4096) : 1);
  copy_pages_kernel<Unit>
      <<<grid, kThreads, 0, stream>>>(plane, params.from, params.to, params.num_pages);
  check_launch("copy_pages");
}

void copy_rows(const PagePlane& plane, const CopyPagesParams& params, cudaStream_t stream) {
  const PagedKvView& kv = params.kv;
  const std::int64_t element = dtype_bytes(kv.dtype);
  const CopyPlane rows{.data = plane.data,
                       .page_stride = plane.page_stride * element,
                       .outer_stride = plane.head_stride * element,
                       .inner_stride = plane.token_stride * element,
                       .outer = kv.num_kv_heads,
                       .inner = kv.page_size};
  const std::int64_t bytes = kv.head_dim * element;
  if (element == 4 || (aligned_rows(plane, kv.dtype) && bytes % 4 == 0)) {
    copy_plane<std::uint32_t>(rows, bytes, params, stream);
  } else {
    copy_plane<std::uint16_t>(rows, bytes, params, stream);
  }
}

void copy_records(std::byte* data, std::int64_t page_stride, std::int64_t head_stride,
                  std::int64_t record_bytes, const CopyPagesParams& params, cudaStream_t stream) {
  const CopyPlane records{.data = data,
                          .page_stride = page_stride,
                          .outer_stride = head_stride,
                          .inner_stride = 0,
                          .outer = params.kv.num_kv_heads,
                          .inner = 1};
  if (record_bytes % 4 == 0) {
    copy_plane<std::uint32_t>(records, record_bytes, params, stream);
  } else {
    copy_plane<std::uint8_t>(records, record_bytes, params, stream);
  }
}

}  // namespace

void append_kv(const AppendKvParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(params.kv.num_kv_heads));
  for_dtype(params.kv.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    append_kv_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  });
  check_launch("append_kv");
}

void copy_pages(const CopyPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0) return;
  const KeyIndexView& index = params.index;
  const int head_dim = params.kv.head_dim;
  copy_rows(params.kv.k, params, stream);
  copy_rows(params.kv.v, params, stream);
  if (index.format.summary != SummaryKind::kNone) {
    copy_records(index.summaries, index.summary_page_stride, index.summary_head_stride,
                 summary_record_bytes(index.format.summary, head_dim), params, stream);
  }
  if (index.format.key_bits != 0) {
    copy_records(index.estimates, index.estimate_page_stride, index.estimate_head_stride,
                 estimate_record_bytes(index.format, params.kv.page_size, head_dim), params,
                 stream);
  }
  if (index.format.value_bits != 0) {
    copy_records(index.value_means, index.value_page_stride, index.value_head_stride,
                 nibble_bytes(head_dim), params, stream);
  }
  if (index.format.has_params()) {
    copy_records(index.params, index.params_page_stride, index.params_head_stride,
                 sizeof(PageParams), params, stream);
  }
}

}  // namespace twilight::cuda::base
