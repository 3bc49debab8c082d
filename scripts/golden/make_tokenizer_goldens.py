#!/usr/bin/env python3
"""Writes tests/golden/tokenizer: small tokenizers and what the reference makes of hostile text.

Needs `tokenizers` and `sentencepiece` from PyPI. Run from anywhere; takes about a minute.

goldens.json holds
  texts       the byte strings under test: {name, hex} or {name, hex, times} for a repetition;
              malformed UTF-8 reaches the reference as bytes.decode("utf-8", "replace")
  assigned    ranges [first, last] of code points assigned in Python's Unicode version, for the
              class test
  tokenizers  per file: results, one per text, and `novel`, the whole bundled novel; a result is
              {count, hash, ids | first + last, decoded}; hash is FNV-1a over the ids as int32,
              little endian, decoded FNV-1a over the UTF-8 of the reference's decoding (special
              tokens kept)
  classes     per regex class, FNV-1a over one byte (0 or 1) per assigned code point
"""

import json
import random
import sys
import unicodedata
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers import trainers

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/tokenizer"
NOVEL = ROOT / "data/Persuasion.txt"
SHOWN = 64

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_LIKE = [
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def fnv1a(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def hostile_texts():
    s = {
        "empty": "",
        "space": " ",
        "spaces": "     ",
        "words": "Hello world, this is a test of 3 words.",
        "leading_spaces": "   leading",
        "trailing_spaces": "trailing   ",
        "inner_spaces": "a  b   c    d",
        "tabs": "\tif x:\n\t\treturn\t1\n",
        "crlf": "a\r\nb\r\n\r\nc\rd\n\re \r\n f\n \n\n  g",
        "newlines": "\n\n\n \n \n\n",
        "nbsp": "a\u00a0b \u00a0 c\u00a0\u00a0d",
        "exotic_space": "a\u1680b\u2000c\u2003d\u2009e\u202ff\u205fg\u3000h\u0085i\u2028j\u2029k\u180el\u200bm\ufeffn\u2060o",
        "space_runs": "x \u2003 y\u3000\u3000z \u0085 \u2028\n w\u180e v",
        "control": "\x00\x01\x02\x1c\x1d\x1e\x1f\x7f\x0b\x0c",
        "nul": "a\x00b\x00\x00 c",
        "digits": "0123456789012345678901234567890",
        "digits_mixed": "1 12 123 1234 12345 a1b22c333d4444 3.14159 1,000,000",
        "digits_world": "١٢٣٤٥ १२३४ ⅠⅡⅢ ½¾ ²³ ①② 𝟘𝟙𝟚 〇",
        "contractions": "I'm you're he's we'll they've I'd don't 's 't",
        "contractions_upper": "I'M YOU'RE HE'S WE'LL THEY'VE I'D DON'T 'S'T'RE'VE'M'LL'D",
        "contractions_mixed": "I'Ll'lL 'rE 'vE 'Ss 's's",
        "contractions_curly": "I’m you’re he’s we’ll THEY’VE don’t",
        "long_s": "it'ſ he'ſ 'ſ x'ſy 'ſ's \u212a'\u212a",
        "combining": "e\u0301 a\u0323\u0302 o\u0302\u0323 \u0301x q\u0307\u0323 \u1e9b\u0323 Å A\u030a \u212b",
        "zalgo": "Z\u0351\u036b\u0343\u0324\u0316\u0331a\u0321\u034a\u0313l\u0347\u0301go",
        "hangul": "한국어 \u1112\u1161\u11ab \uac00\u11a8 \u1100\u1161",
        "cjk": "我爱北京天安门。日本語のテキスト、カタカナ！漢字かな混じり文 text 中文",
        "cjk_compat": "\uf900\uf9ff \u2f00 \u3400 𠀀𪛖 ﷺ",
        "rtl": "שלום עולם مرحبا بالعالم \u202eabc\u202c \u05e9\u05c1",
        "indic": "नमस्ते दुनिया க்ஷ ไทยภาษา ខ្មែរ",
        "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷🇩🇪 😀😀 ❤️ 1️⃣",
        "emoji_words": "ok👍nice 👩🏾‍🚀launch!!🚀🚀",
        "punctuation": "!!! ... --- ?!?! (a)[b]{c} \"q\" 'q' `q` a--b a—b “x” …",
        "code": "for (int i=0;i<10;++i) { x[i]->y += 0x1F; } // done\n",
        "url": "https://example.com/a?b=c&d=%20#frag",
        "underscore": "snake_case __init__ _ __",
        "byte_alphabet": "Ġthe Ċ ġ Ń \u0100\u0143",
        "metaspace": "▁the ▁▁ a▁b ▁",
        "byte_names": "<0x41> <0x00> <0xff> <unk>",
        "special": "<|begin_of_text|>Hello<|end_of_text|>",
        "special_spaces": " <|begin_of_text|>  x  <|end_of_text|> \n<|end_of_text|>",
        "special_partial": "<|begin_of_text <|begin_of_text|<|end_of_text|> |> <|<|end_of_text|>|>",
        "special_llama": "<s>Hello</s> <s> world</s><s></s>x",
        "added_flags": "a [L] b [R] c [LR] d [W] xW[W] [W]y (W)[W]. [L][L]  [R]  [R] \u00a0[LR]\u3000[N] [N]é cafe\u0301 Ⓦ[W]\u200d \u0301[W]",
        "added_overlap": "[LR] [LR] [R] [L] <|im|><|im_start|> <|im_star <|im_end|><|im|",
        "noncharacters": "\ufffe\uffff\U0001ffff \ufffd \ue000 \U0010ffff",
        "case_folds": "ß ẞ ﬁ ﬀ İ ı ſ K Å",
        "letters_modifier": "ʰʷ ªº ᵃ ⁿ ー々〆",
        "symbols": "∑∫√≠ €£¥ ©®™ ←→ ▀▄█ ♠♥",
    }
    b = {
        "bad_lone_continuation": b"a\x80b\xbf",
        "bad_surrogates": b"x\xed\xa0\x80\xed\xbf\xbfy",
        "bad_overlong": b"\xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf",
        "bad_truncated": b"ok \xe2\x82 next \xf0\x9f\x98 end \xf0\x9f",
        "bad_too_large": b"\xf4\x90\x80\x80 \xf5\x80 \xff\xfe",
        "bad_latin1": "café déjà vu".encode("latin-1"),
    }
    texts = [{"name": n, "hex": t.encode("utf-8").hex()} for n, t in s.items()]
    texts += [{"name": n, "hex": t.hex()} for n, t in b.items()]
    for name, unit, times in [
        ("long_letters", "a", 100_000),
        ("long_pairs", "th", 20_000),
        ("long_digits", "7", 10_000),
        ("long_spaces", " ", 10_000),
        ("long_newlines", "\n", 5_000),
        ("long_marks", "\u0301\u0316", 5_000),
        ("long_cjk", "中", 5_000),
        ("long_words", "ab cd ", 5_000),
    ]:
        texts.append({"name": name, "hex": unit.encode("utf-8").hex(), "times": times})

    rng = random.Random(20260301)
    fragments = [t for t in s.values() if t] + list("abc '’ſ\n\r\t  \u00a0\u3000é1٣中😀\u0301\u200d")
    for i in range(120):
        parts = []
        for _ in range(rng.randint(1, 12)):
            fragment = rng.choice(fragments)
            at = rng.randrange(len(fragment))
            parts.append(fragment[at : at + rng.randint(1, 5)])
        texts.append({"name": f"random_{i}", "hex": "".join(parts).encode("utf-8").hex()})
    return texts


def text_bytes(text):
    return bytes.fromhex(text["hex"]) * text.get("times", 1)


def result(ids, decoded):
    raw = b"".join(i.to_bytes(4, "little", signed=True) for i in ids)
    out = {"count": len(ids), "hash": fnv1a(raw)}
    if len(ids) <= SHOWN:
        out["ids"] = ids
    else:
        out["first"], out["last"] = ids[:SHOWN], ids[-SHOWN:]
    if decoded is not None:
        out["decoded"] = fnv1a(decoded.encode("utf-8"))
    return out


def corpus():
    novel = NOVEL.read_text(encoding="utf-8")
    extra = [bytes.fromhex(t["hex"]).decode("utf-8", "replace") for t in hostile_texts()]
    return [novel[i : i + 2000] for i in range(0, 200_000, 2000)] + extra * 3


def train_byte_level(tokenizer, vocab_size):
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        ),
    )


def gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre.ByteLevel(add_prefix_space=True, use_regex=True)
    t.decoder = decoders.ByteLevel()
    train_byte_level(t, 700)
    t.add_special_tokens([AddedToken("<|begin_of_text|>", special=True, normalized=False)])
    t.add_tokens(
        [
            AddedToken("[L]", lstrip=True, normalized=False),
            AddedToken("[R]", rstrip=True, normalized=False),
            AddedToken("[LR]", lstrip=True, rstrip=True, normalized=False),
            AddedToken("[W]", single_word=True, normalized=False),
            AddedToken("[N]", normalized=True),
            AddedToken("<|im|>", normalized=False),
            AddedToken("<|im_start|>", normalized=False),
        ]
    )
    return t


def split_then_bytes(patterns, normalizer=None, ignore_merges=False, vocab_size=700):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        t.normalizer = normalizer
    t.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex(p), "isolated", invert=False) for p in patterns]
        + [pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.decoder = decoders.ByteLevel()
    train_byte_level(t, vocab_size)
    t.add_special_tokens(
        [
            AddedToken("<|begin_of_text|>", special=True, normalized=False),
            AddedToken("<|end_of_text|>", special=True, normalized=False),
        ]
    )
    return t


def llama3():
    t = split_then_bytes([LLAMA3], ignore_merges=True)
    # A word that is in the vocabulary but that no merges reach, so that ignore_merges shows.
    spec = json.loads(t.to_str())
    last = max(spec["model"]["vocab"].values())
    for token in spec["added_tokens"]:
        spec["model"]["vocab"][token["content"]] = token["id"]
        last = max(last, token["id"])
    spec["model"]["vocab"]["Ġworld"] = last + 1
    spec["model"]["vocab"]["zzzq"] = last + 2
    return Tokenizer.from_str(json.dumps(spec))


def qwen2():
    t = split_then_bytes([QWEN2], normalizers.NFC())
    t.add_tokens([AddedToken("cafe\u0301", normalized=True), AddedToken("<|im_end|>", normalized=False)])
    return t


def deepseek_like():
    return split_then_bytes(DEEPSEEK_LIKE, normalizers.Sequence([]))


def digits_and_behaviors():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFKD()
    t.pre_tokenizer = pre.Sequence(
        [
            pre.Split("-", "removed", invert=False),
            pre.Split(Regex(r"[.,]"), "merged_with_previous", invert=False),
            pre.Split("(", "merged_with_next", invert=False),
            pre.Split(Regex(r"[!?]"), "contiguous", invert=False),
            pre.Split(Regex(r"\w+|\W+"), "removed", invert=True),
            pre.Digits(individual_digits=False),
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    t.decoder = decoders.ByteLevel()
    train_byte_level(t, 500)
    return t


def byte_pieces():
    return ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]


def llama2(metaspace):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre.Metaspace()
    trained.train_from_iterator(
        corpus()[:60],
        trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=80),
    )
    spec = json.loads(trained.to_str())
    vocab = {piece: i for i, piece in enumerate(byte_pieces())}
    for piece in sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get):
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]]
    t = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if metaspace:
        t.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        t.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    t.add_special_tokens(
        [AddedToken(x, special=True, normalized=False) for x in ("<unk>", "<s>", "</s>")]
    )
    return t


def unknown_without_bytes():
    """Unknown characters become <unk>, fused; a Metaspace decoder."""
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    t.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    t.train_from_iterator(
        corpus()[:40],
        trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"], limit_alphabet=60),
    )
    return t


def old_merges(text):
    """The same file with merges as "a b" strings."""
    spec = json.loads(text)
    spec["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":"))


def hf_results(tokenizer, texts):
    added = tokenizer.get_added_tokens_decoder()
    garbled = {
        i for i, t in added.items()
        if not t.content.isascii() and tokenizer.decode([i], skip_special_tokens=False) != t.content
    }

    def one(data):
        ids = tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids
        # The reference garbles added tokens with letters of the byte-level alphabet; ours does not.
        faithful = garbled.isdisjoint(ids)
        return result(ids, tokenizer.decode(ids, skip_special_tokens=False) if faithful else None)

    return {
        "results": [one(text_bytes(t)) for t in texts],
        "novel": one(NOVEL.read_bytes()),
    }


def sentencepiece_model():
    prefix = OUT / "sentencepiece"
    lines = OUT / "corpus.tmp"
    lines.write_text("\n".join(corpus()[:100]).replace("\x00", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(prefix), vocab_size=900, model_type="bpe",
        byte_fallback=True, character_coverage=0.9995, split_digits=True, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )
    lines.unlink()
    (OUT / "sentencepiece.vocab").unlink()
    model = OUT / "sentencepiece.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def sentencepiece_results(processor, texts):
    symbols = ["<unk>", "<s>", "</s>"]

    def encode(text):
        ids, rest = [], ""
        at = 0
        while at <= len(text):
            symbol = next((x for x in symbols if text.startswith(x, at)), None)
            if symbol is None and at < len(text):
                rest += text[at]
                at += 1
                continue
            if rest:
                ids += processor.encode(rest)
                rest = ""
            if symbol is None:
                break
            ids.append(processor.piece_to_id(symbol))
            at += len(symbol)
        return ids

    def one(data):
        text = data.decode("utf-8", "replace")
        ids = encode(text)
        plain = not any(processor.is_control(i) or processor.is_unknown(i) for i in ids)
        return result(ids, processor.decode(ids) if plain else None)

    return {
        "results": [one(text_bytes(t)) for t in texts],
        "novel": one(NOVEL.read_bytes()),
    }


def assigned_ranges():
    ranges = []
    for point in range(0x110000):
        if 0xD800 <= point < 0xE000 or unicodedata.category(chr(point)) == "Cn":
            continue
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return ranges


def class_hashes(ranges):
    out = {}
    text = "".join(chr(p) for first, last in ranges for p in range(first, last + 1))
    for pattern in [r"\s", r"\S", r"\p{L}", r"\p{N}", r"\p{M}", r"\p{P}", r"\p{Lu}", r"\p{Ll}",
                    r"\p{Han}", r"\d", r"\w", r"[^\s\p{L}\p{N}]", r"(?i:s)", r"(?i:k)"]:
        removed = pre.Split(Regex(pattern), "removed", invert=False)
        bits = bytearray(b"\x01" * len(text))
        for _, (begin, end) in removed.pre_tokenize_str(text):
            bits[begin:end] = bytes(end - begin)
        out[pattern] = {"hash": fnv1a(bytes(bits)), "count": sum(bits)}
    return out


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    texts = hostile_texts()
    goldens = {"made_with": f"tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}, "
                            f"Unicode {unicodedata.unidata_version}"}
    goldens["texts"] = texts
    goldens["tokenizers"] = {}
    shipped = Tokenizer.from_file(str(ROOT / "models/vesper-19m/tokenizer.json"))
    goldens["tokenizers"]["vesper"] = hf_results(shipped, texts)
    for name, make, strings in [
        ("gpt2", gpt2, True),
        ("llama3", llama3, False),
        ("qwen2", qwen2, True),
        ("deepseek_like", deepseek_like, False),
        ("behaviors", digits_and_behaviors, False),
        ("llama2_normalizer", lambda: llama2(False), True),
        ("llama2_metaspace", lambda: llama2(True), False),
        ("unknown", unknown_without_bytes, False),
    ]:
        tokenizer = make()
        text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        if strings:
            text = old_merges(text)
        tokenizer = Tokenizer.from_str(text)
        (OUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        goldens["tokenizers"][name] = hf_results(tokenizer, texts)
        print(name, file=sys.stderr)
    goldens["tokenizers"]["sentencepiece"] = sentencepiece_results(sentencepiece_model(), texts)
    goldens["assigned"] = assigned_ranges()
    goldens["classes"] = class_hashes(goldens["assigned"])
    (OUT / "goldens.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
