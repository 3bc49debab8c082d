"""Prompts of the task twilight_long_passkey: 24,000 characters of the novel with a number hidden in them."""
import functools
import pathlib
import re

CHARACTERS = 24000


@functools.cache
def novel():
    path = pathlib.Path(__file__).parents[2] / "data" / "Persuasion.txt"
    text = path.read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", text)


def prompt(doc):
    text = novel()
    start = int(doc["start"] * (len(text) - CHARACTERS))
    filler = text[start:start + CHARACTERS]
    sentence = filler.find(". ", int(doc["depth"] * (CHARACTERS - 2000))) + 2
    return (f"{filler[:sentence]}The special magic number for quiet river is {doc['answer']}. "
            f"{filler[sentence:]}\nWhat is the special magic number for quiet river? "
            "The special magic number for quiet river is")
