#include "support/oracle_data.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/float16.h"

namespace twilight::test {
namespace {

using Json = nlohmann::json;

template <typename T>
T load(const std::string& bytes, std::size_t at) {
  require(at + sizeof(T) <= bytes.size(), "oracle", "file too short, got ", bytes.size(),
          " bytes, accepted more");
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  require(in.good(), "oracle", "cannot open ", path);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::map<std::string, OracleArray> load_arrays(const std::string& path, const Json& entries) {
  const std::string bytes = read_file(path);
  std::map<std::string, OracleArray> arrays;
  for (const Json& entry : entries) {
    OracleArray array;
    array.shape = entry.at("shape").get<std::vector<std::int64_t>>();
    std::size_t count = 1;
    for (const std::int64_t axis : array.shape) count *= static_cast<std::size_t>(axis);
    const std::string dtype = entry.at("dtype");
    std::size_t at = entry.at("offset");
    for (std::size_t i = 0; i < count; ++i) {
      if (dtype == "f32") {
        array.values.push_back(load<float>(bytes, at));
        at += 4;
      } else if (dtype == "i32") {
        array.values.push_back(load<std::int32_t>(bytes, at));
        at += 4;
      } else if (dtype == "bf16") {
        array.values.push_back(bf16_to_f32(load<std::uint16_t>(bytes, at)));
        at += 2;
      } else if (dtype == "u16") {
        array.values.push_back(load<std::uint16_t>(bytes, at));
        at += 2;
      } else {
        require(dtype == "u8", "oracle", "dtype, got ", dtype, ", accepted f32 i32 bf16 u16 u8");
        array.values.push_back(load<std::uint8_t>(bytes, at));
        at += 1;
      }
    }
    arrays[entry.at("name")] = std::move(array);
  }
  return arrays;
}

CasePolicy load_policy(const Json& policy) {
  CasePolicy out;
  const std::string select = policy.at("select");
  out.mode = select == "all"      ? SelectMode::kAll
             : select == "forced" ? SelectMode::kForcedOnly
                                  : SelectMode::kByScore;
  out.fraction = policy.at("fraction");
  out.min_candidate_tokens = policy.at("min_candidates");
  out.max_candidate_tokens = policy.at("max_candidates");
  out.forced = {.sink_tokens = policy.at("sink_tokens"), .recent_pages = policy.at("recent_pages")};
  const std::string criterion = policy.at("criterion");
  out.criterion = criterion == "none"         ? PruneCriterion::kNone
                  : criterion == "group_mean" ? PruneCriterion::kGroupMean
                                              : PruneCriterion::kPerHead;
  out.mass = policy.at("mass");
  out.mass_floor = policy.at("mass_floor");
  out.tail = policy.at("tail");
  out.far_tail = policy.at("far_tail");
  out.far_floor = policy.at("far_floor");
  out.min_tokens = policy.at("min_tokens");
  out.exact_keys = policy.at("key_bits") == 0;
  return out;
}

SummaryKind summary_of(const std::string& name) {
  if (name == "quest_bf16") return SummaryKind::kQuestBf16;
  if (name == "quest4") return SummaryKind::kQuest4;
  if (name == "centroid") return SummaryKind::kCentroid;
  if (name == "sub_centroid") return SummaryKind::kSubCentroid;
  require(name == "none", "oracle", "summary, got ", name,
          ", accepted quest_bf16 quest4 centroid sub_centroid none");
  return SummaryKind::kNone;
}

std::vector<float> row(const OracleArray& array, std::int64_t index, std::int64_t dim) {
  const auto begin = array.values.begin() + index * dim;
  return {begin, begin + dim};
}

}  // namespace

std::vector<OracleCase> load_oracle(const std::string& folder) {
  const Json manifest = Json::parse(read_file(folder + "/manifest.json"));
  std::vector<OracleCase> cases;
  for (const Json& entry : manifest.at("cases")) {
    OracleCase c;
    const Json& policy = entry.at("policy");
    for (const Json& data : manifest.at("data")) {
      if (data.at("name") != entry.at("data")) continue;
      const std::int32_t kv_heads = data.at("Hkv");
      c.op_case.shape.lengths = data.at("seq_lens").get<std::vector<std::int32_t>>();
      c.op_case.shape.num_kv_heads = kv_heads;
      c.op_case.shape.num_q_heads = kv_heads * data.at("G").get<std::int32_t>();
      c.op_case.shape.head_dim = data.at("D");
      c.op_case.shape.page_size = data.at("P");
      c.inputs = load_arrays(folder + "/" + data.at("file").get<std::string>(), data.at("arrays"));
    }
    require(!c.inputs.empty(), "oracle", "no data set ", entry.at("data").dump());
    c.op_case.name = entry.at("name");
    c.op_case.policy = load_policy(policy);
    c.op_case.shape.dtype = DType::kBf16;
    c.op_case.shape.format = {.summary = summary_of(policy.at("summary")),
                              .key_bits = policy.at("key_bits"),
                              .value_bits = c.op_case.policy.tail ? 4 : 0};
    c.op_case.options = {.shared_prefix_pages = 0, .row_padding = 3, .record_padding = 16};
    c.has_selector = policy.at("select") == "score";
    c.p = policy.at("p").get<std::vector<float>>();
    c.expected =
        load_arrays(folder + "/" + entry.at("file").get<std::string>(), entry.at("arrays"));
    cases.push_back(std::move(c));
  }
  return cases;
}

PagedFixture OracleCase::make_fixture() const {
  PagedFixture fixture(op_case.shape, op_case.options);
  const std::int64_t dim = op_case.shape.head_dim;
  const std::int64_t kv_heads = op_case.shape.num_kv_heads;
  std::int64_t token = 0;
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    for (std::int64_t t = 0; t < fixture.kv().seq_lens[seq]; ++t, ++token) {
      for (std::int64_t h = 0; h < kv_heads; ++h) {
        fixture.set_k(seq, t, h, row(inputs.at("k"), token * kv_heads + h, dim));
        fixture.set_v(seq, t, h, row(inputs.at("v"), token * kv_heads + h, dim));
      }
    }
    for (std::int64_t h = 0; h < op_case.shape.num_q_heads; ++h) {
      fixture.set_q(seq, h, row(inputs.at("q"), seq * op_case.shape.num_q_heads + h, dim));
    }
  }
  fixture.clear_index();
  fixture.seal();
  return fixture;
}

}  // namespace twilight::test
