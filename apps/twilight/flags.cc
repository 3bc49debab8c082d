#include "flags.h"

#include <charconv>
#include <cmath>
#include <cstdio>

#include "profile.h"
#include "progress.h"
#include "twilight/error.h"

namespace twilight::app {

namespace {

bool names_profile(const std::string& list) {
  return ("," + list + ",").find(",profile,") != std::string::npos;
}

}  // namespace

void CommonFlags::add(CLI::App& command) {
  command.add_flag("--json", json, "Print one JSON object to standard output instead of text");
  command.add_option("--threads", device.threads, "Worker threads; 0 takes all processors")
      ->capture_default_str();
  command
      .add_option("--isa", device.isa,
                  "Instruction set: auto, scalar, avx2, avx512, avx512_bf16, neon")
      ->capture_default_str();
  command.add_option("--device", device.device, "cpu, ref (scalar reference) or cuda:N")
      ->capture_default_str();
}

void AttentionFlags::add(CLI::App& command) {
  const std::string group = "Attention";
  attention_option_ =
      command
          .add_option("--attention", attention,
                      "Preset: dense, adaptive, paper, paper-full, quest:K, streaming")
          ->capture_default_str()
          ->group(group);
  command.add_option("--attn-p", p, "Attention mass to keep, above 0 to 1")->group(group);
  command
      .add_option("--candidates", candidates,
                  "Candidate budget: a share of the context up to 1, or a number of tokens")
      ->group(group);
  command.add_option("--min-candidates", min_candidates, "Smallest candidate budget, tokens")
      ->group(group);
  command.add_option("--max-candidates", max_candidates, "Largest candidate budget, tokens")
      ->group(group);
  command.add_option("--min-tokens", min_tokens, "Fewest tokens a head keeps")->group(group);
  command.add_option("--sinks", sinks, "First tokens that are always attended")->group(group);
  command.add_option("--recent", recent, "Last full pages that are always attended")->group(group);
  command.add_option("--dense-layers", dense_layers, "Layers from the bottom that stay dense")
      ->group(group);
  command
      .add_option("--dense-below", dense_below,
                  "Contexts up to this many tokens stay dense; auto measures it on this machine")
      ->group(group);
  command
      .add_option(
          "--selector", selector,
          "Candidate pages: full, quest, centroid, half_centroid, sub_centroid, streaming, oracle, "
          "or double_sparsity with a profile of calibrate --labels")
      ->group(group);
  command
      .add_option("--candidate-mass", candidate_mass,
                  "Stop taking candidates at this estimated mass, below 1; 0: the whole budget")
      ->group(group);
  command
      .add_option("--criterion", criterion,
                  "per_head (top-p a head, union) or group_mean (top-p of the group's mean)")
      ->group(group);
  command
      .add_option("--tail", tail,
                  "Pages that pruning drops count by their mean value: off, on, or far for pages "
                  "outside the candidates too")
      ->check(CLI::IsMember({"off", "on", "far"}))
      ->group(group);
  command
      .add_option("--far-floor", far_floor,
                  "Far pages are left out below this multiple of the mean page's share")
      ->group(group);
  command
      .add_option("--key-bits", key_bits, "Bits of key estimates: 2, 4, 8, or 16 for exact keys")
      ->group(group);
  command.add_option("--summary-bits", summary_bits, "Bits of page summaries: 16 or 4")
      ->group(group);
  command.add_option("--page-size", page_tokens, "Tokens per page, 1 to 256")
      ->default_str("16, or the profile's")
      ->group(group);
  command
      .add_option("--profile", profile,
                  "Take the policy from this file, made by calibrate; none: from no file")
      ->excludes(command.get_option("--attention"))
      ->group(group);
}

void AttentionFlags::add_model_profile(CLI::App& command) {
  command.get_option("--profile")
      ->description(
          "Take the policy from this file, made by calibrate; without it and --attention from the "
          "one that lies with the model, if any: twilight.json in its folder or "
          "FILE.gguf.twilight.json; none: from no file");
}

// A file that the user did not name is one that the user can do without.
void AttentionFlags::rethrow(const Error& error) const {
  throw Error(error.code(),
              std::string(error.what()) + (found_ ? "; --profile none goes without it" : ""));
}

const Profile& AttentionFlags::loaded() const {
  if (!loaded_) loaded_ = read_profile(profile);
  return *loaded_;
}

void AttentionFlags::settle(const std::string& model) {
  const bool listed = attention_option_->count() > 0;
  const bool by_name = names_profile(attention);
  if (profile.empty() && (!listed || by_name)) {
    profile = find_model_profile(model);
    found_ = !profile.empty();
    if (by_name && !found_) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[--attention] preset profile, got none beside " + model +
                      ", accepted with --profile FILE or a profile that lies with the model");
    }
  }
  if (!found_) return;
  try {
    (void)loaded();
  } catch (const Error& error) {
    rethrow(error);
  }
}

std::string AttentionFlags::list() const {
  if (!has_profile()) return attention;
  if (attention_option_->count() == 0) return "profile";
  if (!names_profile(attention)) {
    throw Error(ErrorCode::kInvalidArgument,
                "[--profile] profile beside --attention, got a list without it, accepted a list "
                "with 'profile' in it, or no --attention");
  }
  return attention;
}

void AttentionFlags::announce(const CommonFlags& common) const {
  if (!found_ || common.json || attention_option_->count() > 0) return;
  std::fprintf(stderr, "Attention from %s: %s (--profile none: the preset %s)\n", profile.c_str(),
               profile_line(policy("profile")).c_str(), kDefaultPreset);
}

std::int32_t AttentionFlags::page_size() const {
  if (page_tokens) return *page_tokens;
  return has_profile() ? loaded().page_size : EngineOptions().page_size;
}

void AttentionFlags::check_model(const ModelInfo& info) const {
  if (!has_profile()) return;
  try {
    check_profile(profile, loaded(), info, page_size());
  } catch (const Error& error) {
    rethrow(error);
  }
}

SparsePolicy AttentionFlags::policy(const std::string& preset) const {
  const bool from_profile = preset == "profile" && has_profile();
  SparsePolicy policy = from_profile ? loaded().policy : make_policy(preset);
  if (p) {
    policy.p = static_cast<float>(*p);
    policy.layer_p.clear();
  }
  if (candidates) {
    if (!(std::isfinite(*candidates) && *candidates > 0 && *candidates <= (1 << 30))) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[--candidates] candidate budget, got " + std::to_string(*candidates) +
                      ", accepted a share above 0 to 1, or a number of tokens");
    }
    if (*candidates <= 1) {
      policy.candidate_fraction = *candidates;
    } else {
      policy.candidate_fraction = 0;
      policy.min_candidates = policy.max_candidates = static_cast<std::int32_t>(*candidates);
    }
  }
  if (min_candidates) policy.min_candidates = *min_candidates;
  if (max_candidates) policy.max_candidates = *max_candidates;
  if (min_tokens) policy.min_tokens = *min_tokens;
  if (sinks) policy.sink_tokens = *sinks;
  if (recent) policy.recent_pages = *recent;
  if (dense_layers) policy.dense_layers = *dense_layers;
  if (selector && !policy.is_dense()) policy.selector = *selector;
  if (candidate_mass) policy.candidate_mass = *candidate_mass;
  if (criterion) policy.criterion = *criterion;
  if (tail) {
    policy.tail = *tail != "off";
    policy.far_tail = *tail == "far";
  }
  if (far_floor) policy.far_floor = static_cast<float>(*far_floor);
  if (key_bits) policy.key_bits = *key_bits;
  if (summary_bits) policy.summary_bits = *summary_bits;
  if (dense_below && *dense_below != "auto") {
    std::int32_t tokens = 0;
    const char* end = dense_below->data() + dense_below->size();
    const auto [stop, error] = std::from_chars(dense_below->data(), end, tokens);
    if (error != std::errc() || stop != end || tokens < 0) {
      throw Error(ErrorCode::kInvalidArgument, "[--dense-below] number of tokens, got '" +
                                                   *dense_below + "', accepted auto, 0 or more");
    }
    policy.dense_below_tokens = tokens;
  }
  SparsePolicy checked = policy;
  if (checked.is_dense()) {  // so a bad --attn-p is refused there too
    checked.selector = selector && *selector != "dense" ? *selector : "full";
    if (!tail) checked.tail = false;
  }
  validate_policy(checked);
  return policy;
}

void SamplingFlags::add(CLI::App& command) {
  const std::string group = "Sampling";
  command.add_option("--temperature", options.temperature, "0 takes the likeliest token")
      ->capture_default_str()
      ->group(group);
  command.add_option("--top-k", options.top_k, "Sample from the k likeliest tokens; 0: off")
      ->capture_default_str()
      ->group(group);
  command.add_option("--top-p", options.top_p, "Nucleus of the sampler; 1: off")
      ->capture_default_str()
      ->group(group);
  command.add_option("--seed", options.seed, "Seed of the sampler")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber)
      ->group(group);
}

Model load_model(const std::string& directory, const CommonFlags& flags) {
  ProgressBar bar("Loading " + directory, "", !flags.json);
  return Model::load(directory, bar.callback());
}

Model load_model(const std::string& directory, const CommonFlags& flags,
                 const AttentionFlags& attention) {
  Model model = load_model(directory, flags);
  attention.check_model(model.info());
  return model;
}

}  // namespace twilight::app
