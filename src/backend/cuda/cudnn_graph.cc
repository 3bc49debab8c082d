#include "backend/cuda/cudnn_graph.h"

#include <algorithm>

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

CudnnGraph::Tensor CudnnGraph::add(cudnnDataType_t type, const Shape& dims, const Shape& strides,
                                   bool by_value) {
  constexpr std::int64_t kAlignment = 16;
  const Tensor id = num_tensors();
  CudnnDescriptor& tensor = tensors_.emplace_back(api_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  tensor.set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type);
  tensor.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, std::ssize(dims), dims.data());
  tensor.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, std::ssize(strides), strides.data());
  tensor.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id);
  tensor.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, kAlignment);
  tensor.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, by_value);
  tensor.finalize();
  return id;
}

CudnnGraph::Tensor CudnnGraph::input(cudnnDataType_t type, const Shape& dims,
                                     const Shape& strides) {
  return add(type, dims, strides, false);
}

CudnnGraph::Tensor CudnnGraph::host_scalar() {
  return add(CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, true);
}

void CudnnGraph::attention(const Attention& t) {
  CudnnDescriptor& op = operations_.emplace_back(api_, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR);
  const auto put = [&](cudnnBackendAttributeName_t name, Tensor i) {
    if (i >= 0) op.set(name, tensors_[static_cast<std::size_t>(i)]);
  };
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, t.q);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, t.k);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, t.v);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, t.out);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, t.scale);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_PAGE_TABLE_KDESC, t.table_k);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_PAGE_TABLE_VDESC, t.table_v);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SEQ_LEN_QDESC, t.lengths_q);
  put(CUDNN_ATTR_OPERATION_SDPA_FWD_SEQ_LEN_KVDESC, t.lengths_kv);
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
