#include <cmath>
#include <limits>

#include "engine/c_api.h"
#include "engine/device_impl.h"

namespace twilight::c_api {
namespace {

// Writes the tokens of one run of slots that are not skipped.
void append_run(Backend& backend, AppendKvParams params, const twl_append_args& args,
                std::int64_t begin, std::int64_t end) {
  params.k = args.keys + begin * args.key_token_stride;
  params.v = args.values + begin * args.value_token_stride;
  params.slots = args.slots + begin;
  params.num_tokens = static_cast<std::int32_t>(end - begin);
  backend.append_kv(params);
}

void append(twl_context* context, const twl_append_args* args) {
  constexpr const char* kWhere = "twl_append";
  require_pointer(context, kWhere, "context");
  const twl_append_args in = read_struct(args, kWhere, "args");
  std::int32_t num_pages = 0;
  AppendKvParams params;
  params.kv = read_kv(in.kv, kWhere, &num_pages);
  require(in.num_tokens >= 0, kWhere, "num_tokens, got ", in.num_tokens, ", accepted 0 or more");
  if (in.num_tokens == 0) return;
  require_pointer(in.keys, kWhere, "keys");
  require_pointer(in.values, kWhere, "values");
  require_pointer(in.slots, kWhere, "slots");
  const std::int64_t row = std::int64_t{params.kv.num_kv_heads} * params.kv.head_dim;
  const auto stride = [&](const char* name, std::int64_t value) {
    require(in.num_tokens == 1 || value >= row, kWhere, name, ", got ", value, ", accepted ", row,
            " or more");
  };
  stride("key_token_stride", in.key_token_stride);
  stride("value_token_stride", in.value_token_stride);
  params.k_token_stride = in.key_token_stride;
  params.v_token_stride = in.value_token_stride;
  const std::int64_t capacity = std::int64_t{num_pages} * params.kv.page_size;
  for (std::int32_t i = 0; i < in.num_tokens; ++i) {
    require(in.slots[i] < capacity, kWhere, "slots[", i, "], got ", in.slots[i],
            ", accepted below ", capacity);
  }
  Backend& backend = *context->device.impl().backend;
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i <= in.num_tokens; ++i) {
    if (i < in.num_tokens && in.slots[i] >= 0) continue;
    if (i > begin) append_run(backend, params, in, begin, i);
    begin = i + 1;
  }
}

void seal(twl_context* context, const twl_seal_args* args) {
  constexpr const char* kWhere = "twl_seal";
  require_pointer(context, kWhere, "context");
  const twl_seal_args in = read_struct(args, kWhere, "args");
  std::int32_t num_pages = 0;
  SealPagesParams params;
  params.kv = read_kv(in.kv, kWhere, &num_pages);
  Backend& backend = *context->device.impl().backend;
  params.index = read_index(in.index, backend.index_layout(), kWhere);
  params.pages = in.pages;
  params.num_pages = in.num_pages;
  if (in.num_pages > 0) require_pointer(in.pages, kWhere, "pages");
  for (std::int32_t i = 0; i < in.num_pages; ++i) {
    require(in.pages[i] >= 0 && in.pages[i] < num_pages, kWhere, "pages[", i, "], got ",
            in.pages[i], ", accepted 0 to ", num_pages - 1);
  }
  backend.seal_pages(params);
}

void prefill(twl_context* context, const twl_prefill_args* args) {
  constexpr const char* kWhere = "twl_attend_prefill";
  require_pointer(context, kWhere, "context");
  const twl_prefill_args in = read_struct(args, kWhere, "args");
  std::int32_t num_pages = 0;
  AttendPrefillParams params;
  params.kv = read_kv(in.kv, kWhere, &num_pages);
  require(params.kv.num_seqs == 1, kWhere, "kv.num_seqs, got ", params.kv.num_seqs, ", accepted 1");
  check_tables(params.kv, num_pages, std::numeric_limits<std::int32_t>::max() / 2, kWhere);
  params.q = in.queries;
  params.q_token_stride = in.query_token_stride;
  params.num_q_heads = in.num_q_heads;
  params.num_tokens = in.num_tokens;
  params.scale = 1.0F / std::sqrt(static_cast<float>(params.kv.head_dim));
  params.out = in.out;
  params.out_token_stride = in.out_token_stride;
  require(in.full_precision == 0 || in.full_precision == 1, kWhere, "full_precision, got ",
          in.full_precision, ", accepted 0 or 1");
  params.full_precision = in.full_precision == 1;
  context->device.impl().backend->attend_prefill(params);
}

}  // namespace
}  // namespace twilight::c_api

twl_status twl_append(twl_context* context, const twl_append_args* args) {
  return twilight::c_api::guarded([&] { twilight::c_api::append(context, args); });
}

twl_status twl_seal(twl_context* context, const twl_seal_args* args) {
  return twilight::c_api::guarded([&] { twilight::c_api::seal(context, args); });
}

twl_status twl_attend_prefill(twl_context* context, const twl_prefill_args* args) {
  return twilight::c_api::guarded([&] { twilight::c_api::prefill(context, args); });
}
