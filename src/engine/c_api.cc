#include "engine/c_api.h"

#include <iterator>
#include <string>

#include "core/buffer.h"
#include "ops/field_checks.h"
#include "sparse/decode_step.h"

namespace twilight::c_api {
namespace {

constexpr std::size_t kMessageBytes = 1024;
thread_local char last_error[kMessageBytes] = "";

constexpr const char* kSelectors[] = {"dense",  "full",     "quest",        "streaming",
                                      "oracle", "centroid", "sub_centroid", "half_centroid"};
static_assert(TWL_SELECTOR_DENSE == 0 && TWL_SELECTOR_FULL == 1 && TWL_SELECTOR_QUEST == 2 &&
              TWL_SELECTOR_STREAMING == 3 && TWL_SELECTOR_ORACLE == 4 &&
              TWL_SELECTOR_CENTROID == 5 && TWL_SELECTOR_SUB_CENTROID == 6 &&
              TWL_SELECTOR_HALF_CENTROID == 7);
constexpr const char* kCriteria[] = {"per_head", "group_mean"};
static_assert(TWL_CRITERION_PER_HEAD == 0 && TWL_CRITERION_GROUP_MEAN == 1);
static_assert(TWL_F32 == static_cast<int>(DType::kF32) &&
              TWL_F16 == static_cast<int>(DType::kF16) &&
              TWL_BF16 == static_cast<int>(DType::kBf16));

constexpr std::int32_t kMaxLayers = 4096;

template <std::size_t kCount>
std::int32_t number_of(const std::string& name, const char* const (&names)[kCount]) {
  const auto* const found = std::find(std::begin(names), std::end(names), name);
  return static_cast<std::int32_t>(found - std::begin(names));
}

template <std::size_t kCount>
const char* name_of(std::int32_t number, const char* const (&names)[kCount], const char* where,
                    const char* field) {
  require(number >= 0 && number < static_cast<std::int32_t>(kCount), where, field, ", got ", number,
          ", accepted 0 to ", kCount - 1);
  return names[number];
}

bool read_flag(std::int32_t value, const char* where, const char* name) {
  require(value == 0 || value == 1, where, name, ", got ", value, ", accepted 0 or 1");
  return value == 1;
}

// Index formats as twl_index_view numbers them: those of IndexFormat.
IndexFormat read_format(const twl_index_view& view, const char* where) {
  require(view.summary >= 0 && view.summary <= 5, where, "index.summary, got ", view.summary,
          ", accepted what twl_index_view_init sets");
  const std::int32_t bits = view.key_bits;
  require(bits == 0 || bits == 2 || bits == 4 || bits == 8, where, "index.key_bits, got ", bits,
          ", accepted what twl_index_view_init sets");
  require(view.value_bits == 0 || view.value_bits == 4, where, "index.value_bits, got ",
          view.value_bits, ", accepted what twl_index_view_init sets");
  require(view.reserved == 0, where, "index.reserved, got ", view.reserved, ", accepted 0");
  IndexFormat format;
  format.summary = static_cast<SummaryKind>(view.summary);
  format.key_bits = bits;
  format.value_bits = view.value_bits;
  return format;
}

// Whole records of a policy, padded to 16 bytes.
twl_index_bytes record_bytes(const IndexFormat& format, std::int32_t page_size,
                             std::int32_t head_dim, const char* where) {
  PagedKvView kv;
  kv.num_kv_heads = 1;
  kv.page_size = page_size;
  kv.head_dim = head_dim;
  const FieldChecks check{where};
  check.shape(kv);
  check.format(format, kv);
  const auto padded = [](std::int64_t bytes) {
    return align_up(static_cast<std::size_t>(bytes), 16);
  };
  twl_index_bytes out{};
  out.summary = padded(summary_record_bytes(format.summary, head_dim));
  out.estimate = padded(estimate_record_bytes(format, page_size, head_dim));
  out.value_mean = format.value_bits == 0 ? 0 : padded(nibble_bytes(head_dim));
  out.params = format.has_params() ? sizeof(PageParams) : 0;
  return out;
}

}  // namespace

void set_last_error(const char* text) noexcept {
  const std::size_t length = std::min(std::strlen(text), kMessageBytes - 1);
  std::memcpy(last_error, text, length);
  last_error[length] = '\0';
}

twl_status status_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return TWL_INVALID_ARGUMENT;
    case ErrorCode::kInvalidFile:
      return TWL_INVALID_FILE;
    case ErrorCode::kNotFound:
      return TWL_NOT_FOUND;
    case ErrorCode::kIo:
      return TWL_IO;
    case ErrorCode::kUnsupported:
      return TWL_UNSUPPORTED;
    case ErrorCode::kOutOfMemory:
      return TWL_OUT_OF_MEMORY;
    case ErrorCode::kInternal:
      return TWL_INTERNAL;
  }
  return TWL_INTERNAL;
}

SparsePolicy read_policy(const twl_policy* policy, const char* where) {
  const twl_policy in = read_struct(policy, where, "policy");
  require(in.layer_p_count >= 0 && in.layer_p_count <= kMaxLayers, where,
          "policy.layer_p_count, got ", in.layer_p_count, ", accepted 0 to ", kMaxLayers);
  if (in.layer_p_count > 0) require_pointer(in.layer_p, where, "policy.layer_p");
  SparsePolicy out;
  out.name = out.selector = name_of(in.selector, kSelectors, where, "policy.selector");
  out.prune = read_flag(in.prune, where, "policy.prune");
  out.candidate_fraction = in.candidate_fraction;
  out.min_candidates = in.min_candidates;
  out.max_candidates = in.max_candidates;
  out.p = in.p;
  out.min_tokens = in.min_tokens;
  out.layer_p.assign(in.layer_p, in.layer_p + in.layer_p_count);
  out.key_bits = in.key_bits;
  out.summary_bits = in.summary_bits;
  out.sink_tokens = in.sink_tokens;
  out.recent_pages = in.recent_pages;
  out.dense_layers = in.dense_layers;
  out.dense_below_tokens = in.dense_below_tokens;
  out.candidate_mass = in.candidate_mass;
  out.criterion = name_of(in.criterion, kCriteria, where, "policy.criterion");
  out.tail = read_flag(in.tail, where, "policy.tail");
  out.far_tail = read_flag(in.far_tail, where, "policy.far_tail");
  out.far_floor = in.far_floor;
  validate_policy(out);
  return out;
}

DType read_dtype(std::int32_t dtype, const char* where, const char* name) {
  require(dtype >= TWL_F32 && dtype <= TWL_BF16, where, name, ", got ", dtype,
          ", accepted 0 (f32), 1 (f16), 2 (bf16)");
  return static_cast<DType>(dtype);
}

PagedKvView read_kv(const twl_kv_view* view, const char* where, std::int32_t* num_pages) {
  const twl_kv_view in = read_struct(view, where, "kv");
  PagedKvView out;
  out.dtype = read_dtype(in.dtype, where, "kv.dtype");
  out.num_seqs = in.num_seqs;
  out.num_kv_heads = in.num_kv_heads;
  out.head_dim = in.head_dim;
  out.page_size = in.page_size;
  const auto plane = [&](const char* name, const twl_plane& from) {
    const auto bytes = static_cast<std::uintptr_t>(dtype_bytes(out.dtype));
    require(reinterpret_cast<std::uintptr_t>(from.data) % bytes == 0, where, name, ", got ",
            from.data, ", accepted ", bytes, "-byte aligned pointers");
    return PagePlane{static_cast<std::byte*>(from.data), from.page_stride, from.head_stride,
                     from.token_stride};
  };
  out.k = plane("kv.k.data", in.k);
  out.v = plane("kv.v.data", in.v);
  out.block_table = in.block_table;
  out.block_table_stride = in.block_table_stride;
  out.seq_lens = in.seq_lens;
  FieldChecks{where}.shape(out);
  require(in.num_pages >= 1, where, "kv.num_pages, got ", in.num_pages, ", accepted 1 or more");
  if (num_pages != nullptr) *num_pages = in.num_pages;
  return out;
}

void check_tables(const PagedKvView& kv, std::int32_t num_pages, std::int64_t max_tokens,
                  const char* where) {
  if (kv.num_seqs == 0) return;
  require_pointer(kv.seq_lens, where, "kv.seq_lens");
  for (std::int32_t seq = 0; seq < kv.num_seqs; ++seq) {
    require(kv.seq_lens[seq] >= 0 && kv.seq_lens[seq] <= max_tokens, where, "kv.seq_lens[", seq,
            "], got ", kv.seq_lens[seq], ", accepted 0 to ", max_tokens);
  }
  FieldChecks{where}.table({.ids = nullptr, .count = kv.num_seqs}, kv);
  const auto limit = static_cast<std::uint32_t>(num_pages);
  for (std::int32_t seq = 0; seq < kv.num_seqs; ++seq) {
    const std::int32_t pages = kv.total_pages(seq);
    if (pages == 0) continue;
    const std::int32_t* row = kv.block_table + seq * kv.block_table_stride;
    std::uint32_t largest = 0;  // negative numbers become large ones
    for (std::int32_t i = 0; i < pages; ++i) {
      largest = std::max(largest, static_cast<std::uint32_t>(row[i]));
    }
    require(largest < limit, where, "kv.block_table of sequence ", seq, ", got page ",
            static_cast<std::int32_t>(largest), ", accepted 0 to ", num_pages - 1);
  }
}

KeyIndexView read_index(const twl_index_view* view, IndexLayout layout, const char* where) {
  const twl_index_view in = read_struct(view, where, "index");
  KeyIndexView out;
  out.format = read_format(in, where);
  out.format.layout = layout;
  out.summaries = static_cast<std::byte*>(in.summaries);
  out.summary_page_stride = in.summary_page_stride;
  out.summary_head_stride = in.summary_head_stride;
  out.estimates = static_cast<std::byte*>(in.estimates);
  out.estimate_page_stride = in.estimate_page_stride;
  out.estimate_head_stride = in.estimate_head_stride;
  out.value_means = static_cast<std::byte*>(in.value_means);
  out.value_page_stride = in.value_mean_page_stride;
  out.value_head_stride = in.value_mean_head_stride;
  out.params = static_cast<std::byte*>(in.params);
  out.params_page_stride = in.params_page_stride;
  out.params_head_stride = in.params_head_stride;
  return out;
}

}  // namespace twilight::c_api

using twilight::c_api::guarded;
using twilight::c_api::require_pointer;

const char* twl_status_name(twl_status status) {
  switch (status) {
    case TWL_OK:
      return "ok";
    case TWL_INVALID_ARGUMENT:
      return "invalid argument";
    case TWL_INVALID_FILE:
      return "invalid file";
    case TWL_NOT_FOUND:
      return "not found";
    case TWL_IO:
      return "input or output failed";
    case TWL_UNSUPPORTED:
      return "unsupported";
    case TWL_OUT_OF_MEMORY:
      return "out of memory";
    case TWL_INTERNAL:
      return "internal error";
  }
  return "unknown status";
}

const char* twl_last_error(void) { return twilight::c_api::last_error; }

twl_status twl_context_create(const twl_context_options* options, twl_context** context) {
  constexpr const char* kWhere = "twl_context_create";
  return guarded([&] {
    require_pointer(context, kWhere, "context");
    *context = nullptr;
    twilight::DeviceOptions device;
    if (options != nullptr) {
      const twl_context_options in = twilight::c_api::read_struct(options, kWhere, "options");
      twilight::require(in.threads >= 0 && in.threads <= 1024, kWhere, "options.threads, got ",
                        in.threads, ", accepted 0 to 1024");
      if (in.device != nullptr) device.device = in.device;
      if (in.isa != nullptr) device.isa = in.isa;
      device.threads = in.threads;
    }
    *context = new twl_context{twilight::Device(device)};
  });
}

void twl_context_destroy(twl_context* context) { delete context; }

twl_status twl_policy_init(const char* preset, twl_policy* policy) {
  constexpr const char* kWhere = "twl_policy_init";
  return guarded([&] {
    require_pointer(preset, kWhere, "preset");
    twilight::c_api::require_size(policy, kWhere, "policy");
    const twilight::SparsePolicy from = twilight::make_policy(preset);
    twl_policy out{};
    out.struct_size = policy->struct_size;
    out.selector = twilight::c_api::number_of(from.selector, twilight::c_api::kSelectors);
    out.prune = from.prune ? 1 : 0;
    out.candidate_fraction = from.candidate_fraction;
    out.min_candidates = from.min_candidates;
    out.max_candidates = from.max_candidates;
    out.p = from.p;
    out.min_tokens = from.min_tokens;
    out.key_bits = from.key_bits;
    out.summary_bits = from.summary_bits;
    out.sink_tokens = from.sink_tokens;
    out.recent_pages = from.recent_pages;
    out.dense_layers = from.dense_layers;
    out.dense_below_tokens = from.dense_below_tokens;
    out.candidate_mass = from.candidate_mass;
    out.criterion = twilight::c_api::number_of(from.criterion, twilight::c_api::kCriteria);
    out.tail = from.tail ? 1 : 0;
    out.far_tail = from.far_tail ? 1 : 0;
    out.far_floor = from.far_floor;
    if (out.candidate_mass != 0 || out.criterion != 0 || from.tail) {
      twilight::c_api::require_whole(policy, kWhere, "policy");
    }
    std::memcpy(policy, &out, std::min(out.struct_size, sizeof(out)));
  });
}

twl_status twl_index_record_bytes(const twl_policy* policy, int32_t page_size, int32_t head_dim,
                                  twl_index_bytes* bytes) {
  constexpr const char* kWhere = "twl_index_record_bytes";
  return guarded([&] {
    twilight::c_api::require_size(bytes, kWhere, "bytes");
    const auto format = twilight::index_format_of(twilight::c_api::read_policy(policy, kWhere));
    auto out = twilight::c_api::record_bytes(format, page_size, head_dim, kWhere);
    out.struct_size = bytes->struct_size;
    std::memcpy(bytes, &out, std::min(out.struct_size, sizeof(out)));
  });
}

twl_status twl_index_sizes(const twl_policy* policy, int32_t page_size, int32_t head_dim,
                           size_t* summary_bytes, size_t* estimate_bytes) {
  constexpr const char* kWhere = "twl_index_sizes";
  return guarded([&] {
    require_pointer(summary_bytes, kWhere, "summary_bytes");
    require_pointer(estimate_bytes, kWhere, "estimate_bytes");
    const auto format = twilight::index_format_of(twilight::c_api::read_policy(policy, kWhere));
    const auto bytes = twilight::c_api::record_bytes(format, page_size, head_dim, kWhere);
    if (format.has_params()) {
      twilight::fail(twilight::ErrorCode::kUnsupported, kWhere,
                     "policy, got one that reads value means or scales, accepted one that reads "
                     "summaries and estimates alone, or twl_index_record_bytes");
    }
    *summary_bytes = bytes.summary;
    *estimate_bytes = bytes.estimate;
  });
}

twl_status twl_index_view_init(const twl_policy* policy, twl_index_view* view) {
  constexpr const char* kWhere = "twl_index_view_init";
  return guarded([&] {
    twilight::c_api::require_size(view, kWhere, "view");
    const auto format = twilight::index_format_of(twilight::c_api::read_policy(policy, kWhere));
    twl_index_view out{};
    out.struct_size = view->struct_size;
    out.summary = static_cast<std::int32_t>(format.summary);
    out.key_bits = format.key_bits;
    out.value_bits = format.value_bits;
    if (format.has_params()) twilight::c_api::require_whole(view, kWhere, "view");
    std::memcpy(view, &out, std::min(out.struct_size, sizeof(out)));
  });
}
