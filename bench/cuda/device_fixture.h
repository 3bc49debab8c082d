#ifndef TWILIGHT_BENCH_CUDA_DEVICE_FIXTURE_H_
#define TWILIGHT_BENCH_CUDA_DEVICE_FIXTURE_H_

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "support/paged_fixture.h"
#include "support/step_buffers.h"

/// Device copies of a test fixture and of a step's buffers.
namespace twilight::bench {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

/// Everything a step of a fixture needs in device memory; frees it at the end.
class DeviceFixture {
 public:
  explicit DeviceFixture(const test::PagedFixture& fixture) {
    kv = fixture.kv();
    index = fixture.index();
    kv.k.data = upload(fixture.k_pool(), kv.k.data);
    kv.v.data = upload(fixture.v_pool(), kv.v.data);
    index.summaries = upload(fixture.summary_pool(), index.summaries);
    index.estimates = upload(fixture.estimate_pool(), index.estimates);
    index.value_means = upload(fixture.value_mean_pool(), index.value_means);
    index.params = upload(fixture.params_pool(), index.params);
    kv.block_table =
        copy(kv.block_table, static_cast<std::size_t>(kv.num_seqs * kv.block_table_stride));
    host_lens.assign(kv.seq_lens, kv.seq_lens + kv.num_seqs);
    kv.seq_lens = copy(kv.seq_lens, static_cast<std::size_t>(kv.num_seqs));
    kv.host_seq_lens = host_lens.data();
    q = fixture.q();
    q.data = copy(q.data,
                  static_cast<std::size_t>((kv.num_seqs - 1) * q.seq_stride +
                                           static_cast<std::int64_t>(q.num_heads) * kv.head_dim));
  }
  DeviceFixture(const DeviceFixture&) = delete;
  DeviceFixture& operator=(const DeviceFixture&) = delete;
  ~DeviceFixture() {
    for (void* p : owned_) cudaFree(p);
  }

  template <typename T>
  T* copy(const T* host, std::size_t count) {
    void* p = nullptr;
    check_cuda(cudaMalloc(&p, count * sizeof(T) + 256), "cudaMalloc");
    owned_.push_back(p);
    if (count != 0) check_cuda(cudaMemcpy(p, host, count * sizeof(T), cudaMemcpyDefault), "copy");
    return static_cast<T*>(p);
  }
  template <typename T>
  T* copy(const std::vector<T>& host) {
    return copy(host.data(), host.size());
  }

  PagedKvView kv;
  KeyIndexView index;
  QueryView q;
  std::vector<std::int32_t> host_lens;

 private:
  std::byte* upload(std::span<const std::byte> pool, const std::byte* base) {
    if (pool.empty() || base == nullptr) return nullptr;
    return copy(pool.data(), pool.size()) + (base - pool.data());
  }

  std::vector<void*> owned_;
};

}  // namespace twilight::bench

#endif  // TWILIGHT_BENCH_CUDA_DEVICE_FIXTURE_H_
