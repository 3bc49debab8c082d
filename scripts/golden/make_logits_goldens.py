#!/usr/bin/env python3
"""Writes golden logits of Hugging Face checkpoint folders, computed by transformers in float32 on the CPU.

    make_logits_goldens.py [--root REPO] [--only NAME ...]

Each model gives tests/golden/logits/<name>.json and <name>.bin. The weights are converted from their
stored dtype to float32 on load, so the truth is float32 arithmetic on the stored values.

<name>.json, one object:
  model             folder of the checkpoint, relative to the repository root
  vocab_size        V
  logits_file       name of the .bin beside it: rows of V little-endian float32, no header
  cases             list of objects:
    name            unique in the file
    tokens          prompt, T ids
    positions       ascending positions in the prompt whose logits are stored
    first_row       row of positions[0] in logits_file; the others follow
    greedy          continuation by argmax, ids
    greedy_margin   for each greedy id, its logit less that of the runner-up; a margin below the reader's
                    tolerance means that the step may legitimately go the other way
    noise           largest |difference| over the stored rows between transformers' eager and sdpa attention:
                    what a mere change of summation order does
Each of these keys occurs once in a case and the arrays are flat.
"""
import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

TINY_SEED = 20240611
TINY_TOKENS = 96


def load(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True)
    assert all(w.dtype == torch.float32 for w in model.parameters())
    return model.eval()


@torch.inference_mode()
def logits_at(model, tokens, positions):
    """float32 [len(positions), V]."""
    hidden = model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state
    return model.lm_head(hidden[0, positions]).numpy()


def greedy(model, tokens, count):
    """`count` ids by argmax and their margins; every step is a whole pass, with no cache."""
    ids, margins = list(tokens), []
    for _ in range(count):
        row = logits_at(model, ids, [len(ids) - 1])[0]
        second, first = np.sort(row)[-2:]
        ids.append(int(row.argmax()))
        margins.append(float(first - second))
    return ids[len(tokens):], margins


def write(out_dir, name, root, folder, prompts):
    """prompts: list of (case name, tokens, positions, greedy count)."""
    model, eager = load(folder, "sdpa"), load(folder, "eager")
    cases, rows = [], []
    for case, tokens, positions, count in prompts:
        got = logits_at(model, tokens, positions)
        noise = float(np.abs(got - logits_at(eager, tokens, positions)).max())
        ids, margin = greedy(model, tokens, count)
        cases.append({"name": case, "tokens": tokens, "positions": positions,
                      "first_row": sum(len(r) for r in rows), "greedy": ids,
                      "greedy_margin": [round(m, 6) for m in margin], "noise": noise})
        rows.append(got)
        print(f"{name}/{case}: T={len(tokens)} noise={noise:.2e} smallest margin={min(margin):.4f} greedy={ids}")
    data = np.concatenate(rows).astype("<f4")
    data.tofile(out_dir / f"{name}.bin")
    document = {"model": str(folder.relative_to(root)), "transformers": transformers.__version__,
                "torch": torch.__version__, "vocab_size": data.shape[1], "logits_file": f"{name}.bin",
                "cases": cases}
    lines = json.dumps(document, indent=1)
    (out_dir / f"{name}.json").write_text(compact(lines) + "\n")


def compact(text):
    """Puts every flat array on one line."""
    out, inside = [], False
    for line in text.split("\n"):
        if inside:
            last = line.strip().startswith("]")
            out[-1] += line.strip() + (" " if line.endswith(",") and not last else "")
            inside = not last
        else:
            out.append(line)
            inside = line.endswith("[") and '"cases"' not in line
    return "\n".join(out)


def vesper(root, out_dir):
    folder = root / "models/vesper-19m"
    text = (root / "data/Persuasion.txt").read_bytes().decode("utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[:60000], add_special_tokens=False).ids
    tokens = [0] + ids[:4095]
    write(out_dir, "vesper-19m", root, folder,
          [("prompt-512", tokens[:512], [0, 1, 63, 255, 511], 32), ("prompt-4096", tokens, [4095], 16)])


def tiny(root, out_dir, folder):
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(TINY_SEED).integers(0, vocab, TINY_TOKENS).tolist()
    write(out_dir, folder.name, root, folder, [("random-96", tokens, [0, 1, 47, 95], 8)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2])
    parser.add_argument("--only", nargs="*", help="names of checkpoint folders; all by default")
    args = parser.parse_args()
    root = args.root.resolve()
    out_dir = root / "tests/golden/logits"
    out_dir.mkdir(parents=True, exist_ok=True)
    wanted = (lambda name: not args.only or name in args.only)
    if wanted("vesper-19m"):
        vesper(root, out_dir)
    for config in sorted((root / "tests/golden/tiny").glob("*/config.json")):
        if wanted(config.parent.name):
            tiny(root, out_dir, config.parent)


if __name__ == "__main__":
    main()
