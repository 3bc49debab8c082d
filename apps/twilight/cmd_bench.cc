#include <memory>

#include "bench_decode.h"
#include "bench_op.h"
#include "bench_serve.h"
#include "commands.h"
#include "paths.h"
#include "real_range.h"

namespace twilight::app {
namespace {

void add_op(CLI::App& bench, Action& action) {
  auto flags = std::make_shared<OpFlags>();
  CLI::App* command = bench.add_subcommand("op", "Time one attention layer at a decode step");
  command->footer(
      "Dense attention and every preset run in turn over the same distinct memory, caches cold.\n"
      "The label channels of double_sparsity are those of a model's layer: --from-model with\n"
      "--attention paper,profile --profile FILE, FILE from calibrate --labels.\n"
      "Example: twilight bench op --batch 8 --ctx 32768 --attention paper,quest:2048\n"
      "Example: twilight bench op --from-model models/vesper-19m --text data/Persuasion.txt "
      "--ctx 16384");
  flags->bench.add(*command);
  // One layer that always runs the policy.
  command->remove_option(command->get_option("--dense-layers"));
  command->remove_option(command->get_option("--dense-below"));
  const std::string group = "Data";
  command->add_option("--batch", flags->batch, "Sequences, B")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536))
      ->group(group);
  command->add_option("--ctx", flags->context, "Tokens of each sequence, N")
      ->capture_default_str()
      ->check(CLI::Range(64, 1 << 27))
      ->group(group);
  auto* heads = command->add_option("--heads", flags->shape.num_q_heads, "Query heads, Hq")
                    ->capture_default_str()
                    ->check(CLI::Range(1, 4096))
                    ->group(group);
  auto* kv_heads = command->add_option("--kv-heads", flags->shape.num_kv_heads, "KV heads, Hkv")
                       ->capture_default_str()
                       ->check(CLI::Range(1, 4096))
                       ->group(group);
  auto* head_dim = command->add_option("--head-dim", flags->shape.head_dim, "Head dimension, D")
                       ->capture_default_str()
                       ->check(CLI::Range(1, 512))
                       ->group(group);
  command->add_option("--dtype", flags->dtype, "Type of cached keys and values: bf16, f16, f32")
      ->capture_default_str()
      ->group(group);
  auto* budget = command
                     ->add_option("--budget", flags->budget,
                                  "Mean size of the planted p = 0.95 sets, as a share of N")
                     ->capture_default_str()
                     ->check(real_range(1e-6, 0.25))
                     ->group(group);
  auto* seed = command->add_option("--seed", flags->seed, "Seed of the planted keys")
                   ->capture_default_str()
                   ->group(group);
  command
      ->add_option("--from-model", flags->model,
                   "Take keys, values and queries from this checkpoint reading --text instead")
      ->excludes(heads, kv_heads, head_dim, budget, seed)
      ->group(group);
  command->add_option("--text", flags->text, "Text for --from-model; default: the bundled novel")
      ->group(group);
  command->add_option("--layer", flags->layer, "Layer for --from-model; default: the middle one")
      ->check(CLI::Range(0, 4096))
      ->group(group);
  command->add_option("--repeats", flags->repeats, "Timed rounds")
      ->capture_default_str()
      ->check(CLI::Range(1, 100000));
  command->callback([flags, &action] { action = [flags] { return run_bench_op(*flags); }; });
}

void add_decode(CLI::App& bench, Action& action) {
  auto flags = std::make_shared<DecodeFlags>();
  CLI::App* command = bench.add_subcommand("decode", "Time whole decode steps of a model");
  command->footer(
      "One prefill, then greedy decoding of copies of that sequence, dense and under every preset "
      "in turn.\n"
      "Example: twilight bench decode --ctx 16384 --tokens 64 --attention paper,paper-full");
  flags->bench.add(*command);
  flags->bench.attention.add_model_profile(*command);
  command->add_option("--model", flags->model,
                      "Checkpoint folder or GGUF file; default: the bundled model");
  command->add_option("--text", flags->text, "Text to read first; default: the bundled novel");
  command->add_option("--ctx", flags->context, "Tokens of the text to read")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 27));
  command
      ->add_option("--batch", flags->batch,
                   "Sequences decoded at once: copies of the prompt's, in memory of their own")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command->add_option("--tokens", flags->tokens, "Tokens to decode with each")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->callback([flags, &action] {
    action = [flags] {
      if (flags->model.empty()) flags->model = bundled_model();
      flags->bench.attention.settle(flags->model);
      return run_bench_decode(*flags);
    };
  });
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("bench", "Time attention, decoding or a server");
  command->require_subcommand(1);
  command->footer("Example: twilight bench op --ctx 32768");
  add_op(*command, action);
  add_decode(*command, action);
  add_bench_serve(*command, action);
}

}  // namespace twilight::app
