#include "backend/cpu/dnnl_gemm.h"

#include <omp.h>

#include <array>
#include <dnnl.hpp>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/buffer.h"
#include "core/check.h"

namespace twilight::cpu {
namespace {

// Shapes one worker meets: a model has about ten, and each height of a last tile adds as many. Past
// this the cache starts afresh; oneDNN's own cache still holds the compiled kernels.
constexpr std::size_t kMaxCachedShapes = 512;

struct ShapeHash {
  std::size_t operator()(const GemmShape& s) const {
    std::uint64_t h = static_cast<std::uint32_t>(s.m);
    h = h * 0x9e3779b97f4a7c15ULL + static_cast<std::uint32_t>(s.n);
    h = h * 0x9e3779b97f4a7c15ULL + static_cast<std::uint32_t>(s.k);
    h = h * 0x9e3779b97f4a7c15ULL +
        static_cast<std::uint64_t>(s.bf16 * 4 + s.b_transposed * 2 + s.accumulate);
    return h ^ (h >> 29);
  }
};

// oneDNN asks OpenMP how many threads the calling thread may start, both when a primitive is made
// and when it runs. One, while we are inside it; the caller's setting is restored.
class SingleThreadScope {
 public:
  SingleThreadScope() : previous_(omp_get_max_threads()) {
    if (previous_ != 1) omp_set_num_threads(1);
  }
  ~SingleThreadScope() {
    if (previous_ != 1) omp_set_num_threads(previous_);
  }
  SingleThreadScope(const SingleThreadScope&) = delete;
  SingleThreadScope& operator=(const SingleThreadScope&) = delete;

 private:
  int previous_;
};

dnnl::matmul::primitive_desc make_primitive_desc(const GemmShape& s, const dnnl::engine& engine) {
  using dnnl::memory;
  const auto type = s.bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  const memory::desc a({s.m, s.k}, type, memory::format_tag::ab);
  const memory::desc b({s.k, s.n}, type,
                       s.b_transposed ? memory::format_tag::ba : memory::format_tag::ab);
  const memory::desc c({s.m, s.n}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (s.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0F);
    attr.set_post_ops(ops);
  }
#if DNNL_VERSION_MAJOR >= 3
  return {engine, a, b, c, attr};
#else
  return {dnnl::matmul::desc(a, b, c), attr, engine};
#endif
}

struct Entry {
  dnnl::matmul::primitive_desc desc;
  dnnl::matmul primitive;
  dnnl::memory a, b, c, scratch;
  std::size_t scratch_bytes = 0;
};

}  // namespace

struct DnnlGemm::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::unordered_map<GemmShape, Entry, ShapeHash> entries;
  Buffer scratch;

  Entry& entry(const GemmShape& shape) {
    const auto found = entries.find(shape);
    if (found != entries.end()) return found->second;
    if (entries.size() >= kMaxCachedShapes) entries.clear();
    Entry made;
    made.desc = make_primitive_desc(shape, engine);
    made.primitive = dnnl::matmul(made.desc);
    made.a = dnnl::memory(made.desc.src_desc(), engine, DNNL_MEMORY_NONE);
    made.b = dnnl::memory(made.desc.weights_desc(), engine, DNNL_MEMORY_NONE);
    made.c = dnnl::memory(made.desc.dst_desc(), engine, DNNL_MEMORY_NONE);
    made.scratch = dnnl::memory(made.desc.scratchpad_desc(), engine, DNNL_MEMORY_NONE);
    made.scratch_bytes = made.desc.scratchpad_desc().get_size();
    return entries.emplace(shape, std::move(made)).first->second;
  }

  void run(const GemmShape& shape, const void* a, const void* b, float* c) {
    Entry& e = entry(shape);
    if (e.scratch_bytes > scratch.size()) scratch = Buffer(e.scratch_bytes);
    // oneDNN takes non-const handles for inputs too; it does not write through them.
    e.a.set_data_handle(const_cast<void*>(a));
    e.b.set_data_handle(const_cast<void*>(b));
    e.c.set_data_handle(c);
    e.scratch.set_data_handle(scratch.data());
    // The C call, because the C++ one takes a hash map that would be built anew every time.
    const std::array<dnnl_exec_arg_t, 4> args = {{{DNNL_ARG_SRC, e.a.get()},
                                                  {DNNL_ARG_WEIGHTS, e.b.get()},
                                                  {DNNL_ARG_DST, e.c.get()},
                                                  {DNNL_ARG_SCRATCHPAD, e.scratch.get()}}};
    dnnl::error::wrap_c_api(dnnl_primitive_execute(e.primitive.get(), stream.get(),
                                                   static_cast<int>(args.size()), args.data()),
                            "could not execute a matmul");
    stream.wait();
  }
};

DnnlGemm::DnnlGemm() : state_(std::make_unique<State>()) {}
DnnlGemm::~DnnlGemm() = default;
DnnlGemm::DnnlGemm(DnnlGemm&&) noexcept = default;
DnnlGemm& DnnlGemm::operator=(DnnlGemm&&) noexcept = default;

void DnnlGemm::run(const GemmShape& shape, const void* a, const void* b, float* c) {
  const SingleThreadScope single;
  try {
    state_->run(shape, a, b, c);
  } catch (const dnnl::error& error) {
    fail(ErrorCode::kInternal, "onednn", error.what(), ", got m ", shape.m, ", n ", shape.n, ", k ",
         shape.k, shape.bf16 ? ", bf16" : ", f32");
  }
}

std::string DnnlGemm::implementation(const GemmShape& shape) {
  const SingleThreadScope single;
  try {
    return state_->entry(shape).desc.impl_info_str();
  } catch (const dnnl::error&) {
    return "none";
  }
}

bool prefers_bf16_gemm([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::avx512_bf16) return false;
  DnnlGemm gemm;
  const std::string name = gemm.implementation(
      {.m = 64, .n = 64, .k = 64, .bf16 = true, .b_transposed = true, .accumulate = false});
  // "brg:avx512_core_bf16", "brg:avx512_core_amx", ... On a lesser instruction set (the user may
  // cap oneDNN's) the name lacks both words.
  return name.starts_with("brg") &&
         (name.find("bf16") != std::string::npos || name.find("amx") != std::string::npos ||
          name.find("fp16") != std::string::npos || name.find("avx10") != std::string::npos);
#else
  return false;
#endif
}

}  // namespace twilight::cpu
