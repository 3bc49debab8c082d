#ifndef TWILIGHT_SPARSE_AUDIT_H_
#define TWILIGHT_SPARSE_AUDIT_H_

#include <cstdint>
#include <span>

#include "ops/backend.h"
#include "twilight/stats.h"

namespace twilight {

/// True share of the full softmax that lies on `kept`, for each query head of sequence `seq`; reads
/// every key of the sequence and allocates. `kept` is [Hkv][kept_stride] with `counts` [Hkv] for
/// that sequence, both in host memory.
void audit_true_mass(Backend& backend, const QueryView& q, const PagedKvView& kv, float scale,
                     std::int32_t seq, const std::int32_t* kept, const std::int32_t* counts,
                     std::int64_t kept_stride, Workspace workspace, std::span<float> mass);

}  // namespace twilight

#endif  // TWILIGHT_SPARSE_AUDIT_H_
