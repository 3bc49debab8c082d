#include "backend/cuda/cudnn_graph.h"

#include <dlfcn.h>

#include "core/check.h"

namespace twilight::cuda {
namespace {

struct Library {
  CudnnApi api;
  bool loaded = false;
  std::string why;

  Library() {
    void* const handle = ::dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      why = cat("cuDNN 9 cannot be loaded: ", ::dlerror());
      return;
    }
    loaded = true;
    const auto find = [&](const char* name, auto& entry) {
      entry = reinterpret_cast<std::remove_reference_t<decltype(entry)>>(::dlsym(handle, name));
      if (entry != nullptr) return;
      loaded = false;
      why = cat("libcudnn.so.9 has no ", name);
    };
    find("cudnnCreate", api.create);
    find("cudnnDestroy", api.destroy);
    find("cudnnSetStream", api.set_stream);
    find("cudnnGetVersion", api.version);
    find("cudnnGetErrorString", api.error_string);
    find("cudnnGetLastErrorString", api.last_error);
    find("cudnnBackendCreateDescriptor", api.create_descriptor);
    find("cudnnBackendDestroyDescriptor", api.destroy_descriptor);
    find("cudnnBackendSetAttribute", api.set_attribute);
    find("cudnnBackendGetAttribute", api.get_attribute);
    find("cudnnBackendFinalize", api.finalize);
    find("cudnnBackendExecute", api.execute);
  }
};

void check(const CudnnApi& api, cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char words[512] = "";
  api.last_error(words, sizeof words);
  fail(ErrorCode::kUnsupported, "cudnn", what, ": ", api.error_string(status), ", ", words);
}

}  // namespace

const CudnnApi* cudnn_api(std::string* why) {
  static const Library library;
  if (library.loaded) return &library.api;
  if (why != nullptr) *why = library.why;
  return nullptr;
}

CudnnDescriptor::CudnnDescriptor(const CudnnApi& api, cudnnBackendDescriptorType_t type)
    : api_(&api) {
  check(api, api.create_descriptor(type, &descriptor_), "create descriptor");
}

CudnnDescriptor::~CudnnDescriptor() {
  if (descriptor_ != nullptr) api_->destroy_descriptor(descriptor_);
}

void CudnnDescriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                          std::int64_t count, const void* values) {
  check(*api_, api_->set_attribute(descriptor_, name, type, count, values), "set attribute");
}

void CudnnDescriptor::set(cudnnBackendAttributeName_t name, const CudnnDescriptor& value) {
  const cudnnBackendDescriptor_t descriptor = value.get();
  set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &descriptor);
}

void CudnnDescriptor::finalize() { check(*api_, api_->finalize(descriptor_), "finalize"); }

CudnnGraph::Shape CudnnGraph::dense(const Shape& dims) {
  Shape strides(dims.size(), 1);
  for (std::size_t i = dims.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * dims[i];
  return strides;
}

CudnnGraph::Tensor CudnnGraph::add(cudnnDataType_t type, const Shape& dims, const Shape& strides,
                                   bool is_virtual, bool by_value) {
  constexpr std::int64_t kAlignment = 16;
  const Tensor id = num_tensors();
  CudnnDescriptor& tensor = tensors_.emplace_back(api_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  tensor.set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type);
  tensor.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, std::ssize(dims), dims.data());
  tensor.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, std::ssize(strides), strides.data());
  tensor.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id);
  tensor.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, kAlignment);
  tensor.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, is_virtual);
  tensor.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, by_value);
  tensor.finalize();
  return id;
}

CudnnGraph::Tensor CudnnGraph::input(cudnnDataType_t type, const Shape& dims,
                                     const Shape& strides) {
  return add(type, dims, strides, false, false);
}

CudnnGraph::Tensor CudnnGraph::host_scalar() {
  return add(CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, false, true);
}

CudnnGraph::Tensor CudnnGraph::virtual_tensor(cudnnDataType_t type, const Shape& dims,
                                              const Shape& strides) {
  return add(type, dims, strides, true, false);
}

void CudnnGraph::matmul(Tensor a, Tensor b, Tensor c, Tensor m, Tensor n, Tensor k, bool pads) {
  CudnnDescriptor& kind = parts_.emplace_back(api_, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  kind.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  if (pads) {
    const double zero = 0;
    kind.set(CUDNN_ATTR_MATMUL_PADDING_VALUE, CUDNN_TYPE_DOUBLE, zero);
  }
  kind.finalize();
  CudnnDescriptor& op = operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  const auto at = [&](Tensor t) -> const CudnnDescriptor& {
    return tensors_[static_cast<std::size_t>(t)];
  };
  op.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, at(a));
  op.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, at(b));
  op.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, at(c));
  op.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, kind);
  if (m >= 0) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, at(m));
  if (n >= 0) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, at(n));
  if (k >= 0) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, at(k));
  op.finalize();
}

void CudnnGraph::pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t math, Tensor x, Tensor b,
                           Tensor t, Tensor y, std::int64_t axis) {
  CudnnDescriptor& kind = parts_.emplace_back(api_, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode);
  kind.set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, math);
  if (axis >= 0) kind.set(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, axis);
  kind.finalize();
  CudnnDescriptor& op =
      operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  const auto at = [&](Tensor i) -> const CudnnDescriptor& {
    return tensors_[static_cast<std::size_t>(i)];
  };
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, at(x));
  if (b >= 0) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, at(b));
  if (t >= 0) op.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, at(t));
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, at(y));
  op.finalize();
}

void CudnnGraph::reduce(cudnnReduceTensorOp_t reduction, Tensor x, Tensor y) {
  CudnnDescriptor& kind = parts_.emplace_back(api_, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  kind.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, reduction);
  kind.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  kind.finalize();
  CudnnDescriptor& op =
      operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, tensors_[static_cast<std::size_t>(x)]);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, tensors_[static_cast<std::size_t>(y)]);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, kind);
  op.finalize();
}

void CudnnGraph::load_pages(Tensor container, Tensor table, Tensor lengths, Tensor y) {
  CudnnDescriptor& op =
      operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_PAGED_CACHE_LOAD_DESCRIPTOR);
  const auto at = [&](Tensor i) -> const CudnnDescriptor& {
    return tensors_[static_cast<std::size_t>(i)];
  };
  op.set(CUDNN_ATTR_OPERATION_PAGED_CACHE_LOAD_CONTAINER_DESC, at(container));
  op.set(CUDNN_ATTR_OPERATION_PAGED_CACHE_LOAD_PAGE_TABLE_DESC, at(table));
  op.set(CUDNN_ATTR_OPERATION_PAGED_CACHE_LOAD_SEQUENCE_DESC, at(lengths));
  op.set(CUDNN_ATTR_OPERATION_PAGED_CACHE_LOAD_YDESC, at(y));
  op.finalize();
}

void CudnnGraph::attention(Tensor q, Tensor k, Tensor v, Tensor o, Tensor scale, Tensor table,
                           Tensor lengths_q, Tensor lengths_kv) {
  CudnnDescriptor& op = operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR);
  const auto put = [&](cudnnBackendAttributeName_t name, Tensor i) {
    if (i >= 0) op.set(name, tensors_[static_cast<std::size_t>(i)]);
  };
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, q);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, k);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, v);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, o);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, scale);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_PAGE_TABLE_KDESC, table);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_PAGE_TABLE_VDESC, table);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SEQ_LEN_QDESC, lengths_q);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SEQ_LEN_KVDESC, lengths_kv);
  op.finalize();
}

CudnnDescriptor CudnnGraph::build_plan(std::int64_t* workspace_bytes) {
  std::vector<cudnnBackendDescriptor_t> operations;
  for (const CudnnDescriptor& op : operations_) operations.push_back(op.get());
  CudnnDescriptor graph(api_, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, handle_);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, std::ssize(operations),
            operations.data());
  graph.finalize();
  std::string why = "no engine proposed";
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    CudnnDescriptor heuristic(api_, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    heuristic.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    heuristic.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, mode);
    if (api_.finalize(heuristic.get()) != CUDNN_STATUS_SUCCESS) continue;
    constexpr std::int64_t kMost = 8;
    std::vector<CudnnDescriptor> configs;
    std::vector<cudnnBackendDescriptor_t> handles;
    for (std::int64_t i = 0; i < kMost; ++i) {
      handles.push_back(configs.emplace_back(api_, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).get());
    }
    std::int64_t count = 0;
    check(api_,
          api_.get_attribute(heuristic.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                             CUDNN_TYPE_BACKEND_DESCRIPTOR, kMost, &count, handles.data()),
          "engine heuristics");
    for (std::int64_t i = 0; i < std::min(count, kMost); ++i) {
      CudnnDescriptor plan(api_, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, handle_);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configs[static_cast<std::size_t>(i)]);
      const cudnnStatus_t status = api_.finalize(plan.get());
      if (status != CUDNN_STATUS_SUCCESS) {
        char words[512] = "";
        api_.last_error(words, sizeof words);
        why = cat(api_.error_string(status), ", ", words);
        continue;
      }
      std::int64_t got = 0;
      check(api_,
            api_.get_attribute(plan.get(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                               CUDNN_TYPE_INT64, 1, &got, workspace_bytes),
            "workspace size");
      return plan;
    }
  }
  fail(ErrorCode::kUnsupported, "cudnn", "no plan: ", why);
}

}  // namespace twilight::cuda
