#include "core/check.h"
#include "ops/field_checks.h"
#include "ops/validate.h"

namespace twilight {

void validate(const EmbedParams& params) {
  const FieldChecks check{"embed"};
  check.at_least("num_tokens", params.num_tokens, 0);
  check.at_least("table.rows", params.table.rows, 1);
  check.at_least("table.cols", params.table.cols, 1);
  require(!params.table.quantised(), check.op, "table.blocks, got ",
          weight_type_name(params.table.blocks), ", accepted F32, F16, BF16");
  check.dtype("table.dtype", params.table.dtype);
  if (params.num_tokens == 0) return;
  check.pointer("table.data", params.table.data);
  check.pointer("tokens", params.tokens);
  check.pointer("out", params.out);
}

void validate(const RotationParams& params) {
  const FieldChecks check{"rotation"};
  check.at_least("num_tokens", params.num_tokens, 0);
  check.in_range("half", params.half, 1, kMaxHeadDim / 2);
  if (params.num_tokens == 0) return;
  check.pointer("positions", params.positions);
  check.pointer("frequencies", params.frequencies);
  check.pointer("cos", params.cos);
  check.pointer("sin", params.sin);
}

void validate(const ArgmaxParams& params) {
  const FieldChecks check{"argmax"};
  check.at_least("num_rows", params.num_rows, 0);
  check.in_range("cols", params.cols, 1, 0x7fffffff);
  if (params.num_rows == 0) return;
  check.pointer("x", params.x);
  check.pointer("out", params.out);
}

void validate(const SampleRowsParams& params) {
  const FieldChecks check{"sample_rows"};
  check.at_least("num_rows", params.num_rows, 0);
  check.in_range("cols", params.cols, 1, 0x7fffffff);
  if (params.num_rows == 0) return;
  check.pointer("x", params.x);
  check.pointer("draws", params.draws);
  check.pointer("out", params.out);
}

void validate(const ProjectParams& params) {
  const FieldChecks check{"project"};
  validate(params.norm);
  for (const LinearParams* linear : {&params.q, &params.k, &params.v}) {
    validate(*linear);
    require(linear->num_rows == params.norm.num_rows && linear->weight.cols == params.norm.hidden &&
                linear->x == params.norm.y,
            check.op, "products of another matrix than norm.y, accepted its rows");
  }
  if (params.q_norm.weight != nullptr) validate(params.q_norm);
  if (params.k_norm.weight != nullptr) validate(params.k_norm);
  validate(params.q_rope);
  validate(params.k_rope);
  require(params.q_rope.x == params.q.y && params.k_rope.x == params.k.y, check.op,
          "rotation of other rows than q.y and k.y, accepted those");
}

void validate(const FeedForwardParams& params) {
  const FieldChecks check{"feed_forward"};
  validate(params.norm);
  validate(params.gate);
  validate(params.up);
  validate(params.down);
  const std::int64_t inner = params.gate.weight.rows;
  require(params.gate.num_rows == params.norm.num_rows &&
              params.up.num_rows == params.norm.num_rows &&
              params.down.num_rows == params.norm.num_rows && params.gate.x == params.norm.y &&
              params.up.x == params.norm.y && params.gate.weight.cols == params.norm.hidden &&
              params.up.weight.cols == params.norm.hidden,
          check.op, "products of another matrix than norm.y, accepted its rows");
  require(params.up.weight.rows == inner && params.down.weight.cols == inner &&
              params.gate.y_stride == inner && params.up.y_stride == inner &&
              params.down.x == params.gate.y && params.down.x_stride == inner,
          check.op, "gate, up and down of different inner sizes or rows that are not packed");
}

void validate(const AdvanceLayerParams& params) {
  const FieldChecks check{"advance_layer"};
  validate(params.out);
  validate(params.feed);
  const RmsNormParams& norm = params.feed.norm;
  for (const LinearParams* linear : {&params.out, &params.feed.down}) {
    require(linear->y == norm.x && linear->accumulate && linear->num_rows == norm.num_rows &&
                linear->weight.rows == norm.hidden && linear->y_stride == norm.hidden,
            check.op, "out and down that add to other rows than feed.norm.x, accepted those");
  }
  if (params.next == nullptr) {
    require(params.append == nullptr, check.op, "append without next, accepted with it");
    return;
  }
  validate(*params.next);
  require(params.next->norm.x == norm.x && params.next->norm.num_rows == norm.num_rows &&
              params.next->norm.hidden == norm.hidden,
          check.op, "next of other rows than feed.norm.x, accepted those");
  if (params.append == nullptr) return;
  const AppendKvParams& append = *params.append;
  const LinearParams& k = params.next->k;
  const LinearParams& v = params.next->v;
  validate(append);
  require(append.k == k.y && append.v == v.y && append.k_token_stride == k.y_stride &&
              append.v_token_stride == v.y_stride && append.num_tokens == k.num_rows &&
              std::int64_t{append.kv.num_kv_heads} * append.kv.head_dim == k.weight.rows &&
              v.weight.rows == k.weight.rows,
          check.op, "append of other rows than next.k and next.v, accepted those");
}

void validate(const CountTailParams& params) {
  const FieldChecks check{"count_tail"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  check.heads("num_q_heads", params.num_q_heads, params.kv);
  if (params.seqs.count == 0) return;
  check.lengths(params.seqs, params.kv);
  check.pointer("tail.mass", params.tail.mass);
  check.pointer("tail.pages", params.tail.pages);
  check.pointer("tail.page_counts", params.tail.page_counts);
  check.pointer("counts", params.counts);
  if (params.tail.log_masses != nullptr) check.pointer("tail.scores", params.tail.scores);
}

}  // namespace twilight
