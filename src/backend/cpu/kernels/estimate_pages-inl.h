// Estimated scores of candidate pages, from the index or from the keys.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_PAGES_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_PAGES_INL_H_

#include "backend/cpu/kernels/centroid-inl.h"
#include "backend/cpu/kernels/estimate-inl.h"
#include "backend/cpu/kernels/estimate2-inl.h"
#include "backend/cpu/kernels/mass_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// 2 bits: the query of the residuals, then that of the means.
void prepare_estimates(const IndexUnit& unit, std::byte* query) {
  if (unit.index.format.key_bits != 2) {
    prepare_plain_estimates(unit, query);
    return;
  }
  prepare_estimates2(unit, query);
  prepare_centres(unit, query + estimate2_query_bytes(unit.kv.head_dim, unit.group));
}

// Heads of a unit that one pass over its records takes, and where their results go.
struct EstimateHeads {
  int first = 0;
  int count = 0;
  std::int64_t stride = 0;      // between rows of estimates
  std::int64_t dot_stride = 0;  // between heads of the means' dots (2 bits)
  IndexVec* best = nullptr;     // [count] lane maxima so far
};

constexpr int kHeadsAPass = 32;

// Tiles that share each load of the query: enough accumulators to hide the latency of the dot
// product, which one tile of four heads just does not.
constexpr int kTilesAtOnce = TWILIGHT_HAS_VNNI ? 2 : 1;

struct EstimateTile {
  const std::byte* codes = nullptr;
  TileAhead ahead;
  float* out = nullptr;         // of head `first`
  const float* dots = nullptr;  // of head `first`: the page's means (2 bits)
  int first_slot = 0;
  int count = 0;  // slots that exist
};

// Which mean covers each of kIndexLanes slots, as lane numbers.
struct SlotCentres {
  int centres = 1;
  std::int32_t tokens = 1;  // of a mean

  explicit SlotCentres(const IndexUnit& unit)
      : centres(centre_count(unit.index.format)),
        tokens(centroid_tokens(unit.index.format.summary, unit.kv.page_size)) {}

  HWY_INLINE auto indices(int first_slot) const {
    const IndexF df;
    const hn::RebindToSigned<IndexF> di32;
    HWY_ALIGN static constexpr std::int32_t kLane[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
    const auto slot = hn::Add(hn::Load(di32, kLane), hn::Set(di32, first_slot));
    auto index = hn::Zero(di32);
#pragma GCC unroll 3
    for (int i = 1; i < kSubCentroids; ++i) {
      if (i >= centres) break;
      const auto from = hn::Gt(slot, hn::Set(di32, i * tokens - 1));
      index = hn::IfThenElse(from, hn::Set(di32, i), index);
    }
    return hn::IndicesFromVec(df, index);
  }
};

// kIndexLanes f16 values as f32.
HWY_INLINE IndexVec load_halves(const std::byte* from) { return load_row<DType::kF16>(from, 0); }

// Stores the first `slots` lanes and counts them in `best`.
HWY_INLINE void put_part(IndexVec e, std::int64_t slots, float* to, IndexVec* best) {
  const IndexF df;
  if (slots <= 0) return;
  const int count = static_cast<int>(std::min<std::int64_t>(slots, kIndexLanes));
  store_lanes(e, count, to);
  const auto counts = hn::FirstN(df, static_cast<std::size_t>(count));
  *best = hn::IfThenElse(counts, larger_known(e, *best), *best);
}

// From the dots of kHeads heads with kIndexLanes tokens, `first` slots into the tile, to estimates.
// Whole says that all of those slots exist, Sub that several means cover them.
template <int kBits, int kHeads, bool kWhole, bool kSub, typename Head>
HWY_INLINE void finish_tile(std::int64_t code_bytes, const EstimateTile& tile, int first,
                            const EstimateHeads& pass, int h0, const SlotCentres& slot_centres,
                            const Head* heads, const IndexVec* t) {
  const IndexF df;
  const std::byte* scales = tile.codes + code_bytes + 2 * first;
  const IndexVec scale = load_halves(scales);
  IndexVec e[kHeads];
  if constexpr (kBits == 2) {
    const std::int64_t dot_stride = pass.dot_stride;
    const float* dots = tile.dots + h0 * dot_stride;
    if constexpr (kSub) {
      const auto indices = slot_centres.indices(tile.first_slot + first);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const IndexVec centre =
            hn::TableLookupLanes(hn::LoadDup128(df, dots + h * dot_stride), indices);
        e[h] = hn::MulAdd(hn::Mul(hn::Set(df, heads[h].step), scale), t[h], centre);
      }
    } else {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const IndexVec centre = hn::Set(df, dots[h * dot_stride]);
        e[h] = hn::MulAdd(hn::Mul(hn::Set(df, heads[h].step), scale), t[h], centre);
      }
    }
  } else {
    const IndexVec c = hn::Set(df, kBits == 4 ? kCentre4 : kCentre8);
    const IndexVec centre = hn::MulAdd(c, scale, load_halves(scales + 2 * kEstimateTileTokens));
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const IndexVec rest = hn::Mul(hn::Set(df, heads[h].sum), centre);
      e[h] = hn::MulAdd(hn::Mul(hn::Set(df, heads[h].step), scale), t[h], rest);
    }
  }
  const std::int64_t stride = pass.stride;
  float* out = tile.out + h0 * stride + first;
  IndexVec* best = pass.best + h0;
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h, out += stride) {
    if constexpr (kWhole) {
      hn::StoreU(e[h], df, out);
      best[h] = larger_known(e[h], best[h]);
    } else {
      put_part(e[h], tile.count - first, out, best + h);
    }
  }
}

// Estimates of kHeads heads for kTiles tiles. `h0` is the block's first head of the pass, `words`
// and `heads` its query.
template <int kBits, int kHeads, int kTiles, bool kWhole, bool kSub, typename Head>
HWY_INLINE void estimate_tiles(std::int64_t head_dim, const EstimateTile* tiles,
                               const EstimateHeads& pass, int h0, const SlotCentres& slot_centres,
                               const std::uint32_t* words, const Head* heads) {
  const std::int64_t code_bytes = estimate_code_bytes(kBits, static_cast<int>(head_dim));
  TileAhead ahead[kTiles];
  for (int i = 0; i < kTiles; ++i) ahead[i] = tiles[i].ahead;
  for (int first = 0; first < kEstimateTileTokens; first += kIndexLanes) {
    const std::byte* codes[kTiles];
    for (int i = 0; i < kTiles; ++i) codes[i] = tiles[i].codes + 4 * first;
    IndexVec t[kTiles][kHeads];
    if constexpr (kBits == 2) {
      dot2_tiles<kHeads, kTiles>(head_dim, codes, ahead, words, heads, t);
    } else {
      dot_tiles<kBits, kHeads, kTiles>(head_dim, codes, ahead, words, heads, t);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) {
      prefetch_ahead(ahead[i], code_bytes);
      finish_tile<kBits, kHeads, kWhole, kSub>(code_bytes, tiles[i], first, pass, h0, slot_centres,
                                               heads, t[i]);
    }
  }
}

template <int kBits, int kTiles, bool kWhole, bool kSub>
HWY_INLINE void estimate_block_heads(const IndexUnit& unit, const std::byte* query,
                                     const EstimateTile* tiles, const EstimateHeads& pass,
                                     const SlotCentres& slot_centres) {
  using Head = std::conditional_t<kBits == 2, Estimate2Head, EstimateHead>;
  const int head_dim = unit.kv.head_dim;
  const std::int64_t constants_bytes =
      kBits == 2 ? estimate2_constants_bytes(unit.group) : estimate_constants_bytes(unit.group);
  const std::int64_t words_per_head =
      kBits == 2 ? estimate2_words(head_dim) : estimate_words(kBits, head_dim);
  const auto* heads = reinterpret_cast<const Head*>(query) + pass.first;
  const auto* words =
      reinterpret_cast<const std::uint32_t*>(query + constants_bytes) + pass.first * words_per_head;
  for (int h0 = 0; h0 < pass.count;) {
    const int block = heads_at_once(pass.count - h0);
    if (block == 4) {
      estimate_tiles<kBits, 4, kTiles, kWhole, kSub>(head_dim, tiles, pass, h0, slot_centres, words,
                                                     heads + h0);
    } else if (block == 2) {
      estimate_tiles<kBits, 2, kTiles, kWhole, kSub>(head_dim, tiles, pass, h0, slot_centres, words,
                                                     heads + h0);
    } else {
      estimate_tiles<kBits, 1, kTiles, kWhole, kSub>(head_dim, tiles, pass, h0, slot_centres, words,
                                                     heads + h0);
    }
    words += block * words_per_head;
    h0 += block;
  }
}

template <int kBits, int kTiles>
HWY_INLINE void estimate_all_heads(const IndexUnit& unit, const std::byte* query,
                                   const EstimateTile* tiles, const EstimateHeads& pass,
                                   const SlotCentres& slot_centres) {
  bool whole = true;
  for (int i = 0; i < kTiles; ++i) whole = whole && tiles[i].count == kEstimateTileTokens;
  const auto run = [&]<bool kSub>() HWY_ATTR {
    if (whole) {
      estimate_block_heads<kBits, kTiles, true, kSub>(unit, query, tiles, pass, slot_centres);
    } else {
      estimate_block_heads<kBits, kTiles, false, kSub>(unit, query, tiles, pass, slot_centres);
    }
  };
  if (kBits == 2 && slot_centres.centres > 1) {
    run.template operator()<kBits == 2>();
  } else {
    run.template operator()<false>();
  }
}

// Sealed candidates [begin, end), read from the index. `given` are the dots of the unit's means
// with all heads, or has no data: then they are computed here, a batch of pages at a time.
template <int kBits>
inline void estimate_range(const IndexUnit& unit, const std::byte* query, const std::int32_t* pages,
                           std::int64_t begin, std::int64_t end, const CentreDots& given,
                           float* estimates, EstimateHeads pass) {
  const int page_size = unit.kv.page_size;
  const int head_dim = unit.kv.head_dim;
  const std::int64_t tile_bytes = estimate_tile_bytes(kBits, head_dim);
  const int tiles_per_page = estimate_tiles_per_page(page_size);
  const std::int64_t record_bytes = tiles_per_page * tile_bytes;
  const SlotCentres slot_centres(unit);
  const auto record = [&](std::int64_t i) {
    return unit.index.estimate(unit.kv.page_of(unit.seq, pages[i]), unit.kv_head);
  };
  const std::int64_t ahead = records_ahead(record_bytes);
  for (std::int64_t i = begin; i < std::min(begin + ahead, end); ++i) {
    prefetch_record(record(i), record_bytes);
  }

  const bool own_dots = kBits == 2 && given.data == nullptr;
  const std::int64_t batch_pages =
      own_dots ? std::clamp<std::int64_t>(kIndexLanes / tiles_per_page, 1, kIndexLanes)
               : std::max<std::int64_t>(end - begin, 1);
  HWY_ALIGN float local[kBits == 2 ? kHeadsAPass * kIndexLanes * kSubCentroids : 1];
  const float* dots = nullptr;
  if constexpr (kBits == 2) {
    pass.dot_stride = (own_dots ? std::int64_t{kIndexLanes} : given.stride) * slot_centres.centres;
    dots = own_dots ? local : given.data + pass.first * pass.dot_stride;
  }
  CentreBatch batches[2];  // the one being read and the next
  const auto fill_batch = [&](std::int64_t first) HWY_ATTR {
    if (first >= end) return;
    const auto count = static_cast<int>(std::min(batch_pages, end - first));
    CentreBatch& batch = batches[(first - begin) / batch_pages % 2];
    batch.fill(unit, count, [&](int r) { return std::int64_t{pages[first + r]}; });
    if (first > begin) return;
    for (int r = 0; r < count; ++r) {
      prefetch_record(batch.codes[r], slot_centres.centres * nibble_bytes(head_dim));
    }
  };
  if (own_dots) fill_batch(begin);

  EstimateTile tiles[kTilesAtOnce];
  int held = 0;
  for (std::int64_t first = begin; first < end; first += batch_pages) {
    const std::int64_t last = std::min(first + batch_pages, end);
    if constexpr (kBits == 2) {
      if (own_dots) {
        fill_batch(last);
        const std::int64_t number = (first - begin) / batch_pages;
        centre_dots(unit, query + estimate2_query_bytes(head_dim, unit.group), batches[number % 2],
                    last < end ? &batches[(number + 1) % 2] : nullptr,
                    static_cast<int>(last - first), pass.first, pass.count, local, pass.dot_stride);
      }
    }
    for (std::int64_t i = first; i < last; ++i) {
      const std::byte* base = record(i);
      const std::byte* far = record(std::min(i + ahead, end - 1));
      for (int tile = 0; tile < tiles_per_page; ++tile) {
        const int near = tile + kTilesAtOnce;
        const std::byte* next = record(std::min<std::int64_t>(i + near / tiles_per_page, end - 1)) +
                                near % tiles_per_page * tile_bytes;
        EstimateTile& t = tiles[held];
        t.codes = base + tile * tile_bytes;
        t.ahead = {far + tile * tile_bytes, next};
        t.out = estimates + i * page_size + tile * kEstimateTileTokens;
        t.first_slot = tile * kEstimateTileTokens;
        t.count = std::min(kEstimateTileTokens, page_size - t.first_slot);
        if constexpr (kBits == 2) {
          t.dots = dots + (own_dots ? i - first : std::int64_t{pages[i]}) * slot_centres.centres;
        }
        if (++held < kTilesAtOnce) continue;
        estimate_all_heads<kBits, kTilesAtOnce>(unit, query, tiles, pass, slot_centres);
        held = 0;
      }
    }
    // The dots of this batch are about to be overwritten.
    if (held > 0 && own_dots) {
      estimate_all_heads<kBits, 1>(unit, query, tiles, pass, slot_centres);
      held = 0;
    }
  }
  if (held > 0) estimate_all_heads<kBits, 1>(unit, query, tiles, pass, slot_centres);
}

// Candidate page i from its keys, -inf past the sequence's end.
inline void estimate_keys(const IndexUnit& unit, const std::int32_t* pages, std::int64_t i,
                          std::int64_t end, std::int64_t ahead, float* estimates,
                          std::int64_t stride, float* row_max) {
  const std::int64_t page_size = unit.kv.page_size;
  const std::int64_t length = unit.kv.seq_lens[unit.seq];
  const std::int64_t count = std::clamp<std::int64_t>(length - pages[i] * page_size, 0, page_size);
  float* out = estimates + i * page_size;
  if (count > 0) {
    score_page_rows(unit, unit.kv.page_of(unit.seq, pages[i]),
                    unit.kv.page_of(unit.seq, pages[std::min(i + ahead, end - 1)]), 0, count, out,
                    stride);
  }
  for (int h = 0; h < unit.group; ++h) {
    float* row = out + h * stride;
    for (std::int64_t slot = 0; slot < count; ++slot) {
      row_max[h] = row[slot] > row_max[h] ? row[slot] : row_max[h];
    }
    std::fill(row + count, row + page_size, -std::numeric_limits<float>::infinity());
  }
}

void estimate(const IndexUnit& unit, const std::byte* query, bool exact_keys,
              const std::int32_t* pages, std::int64_t begin, std::int64_t end,
              const CentreDots& dots, float* estimates, std::int64_t stride, float* row_max) {
  const IndexF df;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::int32_t sealed = unit.kv.sealed_pages(unit.seq);
  const std::int64_t keys_ahead = exact_keys
                                      ? records_ahead(std::int64_t{unit.kv.page_size} *
                                                      unit.kv.head_dim * dtype_bytes(unit.kv.dtype))
                                      : 0;
  std::fill(row_max, row_max + unit.group, -kInfinity);
  for (std::int64_t i = begin; i < end;) {
    if (exact_keys || pages[i] >= sealed) {
      estimate_keys(unit, pages, i, end, keys_ahead, estimates, stride, row_max);
      ++i;
      continue;
    }
    std::int64_t run = i + 1;
    while (run < end && pages[run] < sealed) ++run;
    for (int first = 0; first < unit.group; first += kHeadsAPass) {
      IndexVec best[kHeadsAPass];
      EstimateHeads pass;
      pass.first = first;
      pass.count = std::min(kHeadsAPass, unit.group - first);
      pass.stride = stride;
      pass.best = best;
      for (int h = 0; h < pass.count; ++h) best[h] = hn::Set(df, -kInfinity);
      float* out = estimates + first * stride;
      switch (unit.index.format.key_bits) {
        case 2:
          estimate_range<2>(unit, query, pages, i, run, dots, out, pass);
          break;
        case 4:
          estimate_range<4>(unit, query, pages, i, run, dots, out, pass);
          break;
        default:
          estimate_range<8>(unit, query, pages, i, run, dots, out, pass);
      }
      for (int h = 0; h < pass.count; ++h) {
        row_max[first + h] = std::max(row_max[first + h], hn::GetLane(hn::MaxOfLanes(df, best[h])));
      }
    }
    i = run;
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_PAGES_INL_H_
