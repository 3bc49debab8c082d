#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "support/expect_error.h"
#include "support/safetensors_writer.h"
#include "support/temp_dir.h"

namespace twilight {
namespace {

using test::expect_error;
using test::safetensors_file;
using test::SafetensorsWriter;
using test::TempDir;

std::vector<SafetensorsEntry> parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "dir/m.safetensors");
}

void expect_bad(const std::string& file, std::initializer_list<std::string> parts) {
  expect_error(ErrorCode::kInvalidFile, {"[safetensors] dir/m.safetensors: "},
               [&] { (void)parse(file); });
  expect_error(ErrorCode::kInvalidFile, parts, [&] { (void)parse(file); });
}

// A header of one tensor `t` over `data_bytes` of data.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets,
                std::size_t data_bytes) {
  return safetensors_file(
      R"({"t":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
      std::string(data_bytes, '\0'));
}

TEST(Safetensors, ReadsEntriesInOrderOfPosition) {
  SafetensorsWriter writer;
  writer.add("z", "F32", {2, 3}, std::string(24, 'a'));
  writer.add("a", "BF16", {4}, std::string(8, 'b'));
  writer.add("scalar", "F16", {}, "xy");
  writer.add("none", "I64", {0, 7}, "");
  writer.add("ids", "I64", {1}, std::string(8, 'c'));
  writer.add("odd", "SOMETHING_NEW", {3}, "q");
  const std::string file = writer.file();
  const auto entries = parse(file);
  ASSERT_EQ(entries.size(), 6U);
  EXPECT_EQ(entries[0].name, "z");
  EXPECT_EQ(entries[0].dtype, DType::kF32);
  EXPECT_EQ(entries[0].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(entries[0].end - entries[0].begin, 24);
  EXPECT_EQ(entries[1].dtype, DType::kBf16);
  EXPECT_EQ(entries[2].dtype, DType::kF16);
  EXPECT_TRUE(entries[2].shape.empty());
  EXPECT_FALSE(entries[4].dtype.has_value());
  EXPECT_EQ(file.substr(static_cast<std::size_t>(entries[1].begin), 8), std::string(8, 'b'));
  EXPECT_EQ(entries[5].end, static_cast<std::int64_t>(file.size()));
}

TEST(Safetensors, AcceptsMetadataAndEmptyFiles) {
  EXPECT_TRUE(parse(safetensors_file("{}", "")).empty());
  EXPECT_TRUE(parse(safetensors_file(R"({"__metadata__":{"format":"pt"}}   )", "")).empty());
}

TEST(Safetensors, RejectsBadHeaderLength) {
  expect_bad("", {"size, got 0 bytes, accepted at least 8"});
  expect_bad("1234567", {"size, got 7 bytes"});
  expect_bad(std::string(8, '\xff') + "{}", {"header length, got 18446744073709551615 bytes"});
  expect_bad(std::string("\x01\xe1\xf5\x05\0\0\0\0", 8),
             {"header length, got 100000001 bytes", "accepted at most 100000000"});
  expect_bad(std::string("\x03\0\0\0\0\0\0\0{}", 10),
             {"header length, got 3 bytes, accepted at most 2"});
  expect_bad("version https://git-lfs.github.com/spec/v1\n", {"Git LFS pointer"});
}

TEST(Safetensors, RejectsBadHeaderText) {
  expect_bad(safetensors_file("", ""), {"accepted '{'"});
  expect_bad(safetensors_file(" {}", ""), {"got ' ' at its start"});
  expect_bad(safetensors_file("[]", ""), {"got '[' at its start"});
  expect_bad(safetensors_file("{", ""), {"not valid JSON"});
  expect_bad(safetensors_file("{}x", ""), {"not valid JSON"});
  expect_bad(safetensors_file("{\"a\n\":1}", ""), {"not valid JSON"});
  expect_bad(safetensors_file(R"({"t":5})", ""), {"tensor 't', got 5, accepted an object"});
  expect_bad(safetensors_file(R"({"t\n\u0007":[]})", ""), {R"(tensor 't\x0a\x07')"});
}

TEST(Safetensors, RejectsDuplicateNames) {
  const std::string tensor = R"("t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  expect_bad(safetensors_file('{' + tensor + ',' + tensor + '}', "1234"),
             {"key 't', got it twice"});
  expect_bad(safetensors_file(R"({"t":{"dtype":"F32","dtype":"F32"}})", ""),
             {"key 'dtype', got it twice"});
}

TEST(Safetensors, RejectsBadFields) {
  expect_bad(one("7", "[1]", "[0,4]", 4), {"tensor 't' dtype, got 7, accepted a string"});
  expect_bad(one("null", "[1]", "[0,4]", 4), {"tensor 't' dtype, got null"});
  expect_bad(safetensors_file(R"({"t":{"shape":[1],"data_offsets":[0,4]}})", "1234"),
             {"tensor 't' dtype, got nothing"});
  expect_bad(one("\"F32\"", "1", "[0,4]", 4), {"tensor 't' shape, got 1, accepted a list"});
  expect_bad(one("\"F32\"", "[-1]", "[0,4]", 4), {"tensor 't' shape, got [-1]"});
  expect_bad(one("\"F32\"", "[1.0]", "[0,4]", 4), {"tensor 't' shape, got [1.0]"});
  expect_bad(one("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]", 4), {"at most 8 sizes"});
  expect_bad(one("\"F32\"", "[1]", "[0]", 4), {"tensor 't' data_offsets, got [0]"});
  expect_bad(one("\"F32\"", "[1]", "[0,4,8]", 4), {"accepted a list of two offsets"});
  expect_bad(one("\"F32\"", "[1]", "[4,0]", 4), {"got [4,0], accepted begin no greater than end"});
  expect_bad(one("\"F32\"", "[1]", "[0,18446744073709551615]", 4), {"tensor 't' data_offsets"});
  expect_bad(one("\"F32\"", "[1]", "[-4,0]", 4), {"tensor 't' data_offsets, got [-4,0]"});
}

TEST(Safetensors, RejectsSizesThatDisagree) {
  expect_bad(one("\"F32\"", "[2]", "[0,4]", 4),
             {"tensor 't' data_offsets, got 4 bytes, accepted 2 elements of F32"});
  expect_bad(one("\"BF16\"", "[1]", "[0,4]", 4), {"got 4 bytes, accepted 1 elements of BF16"});
  expect_bad(one("\"I64\"", "[1]", "[0,4]", 4), {"accepted 1 elements of I64"});
  expect_bad(one("\"F4\"", "[3]", "[0,1]", 1), {"accepted 3 elements of F4"});
  expect_bad(one("\"F32\"", "[4294967296,4294967296]", "[0,4]", 4),
             {"more elements than 64 bits count"});
  expect_bad(one("\"F32\"", "[4611686018427387904]", "[0,4]", 4), {"got 4 bytes"});
}

TEST(Safetensors, RejectsBadRanges) {
  expect_bad(one("\"F32\"", "[2]", "[0,8]", 7),
             {"tensor 't' data_offsets, got [0,8], accepted offsets up to 7", "truncated"});
  expect_bad(one("\"F32\"", "[1]", "[1,5]", 5), {"tensor 't'", "a gap of 1 bytes"});
  expect_bad(one("\"F32\"", "[1]", "[0,4]", 6), {"size, got ", "where the last tensor ends"});
  const auto pair = [](const std::string& second) {
    return safetensors_file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                            R"("b":{"dtype":"F32","shape":[1],"data_offsets":)" +
                                second + "}}",
                            std::string(12, '\0'));
  };
  EXPECT_EQ(parse(pair("[8,12]")).size(), 2U);
  expect_bad(pair("[4,8]"), {"tensor 'b'", "overlaps 'a'"});
  expect_bad(pair("[7,11]"), {"tensor 'b'", "overlaps 'a'"});
  expect_bad(pair("[0,4]"), {"tensor 'a'", "overlaps 'b'"});
}

// Every truncation of a good file is an error, never a crash or a silent success.
TEST(Safetensors, RejectsEveryTruncation) {
  SafetensorsWriter writer;
  writer.add("a", "F32", {4}, std::string(16, 'a'));
  writer.add("b", "F16", {3}, std::string(6, 'b'));
  const std::string file = writer.file();
  for (std::size_t size = 0; size < file.size(); ++size) {
    SCOPED_TRACE(size);
    // A heap copy of the exact size, so that a sanitizer sees any read past its end.
    const std::vector<char> cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size));
    expect_error(ErrorCode::kInvalidFile, {"dir/m.safetensors"}, [&] {
      (void)parse_safetensors(std::as_bytes(std::span(cut)), "dir/m.safetensors");
    });
  }
}

TEST(SafetensorsIndex, ReadsAndRejects) {
  const auto index = parse_safetensors_index(
      R"({"metadata":{"total_size":1},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})",
      "i.json");
  EXPECT_EQ(index.at("b"), "2.safetensors");
  const auto bad = [](const std::string& text, const std::string& part) {
    expect_error(ErrorCode::kInvalidFile, {"[safetensors] i.json: ", part},
                 [&] { (void)parse_safetensors_index(text, "i.json"); });
  };
  bad("", "not valid JSON");
  bad("[]", "accepted an object");
  bad("{}", "weight_map, got nothing, accepted an object");
  bad(R"({"weight_map":[]})", "weight_map, got [], accepted an object");
  bad(R"({"weight_map":{"a":"x","a":"y"}})", "key 'a', got it twice");
  for (const char* shard : {"7", "null", R"("")", R"("../x")", R"("/etc/passwd")", R"("a/b")",
                            R"("..")", R"("a\u0000b")"}) {
    bad(std::string(R"({"weight_map":{"a":)") + shard + "}}", "weight_map entry 'a', got ");
  }
}

TEST(Checkpoint, MapsASingleFile) {
  SafetensorsWriter writer;
  const float values[2] = {1.5F, -2.0F};
  const std::string bytes(reinterpret_cast<const char*>(values), sizeof values);
  writer.add("w", "F32", {2}, bytes);
  writer.add("ids", "I32", {1}, "1234");
  const TempDir dir;
  const std::string path = dir.write("model.safetensors", writer.file());
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"ids", "w"}));
  EXPECT_EQ(checkpoint.path_of("w"), path);
  const TensorView view = checkpoint.tensor("w");
  EXPECT_TRUE(view);
  EXPECT_FALSE(TensorView{});
  EXPECT_EQ(view.elements(), 2);
  EXPECT_EQ(std::string_view(reinterpret_cast<const char*>(view.data), bytes.size()), bytes);
  expect_error(ErrorCode::kInvalidFile, {path, "tensor 'x', got nothing"},
               [&] { (void)checkpoint.tensor("x"); });
  expect_error(ErrorCode::kUnsupported,
               {path, "tensor 'ids' dtype, got 'I32', accepted F32, F16 or BF16"},
               [&] { (void)checkpoint.tensor("ids"); });
}

TEST(Checkpoint, ReportsAlignment) {
  SafetensorsWriter writer;
  writer.add("w", "F32", {1}, "1234");
  int aligned = 0;
  for (int padding = 0; padding < 4; ++padding) {
    const TempDir dir;
    dir.write("model.safetensors", writer.file(padding));
    const TensorView view = Checkpoint(dir.path()).tensor("w");
    EXPECT_EQ(view.is_aligned(), reinterpret_cast<std::uintptr_t>(view.data) % 4 == 0);
    aligned += view.is_aligned() ? 1 : 0;
  }
  EXPECT_EQ(aligned, 1);
}

TEST(Checkpoint, MapsShards) {
  SafetensorsWriter first;
  first.add("a", "F32", {1}, "aaaa");
  first.add("both", "F32", {1}, "1111");
  SafetensorsWriter second;
  second.add("both", "F32", {1}, "2222");
  const TempDir dir;
  dir.write("1.safetensors", first.file());
  dir.write("2.safetensors", second.file());
  dir.write("model.safetensors.index.json",
            R"({"weight_map":{"a":"1.safetensors","both":"2.safetensors"}})");
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.names().size(), 2U);
  EXPECT_EQ(std::memcmp(checkpoint.tensor("a").data, "aaaa", 4), 0);
  EXPECT_EQ(std::memcmp(checkpoint.tensor("both").data, "2222", 4), 0);
  EXPECT_EQ(checkpoint.path_of("both"), dir.path() + "/2.safetensors");
}

TEST(Checkpoint, RejectsBadFolders) {
  const TempDir dir;
  expect_error(ErrorCode::kNotFound, {dir.path(), "weights, got none, accepted model.safetensors"},
               [&] { (void)Checkpoint(dir.path()); });
  dir.write("pytorch_model.bin.index.json", "{}");
  expect_error(ErrorCode::kNotFound, {"only pytorch_model.bin", "convert it"},
               [&] { (void)Checkpoint(dir.path()); });
  dir.write("model.safetensors.index.json", R"({"weight_map":{"a":"1.safetensors"}})");
  expect_error(ErrorCode::kNotFound, {"shard '1.safetensors' of tensor 'a'"},
               [&] { (void)Checkpoint(dir.path()); });
  SafetensorsWriter other;
  other.add("b", "F32", {1}, "bbbb");
  dir.write("1.safetensors", other.file());
  expect_error(ErrorCode::kInvalidFile, {dir.path() + "/1.safetensors: tensor 'a', got nothing"},
               [&] { (void)Checkpoint(dir.path()); });
  dir.write("1.safetensors", other.file().substr(0, 20));
  expect_error(ErrorCode::kInvalidFile, {dir.path() + "/1.safetensors", "truncated"},
               [&] { (void)Checkpoint(dir.path()); });
  dir.write("model.safetensors", "");
  expect_error(ErrorCode::kInvalidFile, {dir.path() + "/model.safetensors: size, got 0 bytes"},
               [&] { (void)Checkpoint(dir.path()); });
}

}  // namespace
}  // namespace twilight
