#include "serve_flags.h"

#include <cctype>
#include <chrono>
#include <filesystem>

#include "paths.h"
#include "real_range.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

// The folder's name.
std::string default_id(const std::string& model) {
  std::filesystem::path path = std::filesystem::absolute(model).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  return path.filename().string();
}

}  // namespace

void ServeFlags::add_batching(CLI::App& command) {
  const std::string batching = "Batching";
  command.add_option("--ctx", context, "Longest sequence in tokens; 0: the model's")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 27))
      ->group(batching);
  command.add_option("--max-seqs", max_seqs, "Sequences decoded together")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096))
      ->group(batching);
  command
      .add_option("--cache-tokens", cache_tokens,
                  "Tokens the KV cache holds over all sequences, 0: 131072; a request that needs "
                  "more is refused")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber)
      ->group(batching);
  command.add_option("--max-queue", max_queue, "Requests that may wait; more get 429")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20))
      ->group(batching);
  command
      .add_option("--prefill-tokens", prefill_tokens, "Prompt tokens read between two decode steps")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20))
      ->group(batching);
  command.add_flag("--no-prefix-cache", no_prefix_cache, "Forget finished prompts at once")
      ->group(batching);
}

void ServeFlags::add(CLI::App& command) {
  common.add(command);
  attention.add(command);
  attention.add_model_profile(command);
  command.add_option("--model", model, "Checkpoint folder")->required();
  add_batching(command);
  const std::string group = "Server";
  command.add_option("--host", server.http.host, "Address to listen on; 0.0.0.0 is everyone's")
      ->capture_default_str()
      ->group(group);
  command.add_option("--port", server.http.port, "Port; 0 takes a free one")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535))
      ->group(group);
  command
      .add_option("--model-id", model_id, "Name of the model for clients; default: the folder's")
      ->group(group);
  auto* key = command.add_option("--api-key", api_key, "Clients must send this key")->group(group);
  command
      .add_option("--api-key-file", api_key_file,
                  "The key in a file, so that it does not show among the processes")
      ->excludes(key)
      ->group(group);
  command
      .add_option("--max-connections", server.http.max_connections,
                  "Connections at once, a thread each; more get 503")
      ->capture_default_str()
      ->check(CLI::Range(1, 8192))
      ->group(group);
  command.add_option("--max-body", max_body_mib, "Largest request body, MiB")
      ->capture_default_str()
      ->check(real_range(0.001, 1024.0))
      ->group(group);
  command.add_option("--max-prompt", server.max_prompt, "Longest prompt in tokens; 0: the context")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 27))
      ->group(group);
  command.add_option("--max-choices", server.max_choices, "Prompts times n of one request")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536))
      ->group(group);
  command.add_option("--rate", server.rate, "Requests a second of one address; 0: any number")
      ->capture_default_str()
      ->check(real_range(0.0, 1e6))
      ->group(group);
  command.add_option("--burst", server.burst, "Requests an address may send at once, with --rate")
      ->capture_default_str()
      ->check(real_range(1.0, 1e6))
      ->group(group);
  command.add_option("--timeout", timeout, "Seconds a request may take in all; 0: any")
      ->capture_default_str()
      ->check(real_range(0.0, 1e6))
      ->group(group);
  command.add_option("--read-timeout", read_timeout, "Seconds for a whole request to arrive")
      ->capture_default_str()
      ->check(real_range(0.1, 1e6))
      ->group(group);
  command
      .add_option("--write-timeout", write_timeout, "Seconds a client may leave a response untaken")
      ->capture_default_str()
      ->check(real_range(0.1, 1e6))
      ->group(group);
  command
      .add_option("--stream-buffer", server.stream_events,
                  "Events a streaming client may lie behind before its request is ended")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->group(group);
}

server::SchedulerOptions ServeFlags::scheduler_options() const {
  constexpr std::int64_t kDefaultCacheTokens = 131072;
  server::SchedulerOptions options;
  options.engine.policy = attention.policy();
  options.engine.page_size = attention.page_size();
  options.engine.max_context = context;
  options.engine.max_seqs = max_seqs;
  options.engine.cache_tokens = cache_tokens > 0 ? cache_tokens : kDefaultCacheTokens;
  options.max_queue = max_queue;
  options.prefill_tokens_per_step = prefill_tokens;
  options.prefix_cache = !no_prefix_cache;
  return options;
}

server::ServerOptions ServeFlags::server_options() const {
  server::ServerOptions options = server;
  options.version = TWILIGHT_VERSION;
  options.model_id = model_id.empty() ? default_id(model) : model_id;
  options.api_key = api_key;
  if (!api_key_file.empty()) {
    options.api_key = read_text(api_key_file);
    while (!options.api_key.empty() &&
           std::isspace(static_cast<unsigned char>(options.api_key.back())) != 0) {
      options.api_key.pop_back();
    }
    if (options.api_key.empty()) {
      throw Error(ErrorCode::kInvalidArgument, "[--api-key-file] the file has no key, got " +
                                                   api_key_file +
                                                   ", accepted at least one character");
    }
  }
  options.max_body = static_cast<std::size_t>(max_body_mib * (1 << 20));
  options.timeout = milliseconds(timeout);
  options.http.limits.read = milliseconds(read_timeout);
  options.http.limits.write = milliseconds(write_timeout);
  return options;
}

}  // namespace twilight::app
