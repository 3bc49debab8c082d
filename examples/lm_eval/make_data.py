#!/usr/bin/env python3
"""Writes the data of the example tasks from a novel: sentences to complete (choices) and passkeys to
repeat (generation), in a few hundred tokens and in thousands. make_data.py TEXT FOLDER"""
import json
import pathlib
import random
import re
import sys

ITEMS = 16
SEED = 7


def sentences(text):
    flat = re.sub(r"\s+", " ", text.encode("ascii", "ignore").decode())
    return [s for s in re.split(r"(?<=[.;!?]) ", flat) if 60 < len(s) < 160 and s[0].isupper()]


def main():
    text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
    folder = pathlib.Path(sys.argv[2])
    rng = random.Random(SEED)
    pool = sentences(text)
    rng.shuffle(pool)
    endings, passkeys = [], []
    for i in range(ITEMS):
        four = pool[4 * i:4 * i + 4]
        cut = [s.split(" ") for s in four]
        words = cut[0]
        choices = [" ".join(words[len(words) // 2:])]
        choices += [" ".join(c[len(c) // 2:]) for c in cut[1:]]
        order = list(range(4))
        rng.shuffle(order)
        endings.append({"context": " ".join(words[:len(words) // 2]),
                        "endings": [choices[k] for k in order], "label": order.index(0)})
        number = rng.randrange(1000000, 9999999)
        filler = " ".join(pool[100 + 12 * i:112 + 12 * i])
        needle = f"The special magic number for quiet river is {number}."
        middle = len(filler) // 2
        passkeys.append({
            "prompt": f"{filler[:middle]} {needle} {filler[middle:]}\n"
                      "What is the special magic number for quiet river? "
                      "The special magic number for quiet river is",
            "answer": str(number)})
    # Where a piece of the novel begins and where in it the number hides; long_passkey.py joins them.
    long_passkeys = [{"start": round(i / ITEMS, 4), "depth": round((i * 7 % ITEMS + 0.5) / ITEMS, 4),
                      "answer": str(rng.randrange(1000000, 9999999))} for i in range(ITEMS)]
    for name, rows in (("endings", endings), ("passkey", passkeys),
                       ("long_passkey", long_passkeys)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="ascii")


if __name__ == "__main__":
    main()
