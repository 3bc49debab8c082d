#include "engine/engine_sizes.h"

#include <algorithm>

#include "core/check.h"
#include "engine/attention_impl.h"
#include "engine/device_impl.h"

namespace twilight {
namespace {

// What a device with memory of its own keeps free beside the cache: library scratch, the trial of
// the crossover, recorded launches.
constexpr std::int64_t kReservedBytes = std::int64_t{512} << 20;
// An allocation takes whole units of this.
constexpr std::int64_t kAllocationUnit = std::int64_t{2} << 20;
constexpr std::int64_t kPoolsPerLayer = 6;

}  // namespace

EngineOptions settle(EngineOptions options, const Device& device, const ModelInfo& info) {
  if (options.max_context == 0) options.max_context = info.max_context;
  if (options.prefill_chunk == EngineOptions::kAutoChunk) {
    options.prefill_chunk = device.impl().backend->memory().is_host() ? 512 : 2048;
  }
  const auto in_range = [](const char* name, std::int64_t value, std::int64_t max) {
    require(value >= 1 && value <= max, "engine", name, ", got ", value, ", accepted 1 to ", max);
  };
  require(options.max_context >= 1 && options.max_context <= info.max_context, "engine",
          "max_context, got ", options.max_context, ", accepted 1 to ", info.max_context,
          info.sliding_window ? ", the model's sliding window" : "");
  in_range("max_seqs", options.max_seqs, 65536);
  in_range("prefill_chunk", options.prefill_chunk, 65536);
  in_range("page_size", options.page_size, 256);
  require(options.cache_tokens >= 0, "engine", "cache_tokens, got ", options.cache_tokens,
          ", accepted 1 or more, or 0 for all that can be used");
  options.prefill_chunk = std::min(options.prefill_chunk, options.max_context);
  return options;
}

KvCacheOptions cache_options(const EngineOptions& options, const ModelInfo& info) {
  KvCacheOptions cache;
  cache.num_layers = info.num_layers;
  cache.num_kv_heads = info.num_kv_heads;
  cache.head_dim = info.head_dim;
  cache.page_size = options.page_size;
  cache.dtype = options.cache_dtype;
  // One page more per sequence: the last page of each may be partly filled.
  cache.num_pages = narrow<std::int32_t>(
      (options.cache_tokens + options.page_size - 1) / options.page_size + options.max_seqs);
  return cache;
}

EngineOptions size_cache(EngineOptions options, const Device& device, const ModelInfo& info) {
  if (options.cache_tokens > 0) return options;
  options.cache_tokens = std::int64_t{options.max_seqs} * options.max_context;
  Backend& backend = *device.impl().backend;
  if (backend.memory().is_host()) return options;
  const auto free = static_cast<std::int64_t>(backend.memory().free_bytes());
  if (free == 0) return options;
  KvStorageOptions storage;
  storage.num_layers = info.num_layers;
  storage.num_kv_heads = info.num_kv_heads;
  storage.head_dim = info.head_dim;
  storage.page_size = options.page_size;
  storage.dtype = options.cache_dtype;
  storage.index = index_format_of(options.policy, backend, info.head_dim);
  const DecodeStep step(backend, options.policy,
                        {options.max_seqs, info.num_q_heads, info.num_kv_heads, info.head_dim,
                         options.page_size, options.max_context, 0},
                        options.cache_dtype);
  const std::int64_t taken = kReservedBytes + info.num_layers * kPoolsPerLayer * kAllocationUnit +
                             static_cast<std::int64_t>(step.workspace_bytes()) +
                             info.num_layers * static_cast<std::int64_t>(step.lists_bytes());
  // cache_options adds a page for each sequence.
  const std::int64_t pages = (free - taken) / storage.bytes_per_page() - options.max_seqs;
  if (pages < 1) {
    fail(ErrorCode::kOutOfMemory, "engine", "free memory for the cache, got ", free,
         " bytes, accepted ", taken + (options.max_seqs + 1) * storage.bytes_per_page(),
         " or more");
  }
  options.cache_tokens = std::min(options.cache_tokens, pages * options.page_size);
  return options;
}

}  // namespace twilight
