#ifndef TWILIGHT_BACKEND_CUDA_FAST_STEP_ARGS_H_
#define TWILIGHT_BACKEND_CUDA_FAST_STEP_ARGS_H_

#include <cstdint>

/// Kernel parameters of the fused sparse step. Device pointers; strides of planes in bytes.
namespace twilight::cuda_fast {

struct Plane {
  const std::uint8_t* data = nullptr;
  std::int64_t head_stride = 0;
  std::uint32_t page_stride = 0;
};

/// What a step reads by physical page.
enum PlaneId : int { kSummaries, kEstimates, kValueMeans, kParams, kKeys, kValues, kNumPlanes };

/// Offsets into dynamic shared memory, one set for every block of a launch (bytes).
///
/// Region A is used three times over: page scores while selecting; token weights, histogram and
/// page sums while pruning; attended rows, their scores and the partial outputs at the end.
struct SmemLayout {
  std::int32_t max_pages = 0;       ///< sealed pages a problem may have, a multiple of 16
  std::int32_t max_candidates = 0;  ///< candidate pages a problem may have
  std::int32_t owned = 0;           ///< candidate pages a block may own
  std::int32_t second_centres = 0;
  std::int32_t tile_mass = 0;    ///< float2 [tiles, heads]: base and sum of the tile's masses
  std::int32_t tile_centre = 0;  ///< float [tiles owned, heads]
  std::int32_t keys = 0;         ///< [pages]
  std::int32_t select_histogram = 0;
  std::int32_t select_mass = 0;   ///< mass histogram of selection, 0 bytes long without the rule
  std::int32_t ring = 0;          ///< summaries on their way, kSubCentroid; over region B as well
  std::int32_t page_sums = 0;     ///< float [candidates, heads]
  std::int32_t histogram = 0;     ///< of pruning
  std::int32_t boundary = 0;      ///< boundary list of pruning
  std::int32_t chunk_scores = 0;  ///< float [kChunk, heads]
  std::int32_t partials = 0;      ///< partial outputs
  std::int32_t candidates = 0;    ///< region B: page numbers, physical pages, masses, masks
  std::int32_t fixed = 0;         ///< region C: Fixed
  std::int32_t bytes = 0;
};

struct StepArgs {
  const float* q = nullptr;  ///< [B, Hq, D]
  std::int64_t q_seq_stride = 0;
  Plane planes[kNumPlanes];
  std::int32_t k_token_stride = 0;  ///< bytes
  std::int32_t v_token_stride = 0;
  const std::int32_t* block_table = nullptr;
  std::int64_t table_stride = 0;
  const std::int32_t* seq_lens = nullptr;
  const std::int32_t* seq_ids = nullptr;  ///< null: row i of the launch is sequence first_seq + i
  std::int32_t first_seq = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t group = 0;
  float scale = 0;

  std::int32_t sink_tokens = 0;
  std::int32_t recent_pages = 0;
  double fraction = 0;
  std::int32_t min_candidates = 0;
  std::int32_t max_candidates = 0;
  float mass = 0;
  std::int32_t mass_floor = 0;

  const float* p = nullptr;  ///< [B, Hq]; null: p_of_all
  float p_of_all = 1;
  std::int32_t min_tokens = 0;
  bool tail = false;

  float* out = nullptr;
  std::int64_t out_seq_stride = 0;
  /// Lists for statistics; each may be null.
  std::int32_t* pages = nullptr;
  std::int32_t* page_counts = nullptr;
  std::int64_t candidate_stride = 0;
  std::int32_t* kept = nullptr;
  std::int32_t* kept_counts = nullptr;
  std::int64_t kept_stride = 0;
  std::int32_t* head_counts = nullptr;
  float* head_mass = nullptr;
  float* tail_mass = nullptr;
  float* tail_shift = nullptr;
  std::int64_t* stamps = nullptr;  ///< [problems, kStamps] nanoseconds, for benchmarks; may be null

  SmemLayout smem;
};

inline constexpr int kStamps = 16;

/// Parts of four pages with four means that a warp has on their way.
inline constexpr int kRingParts = 3;
/// Places for the scales of 16 pages.
inline constexpr int kParamSlots = 17;
/// Bytes of a warp's ring: parts, and the scales and ids of two tiles of 16 pages.
constexpr int ring_bytes(int dim) { return kRingParts * 8 * dim + 2 * (kParamSlots * 16 + 16 * 4); }

/// Centre products of a candidate page and head that are kept in shared memory, of a format with
/// `means`; four are made again where they are used, and the one number is for the dropped weights.
constexpr int kept_centres(int means) { return means == 4 ? 1 : means; }

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_STEP_ARGS_H_
