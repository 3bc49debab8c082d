#include "backend/cuda/cublas_linear.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"
#include "core/check.h"

namespace twilight::cuda {
namespace {

constexpr std::int64_t kXBytes = std::int64_t{64} << 20;
constexpr std::int64_t kYBytes = std::int64_t{16} << 20;
constexpr std::int64_t kLibraryBytes = std::int64_t{32} << 20;
constexpr std::int64_t kInvariantRows = 64;

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail(ErrorCode::kInternal, "cublasLt", call, ": ", cublasLtGetStatusName(status));
  }
}

cudaDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return CUDA_R_32F;
    case DType::kF16:
      return CUDA_R_16F;
    case DType::kBf16:
      return CUDA_R_16BF;
  }
  return CUDA_R_32F;
}

std::int64_t type_bytes(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

/// Largest power of two up to 256 that divides an address and the bytes between its columns.
int alignment_of(const void* data, std::int64_t stride_bytes) {
  const auto bits =
      reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(stride_bytes) | 256U;
  return static_cast<int>(bits & (~bits + 1));
}

/// Owns a descriptor of the library.
template <typename T, cublasStatus_t (*kDestroy)(T)>
struct Owned {
  T get = nullptr;
  Owned() = default;
  ~Owned() {
    if (get != nullptr) kDestroy(get);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

void make_layout(Layout& layout, cudaDataType_t type, std::int64_t rows, std::int64_t cols,
                 std::int64_t stride) {
  check(cublasLtMatrixLayoutCreate(&layout.get, type, static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(cols), stride),
        "cublasLtMatrixLayoutCreate");
}

template <typename T>
void set(const Operation& op, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(op.get, attribute, &value, sizeof value),
        "cublasLtMatmulDescSetAttribute");
}

template <typename T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference.get, attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
}

}  // namespace

CublasLinear::~CublasLinear() {
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

void CublasLinear::prepare() {
  if (handle_ != nullptr) return;
  x_ = DeviceBuffer(memory_, kXBytes);
  y_ = DeviceBuffer(memory_, kYBytes);
  workspace_ = DeviceBuffer(memory_, kLibraryBytes);
  check(cublasLtCreate(&handle_), "cublasLtCreate");
}

// Row-major y[m, rows] = x W^T is column-major y^T[rows, m] = (W^T)^T x^T.
bool CublasLinear::multiply(const Product& p, cudaStream_t stream) {
  Operation op;
  check(cublasLtMatmulDescCreate(&op.get, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  const cublasOperation_t transpose = CUBLAS_OP_T;
  set(op, CUBLASLT_MATMUL_DESC_TRANSA, transpose);
  if (p.bias != nullptr) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    set(op, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    set(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  }
  Layout w;
  Layout x;
  Layout y;
  make_layout(w, p.type, p.cols, p.rows, p.cols);
  make_layout(x, p.type, p.cols, p.m, p.x_stride);
  make_layout(y, CUDA_R_32F, p.rows, p.m, p.y_stride);

  const int w_alignment = alignment_of(p.w, p.cols * type_bytes(p.type));
  const int x_alignment = alignment_of(p.x, p.x_stride * type_bytes(p.type));
  const int y_alignment = alignment_of(p.y, p.y_stride * std::int64_t{sizeof(float)});
  const Key key{p.type,
                p.rows,
                p.cols,
                p.m,
                p.x_stride,
                p.y_stride,
                p.bias != nullptr,
                p.accumulate ? 1 : 0,
                w_alignment,
                x_alignment,
                y_alignment};
  auto found = algorithms_.find(key);
  if (found == algorithms_.end()) {
    Preference preference;
    check(cublasLtMatmulPreferenceCreate(&preference.get), "cublasLtMatmulPreferenceCreate");
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_.size());
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        static_cast<std::uint32_t>(w_alignment));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        static_cast<std::uint32_t>(x_alignment));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        static_cast<std::uint32_t>(y_alignment));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        static_cast<std::uint32_t>(y_alignment));
    cublasLtMatmulHeuristicResult_t best{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle_, op.get, w.get, x.get, y.get, y.get, preference.get, 1, &best, &count);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || count == 0) return false;
    check(status, "cublasLtMatmulAlgoGetHeuristic");
    found = algorithms_.emplace(key, best.algo).first;
  }
  const float one = 1.0F;
  const float beta = p.accumulate ? 1.0F : 0.0F;
  check(cublasLtMatmul(handle_, op.get, &one, p.w, w.get, p.x, x.get, &beta, p.y, y.get, p.y, y.get,
                       &found->second, workspace_.data(), workspace_.size(), stream),
        "cublasLtMatmul");
  return true;
}

bool CublasLinear::run(const LinearParams& params, cudaStream_t stream) {
  const WeightView& weight = params.weight;
  const std::int64_t bytes = dtype_bytes(weight.dtype);
  const bool half = weight.dtype != DType::kF32;
  if (half && params.full_precision) return false;
  if (alignment_of(weight.data, weight.cols * bytes) < 16) return false;
  if (weight.cols * bytes * kInvariantRows > kXBytes) return false;
  prepare();
  if (params.row_invariant) return run_invariant(params, stream);
  const std::int64_t block = half ? kXBytes / (weight.cols * bytes) : params.num_rows;
  for (std::int64_t m = 0; m < params.num_rows; m += block) {
    Product p;
    p.type = data_type(weight.dtype);
    p.rows = weight.rows;
    p.cols = weight.cols;
    p.m = std::min(block, params.num_rows - m);
    p.w = weight.data;
    p.x = params.x + m * params.x_stride;
    p.x_stride = p.m == 1 ? std::max(params.x_stride, weight.cols) : params.x_stride;
    p.y = params.y + m * params.y_stride;
    p.y_stride = p.m == 1 ? std::max(params.y_stride, weight.rows) : params.y_stride;
    p.bias = params.bias;
    p.accumulate = params.accumulate;
    if (half) {
      round_rows(params.x + m * params.x_stride, params.x_stride, p.m, p.m, weight.cols,
                 weight.dtype, x_.data(), stream);
      p.x = x_.data();
      p.x_stride = weight.cols;
    }
    if (!multiply(p, stream)) {
      require(m == 0, "cublasLt", "no algorithm for the last rows of a product");
      return false;
    }
  }
  return true;
}

bool CublasLinear::run_rounded(const LinearParams& params, const void* x, cudaStream_t stream) {
  const WeightView& weight = params.weight;
  if (alignment_of(weight.data, weight.cols * 2) < 16) return false;
  prepare();
  Product p;
  p.type = data_type(weight.dtype);
  p.rows = weight.rows;
  p.cols = weight.cols;
  p.m = params.num_rows;
  p.w = weight.data;
  p.x = x;
  p.x_stride = weight.cols;
  p.y = params.y;
  p.y_stride = p.m == 1 ? std::max(params.y_stride, weight.rows) : params.y_stride;
  p.bias = params.bias;
  p.accumulate = params.accumulate;
  return multiply(p, stream);
}

bool CublasLinear::run_invariant(const LinearParams& params, cudaStream_t stream) {
  const WeightView& weight = params.weight;
  const std::int64_t bytes = dtype_bytes(weight.dtype);
  constexpr std::int64_t kBlockRows = kYBytes / (kInvariantRows * std::int64_t{sizeof(float)});
  for (std::int64_t m = 0; m < params.num_rows; m += kInvariantRows) {
    const std::int64_t count = std::min(kInvariantRows, params.num_rows - m);
    round_rows(params.x + m * params.x_stride, params.x_stride, count, kInvariantRows, weight.cols,
               weight.dtype, x_.data(), stream);
    for (std::int64_t row = 0; row < weight.rows; row += kBlockRows) {
      Product p;
      p.type = data_type(weight.dtype);
      p.rows = std::min(kBlockRows, weight.rows - row);
      p.cols = weight.cols;
      p.m = kInvariantRows;
      p.w = weight.data + row * weight.cols * bytes;
      p.x = x_.data();
      p.x_stride = weight.cols;
      p.y = y_.as<float>();
      p.y_stride = p.rows;
      if (!multiply(p, stream)) {
        require(m == 0 && row == 0, "cublasLt", "no algorithm for the last rows of a product");
        return false;
      }
      finish_rows(y_.as<float>(), count, p.rows,
                  params.bias == nullptr ? nullptr : params.bias + row, params.accumulate,
                  params.y + m * params.y_stride + row, params.y_stride, stream);
    }
  }
  return true;
}

}  // namespace twilight::cuda
