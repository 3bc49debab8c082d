#!/usr/bin/env python3
"""Writes small golden cases of one sparse decode step, computed by NumPy alone in float64.

    make_oracle.py [--out FOLDER]

It shares no code with the backends: agreement of the two is evidence. It writes manifest.json and, beside it, one .bin of
inputs per data set and one .bin of expected outputs per case. A .bin is a plain sequence of little-endian
arrays, C order; the manifest gives name, dtype, shape and byte offset of each. Offsets are multiples of 16.

Data set: B, Hkv, G, D, P, seq_lens, pages_per_seq (the most pages a sequence has, for padding) and
    q  bf16 [B, Hkv * G, D]       k, v  bf16 [total tokens, Hkv, D], sequences one after the other
Case: its data set and policy, and
    summary_min, summary_max f32 [B, Hkv, pages_per_seq, D]  as held by the summary; 0 where not sealed
    page_scores        f32 [B, Hkv, pages_per_seq]        scaled; 0 where not sealed
    centre_codes       u8  [B, Hkv, pages_per_seq, 4, D]  means of a page, rotated; 0 where there is none
    centre_scales      u16 [B, Hkv, pages_per_seq, 4]     IEEE half, the deviant's second for one centroid
    deviant_codes      u8  [B, Hkv, pages_per_seq, D]     residual of the key farthest from the mean
    variance_bits      u16 [B, Hkv, pages_per_seq]
    value_codes        u8  [B, Hkv, pages_per_seq, D]     mean value
    value_bits         u16 [B, Hkv, pages_per_seq]        its scale
    codes              u8  [total tokens, Hkv, D]         estimate codes; 0 in open pages
    scale_bits, zero_bits  u16 [total tokens, Hkv]        IEEE half; 0 in open pages
    candidate_counts   i32 [B, Hkv]                       pages
    candidates         i32 [B, Hkv, pages_per_seq]        ascending logical pages, padded with -1
    estimates          f32 [B, Hkv, G, pages_per_seq * P] entry i * P + slot belongs to the i-th candidate;
                                                          -inf past the end of sequence or list
    head_counts        i32 [B, Hkv * G]                   kept by that head, forced tokens included
    head_mass          f32 [B, Hkv * G]                   mass of the union under that head's estimates
    log_masses         f32 [B, Hkv * G, pages_per_seq]    estimated log mass of sealed pages
    tail_mass          f32 [B, Hkv * G, pages_per_seq]    of the i-th candidate page, over e^tail_shift
    tail_shift         f32 [B, Hkv * G]                   largest estimate; -inf without candidates
    kept_counts        i32 [B, Hkv]
    kept               i32 [B, Hkv, max N]                ascending tokens, padded with -1
    out, dense_out     f32 [B, Hkv * G, D]                exact attention over kept (and the tail), over all; 0 for N = 0
The index of keys and values follows docs/formats.md in float32, operation by operation; all after it is float64.
The planes a policy does not use (page scores without a selector, codes without key_bits) are left out.

Inputs are drawn so that no decision is close: see `Margins`. Exact ties, which are not close calls, are
put in on purpose.
"""
import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np

F16_MAX = np.float32(65504)


def to_bf16(x):
    """float32 values rounded to bf16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def bf16_bits(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & np.uint32(0xFFFF)).any()
    return (bits >> np.uint32(16)).astype(np.uint16)


@dataclasses.dataclass
class Policy:
    select: str = "score"  # "all", "forced" or "score"
    summary: str = "quest_bf16"  # "quest4", "centroid", "sub_centroid" or "none"
    fraction: float = 0.25
    min_candidates: int = 0  # tokens
    max_candidates: int = 1 << 20
    mass: float = 0  # share of the pages' mass to take, 0: the whole budget
    mass_floor: int = 0  # tokens
    key_bits: int = 4  # 2, 4 or 8; 0: exact scores everywhere
    criterion: str = "per_head"  # "group_mean" or "none"
    tail: bool = False
    far_tail: bool = False
    far_floor: float = 0.2
    p: list = dataclasses.field(default_factory=lambda: [0.9])  # per query head, repeated over B and Hq
    min_tokens: int = 1
    sink_tokens: int = 4
    recent_pages: int = 1


class Margins:
    """Distance of every decision from going the other way. float32 arithmetic with any order of summation
    is orders of magnitude inside these limits."""
    PAGE = 3e-4  # between the last chosen and the first rejected page score
    MASS = 5e-5  # between the mass and p, on both sides
    WEIGHT = 2e-4  # between the estimates of the weakest kept and the strongest dropped token

    def __init__(self):
        self.page = self.mass = self.weight = math.inf

    def wide(self):
        return self.page > self.PAGE and self.mass > self.MASS and self.weight > self.WEIGHT


# --- the index ------------------------------------------------------------------------------------------


def quantise(rows, bits):
    """Asymmetric over the last axis, in float32: codes, scale (f16), zero (f16)."""
    rows = rows.astype(np.float32)
    levels = np.float32(2**bits - 1)
    lo, hi = rows.min(axis=-1), rows.max(axis=-1)
    zero = np.clip(lo, -F16_MAX, F16_MAX).astype(np.float16)
    scale = ((hi - lo) / levels).astype(np.float16)
    divisor = np.where(scale == 0, np.float16(1), scale).astype(np.float32)[..., None]
    codes = np.rint((rows - zero.astype(np.float32)[..., None]) / divisor)
    codes = np.clip(codes, np.float32(0), levels)
    return np.where(scale[..., None] == 0, 0, codes).astype(np.uint8), scale, zero


def dequantise(codes, scale, zero):
    return scale.astype(np.float64)[..., None] * codes + zero.astype(np.float64)[..., None]


def summarise(page, kind):
    """page [P, D] -> min [D], max [D] as the summary holds them."""
    bounds = [page.min(axis=0), page.max(axis=0)]
    if kind == "quest4":
        bounds = [dequantise(*quantise(b, 4)) for b in bounds]
    return [np.asarray(b, np.float64) for b in bounds]


# --- rotated planes -------------------------------------------------------------------------------------

MASK64 = (1 << 64) - 1


def split_mix(seed, count):
    """First outputs of SplitMix64."""
    out, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        out.append(z ^ (z >> 31))
    return out


def rotate(rows):
    """[..., D] float32."""
    D = rows.shape[-1]
    signs = np.array([-1 if z >> 63 else 1 for z in split_mix(0, D)], np.float32)
    x = rows.astype(np.float32) * signs
    begin = 0
    while begin < D:
        size = 1 << (D - begin).bit_length() - 1
        block = x[..., begin:begin + size]
        step = 1
        while step < size:
            pairs = block.reshape(*block.shape[:-1], size // (2 * step), 2, step)
            block = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]],
                             axis=-2).reshape(block.shape)
            step *= 2
        x[..., begin:begin + size] = block * np.float32(1 / math.sqrt(size))
        begin += size
    return x


def lane_sums(terms):
    """Over the last axis: lane i adds terms i, i + 16, ...; then lanes fold 8, 4, 2, 1."""
    pad = -terms.shape[-1] % 16
    lanes = np.zeros((*terms.shape[:-1], 16), np.float32)
    terms = np.concatenate([terms, np.zeros((*terms.shape[:-1], pad), np.float32)], axis=-1)
    for i in range(0, terms.shape[-1], 16):
        lanes = lanes + terms[..., i:i + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:2 * width]
    return lanes[..., 0]


def slot_mean(rows):
    """Mean of float32 rows, added in order."""
    total = np.zeros(rows.shape[-1], np.float32)
    for row in rows:
        total = total + row
    return total / np.float32(len(rows))


def half(x):
    return np.clip(x, -F16_MAX, F16_MAX).astype(np.float16)


def mid_rise(x):
    """4-bit codes and f16 scale of a float32 vector."""
    scale = half(np.abs(x).max() / np.float32(7.5))
    if scale == 0:
        return np.full(len(x), 7, np.uint8), scale
    codes = np.rint(x / np.float32(scale) + np.float32(7.5))
    return np.clip(codes, 0, 15).astype(np.uint8), scale


def from_mid_rise(codes, scale):
    return np.float32(scale) * (codes.astype(np.float32) - np.float32(7.5))


def two_bits(residual):
    """Codes and scales of residuals [n, D]."""
    rms = np.sqrt(lane_sums(residual * residual) / np.float32(residual.shape[-1]))[:, None]
    outer = np.abs(residual) > rms
    codes = np.where(residual >= 0, 2 + outer, 1 - outer.astype(int)).astype(np.uint8)
    levels = np.where(outer, np.float32(1.5), np.float32(0.5))
    scale = half(lane_sums(np.abs(residual) * levels) / lane_sums(levels * levels))
    return codes, scale


def index_rotated(page, summary, key_bits):
    """What a page of keys [P, D] has in the rotated basis, as stored and decoded (float64)."""
    P, D = page.shape
    runs = -(-P // 4) if summary == "sub_centroid" else P
    y = rotate(page)
    r = {"centre_codes": np.zeros((4, D), np.uint8), "centre_scales": np.zeros(4, np.float16), "centres": []}
    for i in range(4 if summary == "sub_centroid" else 1):
        run = slice(min(i * runs, P), min((i + 1) * runs, P))
        mean = slot_mean(y[run]) if run.stop > run.start else np.zeros(D, np.float32)
        r["centre_codes"][i], r["centre_scales"][i] = mid_rise(mean)
        centre = from_mid_rise(r["centre_codes"][i], r["centre_scales"][i])
        if run.stop > run.start:
            r["centres"].append((centre.astype(np.float64), run.stop - run.start))
        y[run] = y[run] - centre
    energy = lane_sums(y * y)
    total = np.float32(0)
    for e in energy:
        total = total + e
    r["variance"] = half(total / np.float32(P * D))
    if summary == "centroid":
        r["deviant_codes"], r["centre_scales"][1] = mid_rise(y[int(np.argmax(energy))])
        r["deviant"] = from_mid_rise(r["deviant_codes"], r["centre_scales"][1]).astype(np.float64)
    if key_bits == 2:
        r["codes"], r["scales"] = two_bits(y)
        each = np.repeat([c for c, _ in r["centres"]], [n for _, n in r["centres"]], axis=0)
        r["keys"] = each + r["scales"].astype(np.float64)[:, None] * (r["codes"] - 1.5)
    return r


def index_values(page):
    """Codes and scale of the mean of a page of values, and the decoded mean."""
    codes, scale = mid_rise(slot_mean(page))
    return codes, scale, from_mid_rise(codes, scale).astype(np.float64)


def log_sum(x):
    top = np.max(x)
    return top + math.log(np.exp(np.asarray(x) - top).sum())


def page_log_mass(record, q, summary, P, scale):
    """Estimated log mass of a page for a rotated query."""
    v = scale**2 * np.dot(q, q) * float(record["variance"]) / 2
    if summary == "sub_centroid":
        return log_sum([math.log(n) + scale * np.dot(q, c) + v for c, n in record["centres"]])
    a = scale * np.dot(q, record["centres"][0][0])
    b = a + scale * np.dot(q, record["deviant"])
    return log_sum([math.log(P - 1) + a + v, b] if P > 1 else [b])


# --- the step -------------------------------------------------------------------------------------------


def choose_pages(scores, n, page_size, policy, margins):
    """scores: one per sealed page, or None. Ascending list of logical pages."""
    sealed, total = n // page_size, -(-n // page_size)
    if policy.select == "all":
        return list(range(total))
    forced = {j // page_size for j in forced_tokens(n, page_size, policy)}
    if policy.select == "forced":
        return sorted(forced)
    budget = min(max(math.ceil(policy.fraction * n), policy.min_candidates), policy.max_candidates)
    places = max(0, -(-budget // page_size) - len(forced))
    rest = sorted((page for page in range(sealed) if page not in forced), key=lambda page: (-scores[page], page))
    if policy.mass:
        mass = np.exp(scores[:sealed] - max(scores[:sealed], default=0))
        floor = -(-policy.mass_floor // page_size) - len(forced)
        have = sum(mass[page] for page in forced if page < sealed)
        count = 0
        while count < min(places, len(rest)) and (count < floor or have < policy.mass * mass.sum()):
            margins.mass = min(margins.mass, abs(have / mass.sum() - policy.mass))
            have += mass[rest[count]]
            count += 1
        if sealed:
            margins.mass = min(margins.mass, abs(have / mass.sum() - policy.mass))
        places = count
    taken, left = rest[:places], rest[places:]
    if taken and left and scores[taken[-1]] != scores[left[0]]:
        margins.page = min(margins.page, scores[taken[-1]] - scores[left[0]])
    return sorted(forced | set(taken))


def forced_tokens(n, page_size, policy):
    recent = max(0, n // page_size - policy.recent_pages) * page_size
    return sorted(set(range(min(n, policy.sink_tokens))) | set(range(recent, n)))


def softmax(e):
    w = np.exp(e - e.max())
    return w / w.sum()


def top_p(estimates, weights, p, min_tokens, margins):
    """Indices of the smallest set with mass >= p, ties at its weakest weight included. `estimates` rank as
    the weights do and say how far apart two of them are."""
    distinct = np.unique(estimates)[::-1]
    if p >= 1:
        return np.arange(len(estimates))
    mass, count = 0.0, 0
    for i, value in enumerate(distinct):
        level = estimates == value
        before = mass
        mass, count = mass + weights[level].sum(), count + int(level.sum())
        if mass >= p and count >= min(min_tokens, len(estimates)):
            if i + 1 < len(distinct):
                margins.weight = min(margins.weight, value - distinct[i + 1])
            margins.mass = min(margins.mass, abs(mass - p))
            # When min_tokens alone asked for this level, p was reached before it.
            margins.mass = min(margins.mass, abs(p - before))
            return np.flatnonzero(estimates >= value)
    return np.arange(len(estimates))


def attend(q, k, v, scale, tails=None):
    """q [G, D] over k, v [n, D] and, for each row of q, a tail: logs of masses and the vectors they weigh.
    Zeros where there is neither."""
    out = np.zeros_like(q)
    for g, row in enumerate(q):
        logs, vectors = k @ row * scale, v
        if tails and len(tails[g][0]):
            logs, vectors = np.concatenate([logs, tails[g][0]]), np.concatenate([vectors, tails[g][1]])
        if len(logs):
            out[g] = softmax(logs) @ vectors
    return out


def run(data, policy):
    """All expected arrays of one case, and the margins."""
    B, Hkv, G, D, P = (data[x] for x in ("B", "Hkv", "G", "D", "P"))
    lens, pages_per_seq = data["seq_lens"], data["pages_per_seq"]
    q = data["q"].astype(np.float64).reshape(B, Hkv, G, D)
    k, v = data["k"].astype(np.float64), data["v"].astype(np.float64)
    starts = np.concatenate([[0], np.cumsum(lens)]).astype(int)
    scale, margins, total = 1 / math.sqrt(D), Margins(), int(starts[-1])
    centroids = policy.summary in ("centroid", "sub_centroid")
    rotated = centroids or policy.key_bits == 2
    rotation = rotate(np.eye(D)).T.astype(np.float64)  # y = rotation @ x
    p = np.resize(np.asarray(policy.p, np.float32).astype(np.float64), (B, Hkv, G))

    a = {"summary_min": np.zeros((B, Hkv, pages_per_seq, D)), "summary_max": np.zeros((B, Hkv, pages_per_seq, D)),
         "page_scores": np.zeros((B, Hkv, pages_per_seq)),
         "centre_codes": np.zeros((B, Hkv, pages_per_seq, 4, D), np.uint8),
         "centre_scales": np.zeros((B, Hkv, pages_per_seq, 4), np.uint16),
         "deviant_codes": np.zeros((B, Hkv, pages_per_seq, D), np.uint8),
         "variance_bits": np.zeros((B, Hkv, pages_per_seq), np.uint16),
         "value_codes": np.zeros((B, Hkv, pages_per_seq, D), np.uint8),
         "value_bits": np.zeros((B, Hkv, pages_per_seq), np.uint16),
         "codes": np.zeros((total, Hkv, D), np.uint8),
         "scale_bits": np.zeros((total, Hkv), np.uint16), "zero_bits": np.zeros((total, Hkv), np.uint16),
         "candidate_counts": np.zeros((B, Hkv), np.int32),
         "candidates": np.full((B, Hkv, pages_per_seq), -1, np.int32),
         "estimates": np.full((B, Hkv, G, pages_per_seq * P), -np.inf),
         "head_counts": np.zeros((B, Hkv, G), np.int32), "head_mass": np.zeros((B, Hkv, G)),
         "log_masses": np.zeros((B, Hkv, G, pages_per_seq)),
         "tail_mass": np.zeros((B, Hkv, G, pages_per_seq)), "tail_shift": np.full((B, Hkv, G), -np.inf),
         "kept_counts": np.zeros((B, Hkv), np.int32), "kept": np.full((B, Hkv, max(lens)), -1, np.int32),
         "out": np.zeros((B, Hkv, G, D)), "dense_out": np.zeros((B, Hkv, G, D))}

    for b in range(B):
        n = lens[b]
        sealed = n // P
        for h in range(Hkv):
            keys, values = k[starts[b]:starts[b] + n, h], v[starts[b]:starts[b] + n, h]
            records, means, logs = [], [], np.zeros((G, sealed))
            for page in range(sealed):
                at = slice(page * P, (page + 1) * P)
                if rotated:
                    record = index_rotated(keys[at].astype(np.float32), policy.summary, policy.key_bits)
                    records.append(record)
                    a["centre_codes"][b, h, page] = record["centre_codes"]
                    a["centre_scales"][b, h, page] = record["centre_scales"].view(np.uint16)
                    a["variance_bits"][b, h, page] = record["variance"].view(np.uint16)
                    if centroids:
                        a["deviant_codes"][b, h, page] = record.get("deviant_codes", 0)
                        for g in range(G):
                            y = rotation @ q[b, h, g]
                            logs[g, page] = page_log_mass(record, y, policy.summary, P, scale)
                if policy.tail:
                    codes, s, mean = index_values(values[at].astype(np.float32))
                    a["value_codes"][b, h, page] = codes
                    a["value_bits"][b, h, page] = s.view(np.uint16)
                    means.append(mean)
                if not centroids and policy.summary != "none":
                    low, high = summarise(keys[at], policy.summary)
                    a["summary_min"][b, h, page], a["summary_max"][b, h, page] = low, high
                    per_head = [np.maximum(q[b, h, g] * low, q[b, h, g] * high).sum() for g in range(G)]
                    a["page_scores"][b, h, page] = max(per_head) * scale
            if centroids and sealed:
                shares = logs - np.array([log_sum(row) for row in logs])[:, None]
                a["log_masses"][b, h, :, :sealed] = logs
                a["page_scores"][b, h, :sealed] = [log_sum(column) - math.log(G) for column in shares.T]
            pages = choose_pages(a["page_scores"][b, h], n, P, policy, margins)
            a["candidate_counts"][b, h] = len(pages)
            a["candidates"][b, h, :len(pages)] = pages

            estimated = keys.copy()
            if policy.key_bits == 2 and sealed:
                where = slice(starts[b], starts[b] + sealed * P)
                a["codes"][where, h] = np.concatenate([record["codes"] for record in records])
                a["scale_bits"][where, h] = np.concatenate([record["scales"] for record in records]).view(np.uint16)
                estimated[:sealed * P] = np.concatenate([record["keys"] for record in records]) @ rotation
            elif policy.key_bits and sealed:
                codes, s, z = quantise(keys[:sealed * P], policy.key_bits)
                where = slice(starts[b], starts[b] + sealed * P)
                a["codes"][where, h] = codes
                a["scale_bits"][where, h], a["zero_bits"][where, h] = s.view(np.uint16), z.view(np.uint16)
                estimated[:sealed * P] = dequantise(codes, s, z)
            tokens = np.array([j for page in pages for j in range(page * P, min((page + 1) * P, n))], int)
            places = np.array([i * P + j - page * P for i, page in enumerate(pages)
                               for j in range(page * P, min((page + 1) * P, n))], int)
            forced = set(forced_tokens(n, P, policy))
            assert forced <= set(tokens.tolist())
            union, rows, shares = set(forced), [], []
            for g in range(G if n else 0):
                e = np.array([np.dot(q[b, h, g], estimated[j]) for j in tokens]) * scale
                a["estimates"][b, h, g, places] = e
                rows.append(e)
                shares.append(softmax(e))
            for g, e in enumerate(rows):
                if policy.criterion == "none":
                    own = tokens
                elif policy.criterion == "group_mean":
                    mean = np.mean(shares, axis=0)
                    own = tokens[top_p(np.log(mean), mean, p[b, h].max(), policy.min_tokens, margins)]
                else:
                    own = tokens[top_p(e, shares[g], p[b, h, g], policy.min_tokens, margins)]
                own = forced | set(own.tolist())
                a["head_counts"][b, h, g] = len(own)
                union |= own
            kept = np.array(sorted(union), int)
            for g, e in enumerate(rows):
                a["head_mass"][b, h, g] = softmax(e)[np.isin(tokens, kept)].sum()
            a["kept_counts"][b, h] = len(kept)
            a["kept"][b, h, :len(kept)] = kept
            tails = []
            for g, e in enumerate(rows):
                a["tail_shift"][b, h, g] = e.max()
                for i, page in enumerate(pages):
                    dropped = (tokens // P == page) & ~np.isin(tokens, kept)
                    a["tail_mass"][b, h, g, i] = np.exp(e[dropped] - e.max()).sum()
                some = [i for i in range(len(pages)) if a["tail_mass"][b, h, g, i] > 0]
                far = []
                for page in sorted(set(range(sealed)) - set(pages)) if policy.far_tail else []:
                    lead = a["page_scores"][b, h, page] - (math.log(policy.far_floor / sealed)
                                                           if policy.far_floor else -np.inf)
                    margins.page = min(margins.page, abs(lead))
                    far += [page] if lead >= 0 else []
                masses = np.concatenate([np.log(a["tail_mass"][b, h, g, some]) + e.max(), logs[g, far]])
                tails.append((masses, [means[page] for page in [pages[i] for i in some] + far])
                             if policy.tail else ([], []))
            a["out"][b, h] = attend(q[b, h], keys[kept], values[kept], scale, tails)
            a["dense_out"][b, h] = attend(q[b, h], keys, values, scale)
    for name in ("head_counts", "head_mass", "log_masses", "tail_mass", "tail_shift", "out", "dense_out"):
        a[name] = a[name].reshape(B, Hkv * G, *a[name].shape[3:])
    unused = []
    if policy.select != "score":
        unused += ["page_scores"]
    if policy.select != "score" or centroids:
        unused += ["summary_min", "summary_max"]
    if not policy.far_tail:
        unused += ["log_masses"]
    if not rotated:
        unused += ["centre_codes", "centre_scales", "variance_bits"]
    if policy.summary != "centroid":
        unused += ["deviant_codes"]
    if not policy.tail:
        unused += ["value_codes", "value_bits", "tail_mass", "tail_shift"]
    if not policy.key_bits:
        unused += ["codes", "scale_bits"]
    if policy.key_bits in (0, 2):
        unused += ["zero_bits"]
    if policy.criterion == "none":
        unused += ["estimates", "head_mass", "head_counts"]
    return {name: x for name, x in a.items() if name not in unused}, margins


# --- inputs ---------------------------------------------------------------------------------------------


def draw(rng, seq_lens, Hkv, G, D, P, heat):
    """Keys with channel offsets, as rotary keys have; each query leans to a few keys of its own."""
    B, total = len(seq_lens), sum(seq_lens)
    k = rng.normal(size=(total, Hkv, D)) + 2 * rng.normal(size=(1, Hkv, D)) * (rng.random((1, Hkv, D)) < 0.1)
    v = rng.normal(size=(total, Hkv, D))
    q = rng.normal(size=(B, Hkv, G, D))
    start = 0
    for b, n in enumerate(seq_lens):
        for h in range(Hkv):
            for g in range(G if n else 0):
                for j in rng.integers(0, n, 3):
                    q[b, h, g] += heat * k[start + j, h]
        start += n
    return {"B": B, "Hkv": Hkv, "G": G, "D": D, "P": P, "seq_lens": list(seq_lens),
            "pages_per_seq": max(-(-n // P) for n in seq_lens), "q": to_bf16(q.reshape(B, Hkv * G, D)),
            "k": to_bf16(k), "v": to_bf16(v)}


def main_data(rng):
    data = draw(rng, [200, 77], 2, 3, 64, 16, 0.5)
    data["k"][3, 0] = data["k"][3, 0, 0]  # all channels equal: scale 0
    data["k"][19, 1] *= np.float32(2.0**-40)  # scale and zero both round to 0
    data["k"][40, 0] *= np.float32(2.0**-17)  # scale is a subnormal half
    return data


def odd_data(rng):
    """Page size that is no multiple of 16, empty, one-token and exactly full sequences."""
    return draw(rng, [53, 0, 1, 40], 1, 2, 64, 5, 0.5)


def grouped_data(rng):
    """No open page in one sequence; one query head per KV head; D = 128."""
    return draw(rng, [96, 33], 2, 1, 128, 16, 0.4)


def tied_data(rng):
    """Pages 2, 4 and 6 are copies of page 1, and every token appears twice in its page."""
    data = draw(rng, [150], 1, 2, 64, 16, 0.5)
    for x in (data["k"], data["v"]):
        x[:144].reshape(9, 2, 8, *x.shape[1:])[:, 1] = x[:144].reshape(9, 2, 8, *x.shape[1:])[:, 0]
        for page in (2, 4, 6):
            x[page * 16:page * 16 + 16] = x[16:32]
    mean = data["k"][16:24, 0].mean(axis=0)
    data["q"][0] = to_bf16(data["q"][0] + 2 * mean)  # so that the copies compete for the last places
    return data


def sink_data(rng):
    """Token 0 takes nearly all of the mass: the set of one token reaches p."""
    data = draw(rng, [90], 1, 4, 64, 16, 0.0)
    direction = rng.normal(size=64)
    data["q"] = to_bf16(data["q"] * 0.5 + 1.5 * direction)
    data["k"][0, 0] = to_bf16(2 * direction)
    return data


def turned_data(rng):
    data = draw(rng, [170, 61], 2, 3, 64, 16, 0.5)
    data["k"][20, 0] = 0
    data["k"][32:48, 1] = data["k"][32, 1]  # no residuals
    return data


def turned_odd_data(rng):
    """D of two blocks, pages of 7 tokens (runs of 2, 2, 2 and 1), no and few tokens."""
    return draw(rng, [75, 0, 3, 35], 1, 2, 80, 7, 0.5)


DATA = {"main": main_data, "odd": odd_data, "grouped": grouped_data, "tied": tied_data, "sink": sink_data,
        "turned": turned_data, "turned_odd": turned_odd_data}
CASES = {
    "quest_int4_per_head": ("main", Policy(fraction=0.5, p=[0.9, 0.8, 0.95])),
    "quest_min_candidates": ("main", Policy(fraction=0.1, min_candidates=100, max_candidates=120, p=[0.7],
                                            sink_tokens=20, recent_pages=2)),
    "quest4_int8": ("main", Policy(summary="quest4", fraction=0.5, key_bits=8, p=[0.9])),
    "full_int4": ("main", Policy(select="all", p=[0.95, 0.5, 0.98], sink_tokens=0, recent_pages=0)),
    "full_p_one": ("grouped", Policy(select="all", p=[1.0])),
    "quest_no_group": ("grouped", Policy(fraction=0.6, p=[0.85, 0.95])),
    "quest_no_prune": ("grouped", Policy(fraction=0.4, criterion="none", key_bits=0)),
    "streaming": ("odd", Policy(select="forced", criterion="none", key_bits=0, sink_tokens=7, recent_pages=3)),
    "odd_pages": ("odd", Policy(fraction=0.5, p=[0.8, 0.9], sink_tokens=2, min_tokens=3)),
    "ties": ("tied", Policy(fraction=0.55, p=[0.6], sink_tokens=1)),
    "sink_dominated": ("sink", Policy(select="all", p=[0.8], min_tokens=12, sink_tokens=1, recent_pages=0)),
}
CASES |= {
    "centroid_bits2_group": ("turned", Policy(summary="centroid", fraction=0.6, key_bits=2, criterion="group_mean",
                                              tail=True, p=[0.9, 0.8, 0.85])),
    "sub_centroid_mass": ("turned", Policy(summary="sub_centroid", fraction=1.0, mass=0.85, mass_floor=32, key_bits=2,
                                           tail=True, p=[0.8, 0.9, 0.95])),
    "own_centre_full": ("turned", Policy(select="all", summary="none", key_bits=2, criterion="group_mean", p=[0.95],
                                         min_tokens=20)),
    "quest4_bits2": ("turned", Policy(summary="quest4", fraction=0.5, key_bits=2, tail=True, p=[0.9])),
    "centroid_bits4_tail": ("turned", Policy(summary="centroid", fraction=0.5, key_bits=4, criterion="group_mean",
                                             tail=True, p=[0.7])),
    "group_ties": ("tied", Policy(select="all", criterion="group_mean", tail=True, p=[0.6], sink_tokens=1)),
    "far_tail": ("turned", Policy(summary="centroid", fraction=0.3, key_bits=2, criterion="group_mean", tail=True,
                                  far_tail=True, p=[0.9])),
    "far_tail_of_every_page": ("turned_odd", Policy(summary="sub_centroid", fraction=0.3, key_bits=2, tail=True,
                                                    far_tail=True, far_floor=0, p=[0.8, 0.7])),
    "turned_odd_mass": ("turned_odd", Policy(summary="sub_centroid", fraction=0.8, mass=0.6, key_bits=2,
                                             criterion="group_mean", tail=True, p=[0.85], min_tokens=3, sink_tokens=2)),
    "turned_odd_centroid": ("turned_odd", Policy(summary="centroid", fraction=0.5, key_bits=2, tail=True,
                                                 p=[0.8, 0.9], sink_tokens=2)),
}
ARRAY_DTYPES = {"f": ("f32", "<f4"), "i": ("i32", "<i4")}


def write(path, arrays):
    entries, blob = [], bytearray()
    for name, x in arrays.items():
        if name in ("q", "k", "v"):
            kind, raw = "bf16", bf16_bits(x).astype("<u2")
        elif x.dtype in (np.uint8, np.uint16):
            kind, raw = f"u{8 * x.itemsize}", x.astype("<" + x.dtype.str[1:])
        else:
            kind, target = ARRAY_DTYPES[x.dtype.kind]
            raw = x.astype(target)
        blob += bytes(-len(blob) % 16)
        entries.append({"name": name, "dtype": kind, "shape": list(x.shape), "offset": len(blob)})
        blob += raw.tobytes()
    path.write_bytes(blob)
    return entries


def find(name, cases):
    """First seed for which every case on this data set has wide margins."""
    for seed in range(3000):
        data = DATA[name](np.random.default_rng([seed, sorted(DATA).index(name)]))
        results = {}
        for case, policy in cases.items():
            arrays, margins = run(data, policy)
            if not margins.wide():
                break
            results[case] = (arrays, margins)
        else:
            return seed, data, results
    raise SystemExit(f"no seed gives {name} wide margins")


def dump(document):
    """JSON with one line for each innermost object or list."""
    def line(x, indent):
        pad = " " * indent
        inner = x.values() if isinstance(x, dict) else x
        flat = not any(isinstance(y, dict) or isinstance(y, list) and any(isinstance(z, (dict, list)) for z in y)
                       for y in inner)
        if flat:
            return json.dumps(x)
        if isinstance(x, dict):
            body = [f'{pad} "{key}": {line(y, indent + 1) if isinstance(y, (dict, list)) else json.dumps(y)}'
                    for key, y in x.items()]
            return "{\n" + ",\n".join(body) + "\n" + pad + "}"
        return "[\n" + ",\n".join(f"{pad} {line(y, indent + 1)}" for y in x) + "\n" + pad + "]"
    return line(document, 0) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent)
    out = parser.parse_args().out
    datasets, listed = [], []
    for name in DATA:
        cases = {case: policy for case, (of, policy) in CASES.items() if of == name}
        seed, data, results = find(name, cases)
        arrays = {x: data.pop(x) for x in ("q", "k", "v")}
        file = f"data_{name}.bin"
        datasets.append({"name": name, "file": file, "seed": seed, **data, "arrays": write(out / file, arrays)})
        for case, (expected, margins) in results.items():
            file = f"case_{case}.bin"
            policy = dataclasses.asdict(cases[case])
            policy["p"] = np.resize(policy["p"], data["B"] * data["Hkv"] * data["G"]).tolist()
            limits = {x: (float(y) if math.isfinite(y) else None) for x, y in vars(margins).items()}
            listed.append({"name": case, "data": name, "file": file, "policy": policy, "margins": limits,
                           "arrays": write(out / file, expected)})
            print(f"{case}: data {name} seed {seed}, candidates {expected['candidate_counts'].tolist()}, "
                  f"kept {expected['kept_counts'].tolist()}, margins {limits}")
    (out / "manifest.json").write_text(dump({"data": datasets, "cases": listed}))


if __name__ == "__main__":
    main()
