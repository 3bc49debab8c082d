#ifndef TWILIGHT_BACKEND_CUDA_CUDNN_GRAPH_H_
#define TWILIGHT_BACKEND_CUDA_CUDNN_GRAPH_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <cudnn.h>

/// cuDNN's graph API, loaded at run time: a build needs its headers alone, and a machine without
/// the library loses nothing but what is computed by it.
namespace twilight::cuda {

/// Entry points of libcudnn.so.9.
struct CudnnApi {
  decltype(&cudnnCreate) create = nullptr;
  decltype(&cudnnDestroy) destroy = nullptr;
  decltype(&cudnnSetStream) set_stream = nullptr;
  decltype(&cudnnGetVersion) version = nullptr;
  decltype(&cudnnGetErrorString) error_string = nullptr;
  decltype(&cudnnGetLastErrorString) last_error = nullptr;
  decltype(&cudnnBackendCreateDescriptor) create_descriptor = nullptr;
  decltype(&cudnnBackendDestroyDescriptor) destroy_descriptor = nullptr;
  decltype(&cudnnBackendSetAttribute) set_attribute = nullptr;
  decltype(&cudnnBackendGetAttribute) get_attribute = nullptr;
  decltype(&cudnnBackendFinalize) finalize = nullptr;
  decltype(&cudnnBackendExecute) execute = nullptr;
};

/// Null where the library cannot be loaded; `why` then says so. The first call loads it.
[[nodiscard]] const CudnnApi* cudnn_api(std::string* why);

/// Owns one backend descriptor. Throws Error(kUnsupported) with the library's words where a call is
/// refused.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const CudnnApi& api, cudnnBackendDescriptorType_t type);
  ~CudnnDescriptor();
  CudnnDescriptor(CudnnDescriptor&& other) noexcept
      : api_(other.api_), descriptor_(std::exchange(other.descriptor_, nullptr)) {}
  CudnnDescriptor& operator=(CudnnDescriptor&&) = delete;
  CudnnDescriptor(const CudnnDescriptor&) = delete;
  CudnnDescriptor& operator=(const CudnnDescriptor&) = delete;

  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count,
           const void* values);
  template <typename T>
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const T& value) {
    set(name, type, 1, &value);
  }
  void set(cudnnBackendAttributeName_t name, const CudnnDescriptor& value);
  void finalize();
  [[nodiscard]] cudnnBackendDescriptor_t get() const { return descriptor_; }

 private:
  const CudnnApi* api_;
  cudnnBackendDescriptor_t descriptor_ = nullptr;
};

/// A graph of operations under construction. Tensors are numbered from 0, the number is also their
/// unique id.
class CudnnGraph {
 public:
  using Tensor = std::int64_t;
  using Shape = std::vector<std::int64_t>;

  CudnnGraph(const CudnnApi& api, cudnnHandle_t handle) : api_(api), handle_(handle) {}

  /// A tensor the caller gives a pointer for.
  [[nodiscard]] Tensor input(cudnnDataType_t type, const Shape& dims, const Shape& strides);
  /// One f32 in host memory.
  [[nodiscard]] Tensor host_scalar();

  /// Tensors of an attention operation; -1 for what is absent. Keys and values have a page table
  /// each, though both may point at one array.
  struct Attention {
    Tensor q = -1;
    Tensor k = -1;
    Tensor v = -1;
    Tensor out = -1;
    Tensor scale = -1;
    Tensor table_k = -1;
    Tensor table_v = -1;
    Tensor lengths_q = -1;
    Tensor lengths_kv = -1;
  };
  void attention(const Attention& tensors);

  /// The first engine the library proposes and can build.
  [[nodiscard]] CudnnDescriptor build_plan(std::int64_t* workspace_bytes);
  [[nodiscard]] std::int64_t num_tensors() const {
    return static_cast<std::int64_t>(tensors_.size());
  }

 private:
  [[nodiscard]] Tensor add(cudnnDataType_t type, const Shape& dims, const Shape& strides,
                           bool by_value);

  const CudnnApi& api_;
  cudnnHandle_t handle_;
  std::vector<CudnnDescriptor> tensors_;
  std::vector<CudnnDescriptor> operations_;
};

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_CUDNN_GRAPH_H_
