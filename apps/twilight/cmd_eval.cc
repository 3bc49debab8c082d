#include <cmath>
#include <cstdio>
#include <memory>

#include "commands.h"
#include "interrupt.h"
#include "lab.h"
#include "lab_report.h"
#include "output.h"
#include "real_range.h"
#include "twilight/error.h"

namespace twilight::app {

void LabFlags::add_common(CLI::App& command) {
  common.add(command);
  attention.add(command);
  command.add_option("--model", model,
                     "Checkpoint folder or GGUF file; the bundled model by default");
  command
      .add_option("--text", texts,
                  "Text file, may be given several times; the bundled novel by default")
      ->allow_extra_args(false);
  command
      .add_option("--audit-every", audit_every,
                  "Measure the true kept mass, which reads every key, in one step of this many; "
                  "0 never")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  command.add_flag("--no-audit", no_audit, "The same as --audit-every 0");
  command.add_option("--resume", resume,
                     "Keep finished measurements in this file, and go on from those it has");
  command.add_flag("--force", force, "Replace the output if it exists");
}

namespace {

struct EvalFlags {
  LabFlags lab;
  PresetList presets{{"adaptive"}};
  PplOptions ppl;
  NeedleOptions needles;
  RecallOptions recall;
  ChainOptions chains;
  WordsOptions words;
  std::string answer = "rank";

  void add(CLI::App& command) {
    lab.add_common(command);
    presets.add(command, "Presets to compare over the same prompts, e.g. dense,paper,quest:1024");
    command.add_option("--ctx", lab.contexts, "Tokens of context, a list")
        ->delimiter(',')
        ->capture_default_str()
        ->check(CLI::Range(2, 1 << 30));
    command.add_option("--out", lab.out, "Write the JSON report to a new file");
  }
  void add_trials(CLI::App& command) {
    command.add_option("--trials", lab.trials, "Items for each text, context and depth")
        ->capture_default_str()
        ->check(CLI::Range(1, 100000));
    command.add_option("--seed", lab.seed, "Seed of what is drawn")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
  }
  void add_question(CLI::App& command) {
    command.add_flag("--dense-question", lab.dense_question,
                     "Read the question densely with the prompt; only the answer is sparse");
  }
  void add_depths(CLI::App& command) {
    command.add_option("--depths", lab.depths, "Where to hide it, 0 to 1, a list")
        ->delimiter(',')
        ->capture_default_str()
        ->check(real_range(0.0, 1.0));
  }
};

int run_eval(const EvalFlags& flags, std::unique_ptr<Task> task) {
  std::vector<LabPreset> presets =
      lab_presets(flags.lab.attention, flags.presets.names(flags.lab.attention));
  OutputFile out;
  if (!flags.lab.out.empty()) out = OutputFile(flags.lab.out, flags.lab.force);
  Lab lab(flags.lab, std::move(task), std::move(presets));
  if (!lab.run()) {
    if (!flags.lab.resume.empty()) {
      std::fprintf(stderr, "twilight: interrupted; the same command goes on from %s\n",
                   flags.lab.resume.c_str());
    }
    return kInterruptedExit;
  }
  const std::string report = lab_report(lab).dump(2);
  out.commit(report + "\n");
  if (flags.lab.common.json) {
    std::printf("%s\n", report.c_str());
  } else {
    std::printf("%s", lab_table(lab).c_str());
    std::fflush(stdout);
    std::fprintf(stderr, "%s", telemetry_lines(lab).c_str());
  }
  return 0;
}

using MakeTask = std::unique_ptr<Task> (*)(const EvalFlags&);

// A subcommand with the flags every task has.
CLI::App* add_task(CLI::App& parent, const std::string& name, const std::string& about,
                   const std::string& example, const std::shared_ptr<EvalFlags>& flags,
                   Action& action, MakeTask make) {
  CLI::App* command = parent.add_subcommand(name, about);
  command->footer(
      "Presets are measured as they are; the profile that lies with a model is read where "
      "--profile\n"
      "names it.\n"
      "Example: twilight eval " +
      name + " " + example);
  if (flags->lab.contexts.empty()) flags->lab.contexts = {4096};
  flags->add(*command);
  command->callback([flags, make, &action] {
    action = [flags, make] { return run_eval(*flags, make(*flags)); };
  });
  return command;
}

void add_ppl(CLI::App& parent, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  flags->lab.contexts = {32768};
  CLI::App* command =
      add_task(parent, "ppl", "Perplexity of a text's last tokens, read through the decode path",
               "--ctx 32768 --last 1024 --attention dense,paper --json", flags, action,
               [](const EvalFlags& f) { return make_ppl_task(f.ppl); });
  command->add_option("--last", flags->ppl.last, "Positions at the end that take the decode path")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
}

void add_passkey(CLI::App& parent, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  flags->needles.name = "passkey";
  CLI::App* command =
      add_task(parent, "passkey", "Find a number hidden in a text at several depths",
               "--ctx 4096 --depths 0.1,0.5,0.9 --trials 4 --attention paper", flags, action,
               [](const EvalFlags& f) { return make_needle_task(f.needles); });
  flags->add_depths(*command);
  flags->add_trials(*command);
  flags->add_question(*command);
}

void add_niah(CLI::App& parent, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = add_task(
      parent, "niah", "Needles: many keys in the text, several values a key, several questions",
      "--keys 4 --ctx 4096,8192 --attention dense,paper", flags, action,
      [](const EvalFlags& f) { return make_needle_task(f.needles); });
  command->add_option("--keys", flags->needles.keys, "Distinct keys in the text")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--values", flags->needles.values, "Numbers of each key")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command->add_option("--queries", flags->needles.queries, "Keys that are asked for")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  flags->add_depths(*command);
  flags->add_trials(*command);
  flags->add_question(*command);
}

void add_vt(CLI::App& parent, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = add_task(
      parent, "vt", "Variables assigned to each other all over the text: which hold a value?",
      "--hops 4 --ctx 4096 --attention dense,paper", flags, action,
      [](const EvalFlags& f) { return make_chain_task(f.chains); });
  command
      ->add_option("--chains", flags->chains.chains, "Chains in the text; the first is asked for")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command->add_option("--hops", flags->chains.hops, "Assignments after the first of each chain")
      ->capture_default_str()
      ->check(CLI::Range(0, 64));
  flags->add_trials(*command);
  flags->add_question(*command);
}

void add_words(CLI::App& parent, Action& action, bool zipf) {
  auto flags = std::make_shared<EvalFlags>();
  flags->words.zipf = zipf;
  flags->words.common = zipf ? 3 : 10;
  CLI::App* command = add_task(
      parent, zipf ? "fwe" : "cwe",
      zipf ? "Find the most frequent words of a list that follows a Zipf law"
           : "Find the words that are common in a list of words of the text",
      "--ctx 4096 --trials 16 --attention dense,paper", flags, action, [](const EvalFlags& f) {
        WordsOptions words = f.words;
        words.ranked = f.answer == "rank";
        return make_words_task(words);
      });
  command->add_option("--common", flags->words.common, "Words to find")
      ->capture_default_str()
      ->check(CLI::Range(1, 100));
  if (zipf) {
    command->add_option("--alpha", flags->words.alpha, "Exponent of the Zipf law")
        ->capture_default_str()
        ->check(real_range(1.0, 8.0));
  }
  command
      ->add_option("--answer", flags->answer,
                   "rank: compare the likelihoods of the listed words at the list's end, which "
                   "needs no understanding of questions; text: ask and read the answer")
      ->capture_default_str()
      ->check(CLI::IsMember({"rank", "text"}));
  flags->add_trials(*command);
  flags->add_question(*command);
}

void add_recall(CLI::App& parent, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  flags->lab.trials = 4;
  CLI::App* command =
      add_task(parent, "recall", "Facts all over the text, a question for each: digits got right",
               "--ctx 32768 --last 640 --trials 1 --attention dense,paper", flags, action,
               [](const EvalFlags& f) { return make_recall_task(f.recall); });
  command->add_option("--facts", flags->recall.facts, "Facts in the text")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  command
      ->add_option("--last", flags->recall.last,
                   "Positions of text before the questions that take the decode path too and count "
                   "for perplexity")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  flags->add_trials(*command);
  flags->add_question(*command);
}

}  // namespace

void add_eval(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("eval", "Measure quality: perplexity, and tasks over long texts");
  command->footer("Example: twilight eval ppl --ctx 4096 --last 256 --attention dense,paper");
  command->require_subcommand(1);
  add_ppl(*command, action);
  add_passkey(*command, action);
  add_niah(*command, action);
  add_vt(*command, action);
  add_words(*command, action, /*zipf=*/false);
  add_words(*command, action, /*zipf=*/true);
  add_recall(*command, action);
}

}  // namespace twilight::app
