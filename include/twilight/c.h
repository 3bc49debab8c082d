#ifndef TWILIGHT_C_H_
#define TWILIGHT_C_H_

#include <stddef.h>
#include <stdint.h>

#include "twilight/export.h"

/* C11 interface for engines that own their KV memory: raw pointers, explicit strides, the caller's
 * workspace. Axes: B sequences, T tokens, Hq / Hkv query / KV heads, D head dimension, P tokens of
 * a page, N tokens of a sequence.
 *
 * Order of calls. Once: twl_context_create, twl_policy_init, twl_index_record_bytes (how much
 * memory the key index takes), twl_plan_create, twl_plan_workspace_bytes. Each step and layer:
 * twl_append for the new tokens, twl_seal for the pages they filled, then twl_decode.
 *
 * Structs start with `struct_size`: set it to sizeof of the struct and every field that is not used
 * to zero, e.g. `twl_decode_args args = {.struct_size = sizeof args};`. A library that is older
 * than the caller refuses (TWL_UNSUPPORTED) fields it does not know unless they are zero.
 *
 * Pointers are borrowed for the call only, and are host memory. Nothing throws, prints or aborts.
 * One call at a time per context, its plans included: threads that want to work side by side
 * use a context each. */

/* NOLINTBEGIN(readability-identifier-naming, modernize-use-using, modernize-deprecated-headers) */

#ifdef __cplusplus
extern "C" {
#endif

/* --- status ----------------------------------------------------------------------------------- */

typedef enum twl_status {
  TWL_OK = 0,
  TWL_INVALID_ARGUMENT = 1, /* a value passed is outside what is accepted */
  TWL_INVALID_FILE = 2,     /* a file is malformed, truncated or inconsistent */
  TWL_NOT_FOUND = 3,        /* a file or name does not exist */
  TWL_IO = 4,               /* the system could not read or write */
  TWL_UNSUPPORTED = 5,      /* valid, but this build, machine or version cannot do it */
  TWL_OUT_OF_MEMORY = 6,    /* the system has no room left */
  TWL_INTERNAL = 7          /* a bug in this library */
} twl_status;

/* "ok", "invalid argument", ...; "unknown status" for a number that is none. Static text. */
TWILIGHT_API const char* twl_status_name(twl_status status);

/* One line on the last call of this thread that failed: `[where] what, got VALUE, accepted SET`; ""
 * before any has. Cut at 1,023 bytes. Stays as it is when calls succeed; the memory belongs to the
 * library and to this thread. */
TWILIGHT_API const char* twl_last_error(void);

/* --- context ---------------------------------------------------------------------------------- */

/* Threads and kernels. Opaque; made by twl_context_create. */
typedef struct twl_context twl_context;

typedef struct twl_context_options {
  size_t struct_size;
  const char* device; /* "cpu", "ref" (scalar reference, slow), "cuda:N"; NULL is "cpu" */
  const char* isa;    /* instruction set of the CPU kernels by name, or "auto"; NULL is "auto" */
  int32_t threads;    /* 1 to 1024; 0 takes the processors this process may use */
} twl_context_options;

/* `options` may be NULL for all defaults. On success *context is the caller's, to be given to
 * twl_context_destroy; on failure it is NULL. Thread-safe. */
TWILIGHT_API twl_status twl_context_create(const twl_context_options* options,
                                           twl_context** context);

/* Plans made from it stay valid (they share its threads). NULL is ignored. */
TWILIGHT_API void twl_context_destroy(twl_context* context);

/* --- policy and key index --------------------------------------------------------------------- */

/* "double_sparsity" of policy.h has no number: its channels have no place in twl_policy. */
enum twl_selector {
  TWL_SELECTOR_DENSE = 0,       /* attends to everything */
  TWL_SELECTOR_FULL = 1,        /* every page is a candidate */
  TWL_SELECTOR_QUEST = 2,       /* pages ranked by min / max bounds */
  TWL_SELECTOR_STREAMING = 3,   /* first and recent tokens alone */
  TWL_SELECTOR_ORACLE = 4,      /* true weights, reads every key: for studies */
  TWL_SELECTOR_CENTROID = 5,    /* pages ranked by estimated mass: mean and most deviant key */
  TWL_SELECTOR_SUB_CENTROID = 6, /* the same from means of quarter pages */
  TWL_SELECTOR_HALF_CENTROID = 7 /* of half pages */
};

enum twl_criterion {
  TWL_CRITERION_PER_HEAD = 0,  /* top-p set of each query head, union over the group */
  TWL_CRITERION_GROUP_MEAN = 1 /* top-p set of the mean of the group's weights */
};

/* How decode chooses tokens. Same fields, ranges and meanings as SparsePolicy in policy.h. */
typedef struct twl_policy {
  size_t struct_size;
  int32_t selector; /* enum twl_selector */
  int32_t prune;    /* 1: top-p set of the candidates; 0: all candidates */
  /* Candidates: clamp(ceil(fraction * N), min, max) tokens, rounded up to pages. */
  double candidate_fraction; /* 0 to 1 */
  int32_t min_candidates;
  int32_t max_candidates;
  float p;              /* attention mass to keep, above 0 to 1 */
  int32_t min_tokens;   /* fewest tokens a query head keeps */
  const float* layer_p; /* [layer_p_count] p of single layers, or NULL; copied where it is used */
  int32_t layer_p_count;
  int32_t key_bits;           /* key estimates: 2, 4, 8, or 16 for the keys themselves */
  int32_t summary_bits;       /* Quest bounds: 16 or 4 */
  int32_t sink_tokens;        /* first tokens, always attended */
  int32_t recent_pages;       /* last full pages, always attended, with the open page */
  int32_t dense_layers;       /* layers from the bottom that stay dense */
  int32_t dense_below_tokens; /* sequences up to this N stay dense; -1 is 0 */
  /* End of the first version; a shorter struct reads as zeros from here on. */
  double candidate_mass; /* stop at this share of the mass, 0 to below 1; the two centroid
                            selectors; 0: the whole budget */
  int32_t criterion;     /* enum twl_criterion */
  int32_t tail;          /* 1: dropped candidates count by their page's mean value */
  int32_t far_tail;      /* 1: so do pages outside the candidates; tail and a centroid selector */
  float far_floor;       /* ... whose share is at least this multiple of the mean page's */
} twl_policy;

/* Fills *policy with a preset: "dense", "adaptive", "paper", "paper-full", "quest:K", "streaming".
 * policy->struct_size must be set; TWL_UNSUPPORTED where it is too small for what the preset sets.
 * Thread-safe. */
TWILIGHT_API twl_status twl_policy_init(const char* preset, twl_policy* policy);

/* Index records of one layer: planes of one record per (page, KV head), at
 * base + page * page_stride + head * head_stride, all in bytes. Bases are 16-byte aligned, strides
 * multiples of 16. A record is a pure function of the keys and values of its page: copying a page
 * copies its records. Contexts of other devices may order the bytes of an estimate otherwise: seal
 * and decode a page on the same kind of device. */
typedef struct twl_index_view {
  size_t struct_size;
  int32_t summary;  /* format of the planes: set by twl_index_view_init */
  int32_t key_bits; /* likewise */
  void* summaries;  /* NULL where the policy has none (summary_bytes is 0) */
  int64_t summary_page_stride;
  int64_t summary_head_stride;
  void* estimates; /* NULL where the policy has none (estimate_bytes is 0) */
  int64_t estimate_page_stride;
  int64_t estimate_head_stride;
  /* End of the first version. */
  int32_t value_bits; /* set by twl_index_view_init */
  int32_t reserved;   /* zero */
  void* value_means;  /* mean values, for the tail; NULL where the policy has none */
  int64_t value_mean_page_stride;
  int64_t value_mean_head_stride;
  void* params; /* scales of the other planes; NULL where the policy has none */
  int64_t params_page_stride;
  int64_t params_head_stride;
} twl_index_view;

/* Bytes of the records of one (page, KV head), multiples of 16, 0 for a plane the policy does not
 * read. */
typedef struct twl_index_bytes {
  size_t struct_size;
  size_t summary;
  size_t estimate;
  size_t value_mean;
  size_t params;
} twl_index_bytes;

/* Fills *bytes. P from 1 to 256, D from 1 to 512; bytes->struct_size must be set. Thread-safe. */
TWILIGHT_API twl_status twl_index_record_bytes(const twl_policy* policy, int32_t page_size,
                                               int32_t head_dim, twl_index_bytes* bytes);

/* The first two of them alone; TWL_UNSUPPORTED for a policy that reads the others. */
TWILIGHT_API twl_status twl_index_sizes(const twl_policy* policy, int32_t page_size,
                                        int32_t head_dim, size_t* summary_bytes,
                                        size_t* estimate_bytes);

/* Sets the format of the view to what the policy reads and zeroes its pointers and strides.
 * view->struct_size must be set; TWL_UNSUPPORTED where it is too small for the policy's planes.
 * Thread-safe. */
TWILIGHT_API twl_status twl_index_view_init(const twl_policy* policy, twl_index_view* view);

/* --- cache ------------------------------------------------------------------------------------ */

enum twl_dtype { TWL_F32 = 0, TWL_F16 = 1, TWL_BF16 = 2 };

/* K or V of one layer. Element (page, head, slot, d) is at
 * page * page_stride + head * head_stride + slot * token_stride + d, in elements; strides of axes
 * longer than 1 are at least D. This struct never grows. */
typedef struct twl_plane {
  void* data; /* aligned to its element */
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
} twl_plane;

/* The paged caches of B sequences in one layer. A page holds P consecutive tokens of a sequence. */
typedef struct twl_kv_view {
  size_t struct_size;
  int32_t dtype; /* enum twl_dtype, of K and V */
  int32_t num_seqs;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size; /* 1 to 256 */
  int32_t num_pages; /* physical pages of the planes; page numbers are checked against it */
  twl_plane k;
  twl_plane v;
  const int32_t* block_table; /* [B, block_table_stride] physical pages in the order of tokens */
  int64_t block_table_stride;
  const int32_t* seq_lens; /* [B] N, the tokens being decoded included */
} twl_kv_view;

typedef struct twl_append_args {
  size_t struct_size;
  const twl_kv_view* kv; /* block_table and seq_lens are not read */
  const float* keys;     /* [T, Hkv, D], heads packed, rotary embedding applied */
  const float* values;   /* [T, Hkv, D] */
  int64_t key_token_stride;
  int64_t value_token_stride;
  const int64_t* slots; /* [T] physical page * P + offset in the page; negative skips the token */
  int32_t num_tokens;
} twl_append_args;

/* Writes keys and values to their slots, rounded to the cache's dtype. Allocates nothing. */
TWILIGHT_API twl_status twl_append(twl_context* context, const twl_append_args* args);

typedef struct twl_seal_args {
  size_t struct_size;
  const twl_kv_view* kv; /* block_table and seq_lens are not read */
  const twl_index_view* index;
  const int32_t* pages; /* [num_pages] physical numbers of full pages */
  int32_t num_pages;
} twl_seal_args;

/* Computes the index records of full pages; needed once when a page fills, and again whenever its
 * keys or values change. Allocates nothing. */
TWILIGHT_API twl_status twl_seal(twl_context* context, const twl_seal_args* args);

/* --- decode ----------------------------------------------------------------------------------- */

/* Upper bounds of the steps a plan will run. */
typedef struct twl_plan_shape {
  size_t struct_size;
  int32_t max_seqs;     /* B, up to 65536 */
  int32_t num_q_heads;  /* Hq, a multiple of Hkv, up to 1024 */
  int32_t num_kv_heads; /* Hkv */
  int32_t head_dim;     /* D; the CPU kernels take multiples of 16 up to 512 */
  int32_t page_size;    /* P */
  int32_t max_tokens;   /* longest N, up to 2^30 */
  int32_t kv_dtype;     /* enum twl_dtype */
} twl_plan_shape;

/* A policy made ready for one shape. Opaque; made by twl_plan_create. */
typedef struct twl_plan twl_plan;

/* Checks policy and shape against what the context's kernels can do. On success *plan is the
 * caller's, to be given to twl_plan_destroy; on failure it is NULL. */
TWILIGHT_API twl_status twl_plan_create(twl_context* context, const twl_policy* policy,
                                        const twl_plan_shape* shape, twl_plan** plan);

/* NULL is ignored. */
TWILIGHT_API void twl_plan_destroy(twl_plan* plan);

/* Bytes of workspace twl_decode needs; 0 for NULL. Does not change during the plan's life. */
TWILIGHT_API size_t twl_plan_workspace_bytes(const twl_plan* plan);

enum twl_path {
  TWL_PATH_SPARSE = 0,
  TWL_PATH_DENSE_POLICY = 1,     /* the policy is dense */
  TWL_PATH_DENSE_LAYER = 2,      /* one of the first dense_layers layers */
  TWL_PATH_DENSE_SHORT = 3,      /* at most dense_below_tokens tokens */
  TWL_PATH_DENSE_ALL_FORCED = 4, /* every token is always attended anyway */
  TWL_PATH_DENSE_FULL_MASS = 5   /* p = 1 over all tokens */
};

/* What one sequence did in one layer. On a dense path counts are N and the mass is 1. */
typedef struct twl_seq_stats {
  size_t struct_size;
  int32_t path;               /* enum twl_path */
  int32_t num_tokens;         /* N */
  double candidates_mean;     /* candidate tokens, mean over KV heads */
  double attended_mean;       /* distinct tokens attended, mean over KV heads */
  double kept_mean;           /* tokens in a query head's own set, mean over query heads */
  double estimated_mass_mean; /* estimated share of the candidates' mass attended, likewise */
  int64_t bytes_read;         /* of index and K and V */
  int64_t bytes_dense;        /* what dense attention reads */
} twl_seq_stats;

typedef struct twl_decode_args {
  size_t struct_size;
  const twl_kv_view* kv;       /* shape and dtype of the plan, B up to max_seqs */
  const twl_index_view* index; /* NULL where the plan's policy reads no plane */
  int32_t layer;               /* from 0; decides dense_layers and layer_p */
  const float* queries;        /* [B, Hq, D] at seq * query_seq_stride + head * D + d */
  int64_t query_seq_stride;
  const float* p; /* [B] in (0, 1], or NULL for the policy's */
  float* out;     /* [B, Hq, D] at seq * out_seq_stride + head * D + d */
  int64_t out_seq_stride;
} twl_decode_args;

/* Attention of one query token per sequence, scores scaled by 1 / sqrt(D). N = 0 gives zeros.
 * `workspace`: at least twl_plan_workspace_bytes, 64-byte aligned, contents of no meaning between
 * calls. `stats`: NULL, or B entries that the call fills; stats[0].struct_size must be set and is
 * the size of every entry. Allocates nothing. */
TWILIGHT_API twl_status twl_decode(twl_plan* plan, const twl_decode_args* args, void* workspace,
                                   size_t workspace_bytes, twl_seq_stats* stats);

typedef struct twl_prefill_args {
  size_t struct_size;
  const twl_kv_view* kv; /* B = 1, the T tokens written already: N >= T */
  const float* queries;  /* [T, Hq, D] at token * query_token_stride + head * D + d */
  int64_t query_token_stride;
  int32_t num_q_heads;
  int32_t num_tokens; /* T; token i sees positions 0 .. N - T + i */
  float* out;         /* [T, Hq, D] */
  int64_t out_token_stride;
  int32_t full_precision; /* 1: f32 products where the kernels would use bf16 */
} twl_prefill_args;

/* Dense causal attention of the last T tokens of one sequence. Unlike the decode calls it may
 * allocate. */
TWILIGHT_API twl_status twl_attend_prefill(twl_context* context, const twl_prefill_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* NOLINTEND(readability-identifier-naming, modernize-use-using, modernize-deprecated-headers) */

#endif /* TWILIGHT_C_H_ */
