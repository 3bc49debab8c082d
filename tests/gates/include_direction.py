#!/usr/bin/env python3
"""Fails on an include that goes upward or sideways between the layers.

    core <- quant <- kvcache <- ops <- backend/{ref,cpu,cuda}
                                ops <- sparse <- model <- engine <- server <- apps

`a <- b`: b may include a. Backends do not see each other; sparse, model and engine see no backend;
server sees only include/twilight and itself, apps only include/twilight, server and their own
folder. Outside headers of one backend stay in it.
"""

import argparse
import pathlib
import re

import gate_lib

CHAIN = ["core", "quant", "kvcache", "ops"]
BELOW = {name: set(CHAIN[:i]) for i, name in enumerate(CHAIN)}
for backend in ("ref", "cpu", "cuda"):
    BELOW[f"backend/{backend}"] = set(CHAIN)
BELOW["sparse"] = set(CHAIN)
BELOW["model"] = set(CHAIN) | {"sparse"}
BELOW["engine"] = set(CHAIN) | {"sparse", "model"}
BELOW["server"] = set()  # the public API alone

PUBLIC_ANYWHERE = {"types.h", "error.h", "export.h"}
PUBLIC_FROM_SPARSE = PUBLIC_ANYWHERE | {"policy.h", "stats.h"}
MAX_PUBLIC_HEADERS = 10

# Outside headers that belong to one backend.
FENCED = [
    (re.compile(r"^(oneapi/)?dnnl"), "backend/cpu", "oneDNN"),
    (re.compile(r"^hwy/"), "backend/cpu", "Highway"),
    (re.compile(r"^(cuda|cub|cublas|cudnn|nvrtc|thrust|cooperative_groups|mma)"), "backend/cuda",
     "CUDA"),
]
# Public headers are for everyone: C and C++ standard headers alone.
STANDARD = re.compile(r"^[a-z_0-9]+$|^std(def|int|bool)\.h$")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')


def layer_of(path):
    """Layer of a path relative to src/, or None."""
    parts = path.split("/")
    name = "/".join(parts[:2]) if parts[0] == "backend" else parts[0]
    return name if name in BELOW else None


def includes(path):
    """(line number, quoted name or None, angle name or None) of a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1), match.group(2)


def public_header_problem(name, layer):
    allowed = PUBLIC_ANYWHERE
    if layer in ("sparse", "model"):
        allowed = PUBLIC_FROM_SPARSE
    if layer in ("engine", "server") or name in allowed:
        return None
    return f"public header {name} is not for {layer}"


def check_src(root, path):
    relative = path.relative_to("src").as_posix()
    layer = layer_of(relative)
    if layer is None:
        yield f"{path}: folder is no known layer"
        return
    for number, quoted, angle in includes(root / path):
        where = f"{path}:{number}"
        for pattern, owner, what in FENCED:
            if pattern.match(quoted or angle) and layer != owner:
                yield f"{where}: {what} header outside {owner}"
        if quoted is None:
            if angle.startswith("twilight/"):
                yield f"{where}: own header {angle} in angle brackets"
            continue
        if quoted.startswith("twilight/"):
            name = quoted.removeprefix("twilight/")
            if not (root / "include" / quoted).is_file():
                yield f"{where}: {quoted} does not exist"
            elif problem := public_header_problem(name, layer):
                yield f"{where}: {problem}"
            continue
        if any(pattern.match(quoted) for pattern, _, _ in FENCED):
            continue
        target = layer_of(quoted)
        if target is None or ".." in quoted.split("/"):
            yield f"{where}: {quoted} is not written relative to src/ or include/"
        elif target != layer and target not in BELOW[layer]:
            yield f"{where}: {layer} must not include {quoted}"


def check_app(root, path):
    for number, quoted, angle in includes(root / path):
        where = f"{path}:{number}"
        if quoted is None:
            if any(pattern.match(angle) for pattern, _, _ in FENCED):
                yield f"{where}: apps must not include <{angle}>"
            continue
        own = "/" not in quoted and (root / path.parent / quoted).is_file()
        public = quoted.startswith("twilight/") and (root / "include" / quoted).is_file()
        server = quoted.startswith("server/") and (root / "src" / quoted).is_file()
        if not own and not public and not server:
            yield f"{where}: apps must not include {quoted}"


def check_public(root, path):
    for number, quoted, angle in includes(root / path):
        where = f"{path}:{number}"
        if quoted is not None and not (root / "include" / quoted).is_file():
            yield f"{where}: public header includes {quoted}, which is not public"
        if angle is not None and not STANDARD.match(angle):
            yield f"{where}: public header includes <{angle}>, which is not a standard header"


def check(root):
    """All findings of a source tree."""
    findings = []
    headers = gate_lib.sources(root, ("include",), {".h"})
    if len(headers) > MAX_PUBLIC_HEADERS:
        findings.append(f"include/: {len(headers)} public headers, accepted {MAX_PUBLIC_HEADERS}")
    code = {".h", ".cc", ".c", ".cu", ".cuh", ".in"}
    for path in headers:
        findings.extend(check_public(root, path))
    for path in gate_lib.sources(root, ("src",), code):
        if path.name != "CMakeLists.txt":
            findings.extend(check_src(root, path))
    for path in gate_lib.sources(root, ("apps",), code):
        if path.name != "CMakeLists.txt":
            findings.extend(check_app(root, path))
    return findings


def self_test():
    legal = {
        "include/twilight/types.h": "#include <cstdint>\n",
        "include/twilight/policy.h": '#include <string>\n#include "twilight/types.h"\n',
        "include/twilight/engine.h": '#include "twilight/policy.h"\n',
        "include/twilight/c.h": "#include <stdint.h>\n",
        "src/core/a.h": '#include "twilight/types.h"\n',
        "src/ops/b.h": '#include "core/a.h"\n#include "kvcache/c.h"\n',
        "src/kvcache/c.h": '#include "core/a.h"\n',
        "src/backend/cpu/d.cc": '#include <hwy/highway.h>\n#include "oneapi/dnnl/dnnl.hpp"\n'
                                '#include "backend/cpu/e.h"\n#include "ops/b.h"\n',
        "src/backend/cpu/e.h": "",
        "src/backend/cuda/f.cc": "#include <cuda_runtime.h>\n",
        "src/sparse/g.cc": '#include "twilight/policy.h"\n#include "ops/b.h"\n',
        "src/engine/h.cc": '#include "twilight/engine.h"\n#include "sparse/i.h"\n',
        "src/sparse/i.h": "",
        "src/server/j.h": '#include "twilight/engine.h"\n#include <httplib.h>\n',
        "src/server/k.cc": '#include "server/j.h"\n',
        "apps/run/main.cc": '#include "own.h"\n#include "twilight/engine.h"\n#include <json.hpp>\n'
                            '#include "server/j.h"\n',
        "apps/run/own.h": "",
    }
    many = {f"include/twilight/x{i}.h": "" for i in range(7)}
    cases = {
        "upward": ({"src/core/z.cc": '#include "ops/b.h"\n'}, "core must not include"),
        "backend from sparse": ({"src/sparse/z.cc": '#include "backend/cpu/e.h"\n'},
                                "sparse must not include"),
        "backend from engine": ({"src/engine/z.cc": '#include "backend/cpu/e.h"\n'},
                                "engine must not include"),
        "backend from ops": ({"src/ops/z.cc": '#  include "backend/cpu/e.h"\n'},
                             "ops must not include"),
        "sideways": ({"src/backend/ref/z.cc": '#include "backend/cpu/e.h"\n'},
                     "backend/ref must not include"),
        "model from sparse": ({"src/sparse/z.cc": '#include "model/z.h"\n'},
                              "sparse must not include"),
        "policy in ops": ({"src/ops/z.cc": '#include "twilight/policy.h"\n'}, "not for ops"),
        "engine's inside in server": ({"src/server/z.cc": '#include "engine/z.h"\n'},
                                      "server must not include"),
        "server from engine": ({"src/engine/z.cc": '#include "server/j.h"\n'},
                               "engine must not include"),
        "engine in model": ({"src/model/z.cc": '#include "twilight/engine.h"\n'}, "not for model"),
        "highway in quant": ({"src/quant/z.cc": "#include <hwy/highway.h>\n"}, "Highway"),
        "onednn in model": ({"src/model/z.cc": '#include "oneapi/dnnl/dnnl.hpp"\n'}, "oneDNN"),
        "cuda in cpu": ({"src/backend/cpu/z.cc": "#include <cuda_fp16.h>\n"}, "CUDA"),
        "dots": ({"src/core/z.cc": '#include "core/../ops/b.h"\n'}, "not written relative"),
        "beside": ({"src/core/z.cc": '#include "a.h"\n'}, "not written relative"),
        "unknown layer": ({"src/nowhere/z.cc": ""}, "no known layer"),
        "app goes inside": ({"apps/run/z.cc": '#include "core/a.h"\n'}, "apps must not include"),
        "app sideways": ({"apps/run/z.cc": '#include "../other/o.h"\n'}, "apps must not include"),
        "internal in public": ({"include/twilight/z.h": '#include "core/a.h"\n'}, "not public"),
        "third party in public": ({"include/twilight/z.h": "#include <nlohmann/json.hpp>\n"},
                                  "not a standard header"),
        "too many public headers": (many, "public headers"),
    }
    return gate_lib.expect_caught(check, legal, cases)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--self-test", action="store_true")
    flags = parser.parse_args()
    if flags.self_test:
        gate_lib.report(self_test(), "every planted violation was caught")
    gate_lib.report(check(flags.root), "all includes follow the layers")


if __name__ == "__main__":
    main()
