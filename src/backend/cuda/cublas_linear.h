#ifndef TWILIGHT_BACKEND_CUDA_CUBLAS_LINEAR_H_
#define TWILIGHT_BACKEND_CUDA_CUBLAS_LINEAR_H_

#include <cstdint>
#include <map>
#include <tuple>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "backend/cuda/cuda_memory.h"
#include "ops/params.h"

namespace twilight::cuda {

/// Matrix products through cuBLASLt: x is rounded to the weights' 16-bit dtype (f16 saturates) and
/// products add up in f32; f32 weights stay f32. Scratch (112 MiB) is taken at the first product
/// and an algorithm is chosen at the first product of a shape: warm up before capturing.
///
/// Row-invariant products always run 64 rows wide, padded with zeros, so that one algorithm serves
/// every batch and a row gets the same bits in each.
class CublasLinear {
 public:
  explicit CublasLinear(CudaMemory& memory) : memory_(memory) {}
  ~CublasLinear();
  CublasLinear(const CublasLinear&) = delete;
  CublasLinear& operator=(const CublasLinear&) = delete;

  /// False, with nothing done, where the library has no way: full precision of 16-bit weights,
  /// weights off their alignment.
  [[nodiscard]] bool run(const LinearParams& params, cudaStream_t stream);
  /// The same with x already rounded to the weights' 16-bit dtype, packed; not row-invariant.
  [[nodiscard]] bool run_rounded(const LinearParams& params, const void* x, cudaStream_t stream);

 private:
  struct Product {
    cudaDataType_t type = CUDA_R_16BF;
    std::int64_t rows = 0;  ///< of W, in this block
    std::int64_t cols = 0;
    std::int64_t m = 0;
    const void* w = nullptr;
    const void* x = nullptr;
    std::int64_t x_stride = 0;
    float* y = nullptr;
    std::int64_t y_stride = 0;
    const float* bias = nullptr;
    bool accumulate = false;
  };
  using Key = std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         int, int, int, int, int>;

  void prepare();
  [[nodiscard]] bool multiply(const Product& product, cudaStream_t stream);
  [[nodiscard]] bool run_invariant(const LinearParams& params, cudaStream_t stream);

  CudaMemory& memory_;
  cublasLtHandle_t handle_ = nullptr;
  DeviceBuffer x_;          ///< x in the weights' dtype
  DeviceBuffer y_;          ///< a row-invariant block's product
  DeviceBuffer workspace_;  ///< the library's
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

/// x [m, cols] f32 to `out` [padded_m, cols] in a weight dtype; rows from m on are zero.
void round_rows(const float* x, std::int64_t x_stride, std::int64_t m, std::int64_t padded_m,
                std::int64_t cols, DType dtype, void* out, cudaStream_t stream);
/// y [m, rows] = product [m, rows] + bias, plus y itself where `accumulate`. `product` is dense.
void finish_rows(const float* product, std::int64_t m, std::int64_t rows, const float* bias,
                 bool accumulate, float* y, std::int64_t y_stride, cudaStream_t stream);

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_CUBLAS_LINEAR_H_
