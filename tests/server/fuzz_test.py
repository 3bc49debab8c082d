"""Malformed requests from a seeded generator: none may hang, crash or get another answer than an
error in OpenAI's shape. TWILIGHT_FUZZ_REQUESTS sets how many."""
import http.client
import json
import os
import random
import unittest

import serve_lib

COUNT = int(os.environ.get("TWILIGHT_FUZZ_REQUESTS", "1500"))
SEED = 20250101

FIELDS = ["prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
          "top_k", "seed", "n", "stop", "logprobs", "top_logprobs", "echo", "stream",
          "stream_options", "logit_bias", "user", "best_of", "suffix", "attn_p", "attention",
          "model", "ignore_eos", "response_format", "tools", "presence_penalty"]
ATOMS = [None, True, False, 0, 1, -1, 2, 1 << 31, -(1 << 63), (1 << 64) - 1, 1e308, -0.0, 0.5,
         1e-320, "", "a", "\x00", "\u20ac\U0001f600", "x" * 3000, "dense", "quest:-1", "quest:1e9",
         "vesper-19m", [], {}, [[]], [{}], {"a": None}, [1, 2, 3], [[1], [2, "3"]], [-1], [4095],
         [1.5], {"role": "user"}, [{"role": "user", "content": "a"}],
         [{"role": "user", "content": [{"type": "text"}]}], {"include_usage": "x"}, {"0": 1e9}]


def value(rng, depth=0):
    if depth < 3 and rng.random() < 0.2:
        if rng.random() < 0.5:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(ATOMS)


def json_body(rng):
    """Mostly right fields, some of them bad; short work where all are good."""
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    if rng.random() < 0.5:
        del body[rng.choice(list(body))]
    for _ in range(rng.randrange(1, 5)):
        body[rng.choice(FIELDS)] = value(rng)
    # What can be right must end at once.
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
        if isinstance(body.get(name), int) and body[name] > 2:
            body[name] = 1 << 40
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 1
    return json.dumps(body).encode("utf-8", "surrogatepass")


def damage(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 2:
            del data[at:at + rng.randrange(1, 40)]
        else:
            data[at:at] = data[at:at + rng.randrange(1, 60)]
    return bytes(data)


class FuzzTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_lib.Server("--ctx", 1024, "--read-timeout", 0.5, "--max-body", 1,
                                      "--log-level", "error")

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0

    def check_reply(self, status, body, what):
        if status in (200, 499):
            return
        self.assertIn(status, (400, 404, 413, 429, 503), what)
        error = json.loads(body)["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"}, what)
        self.assertNotIn("\n", error["message"])

    def test_json(self):
        rng = random.Random(SEED)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        for i in range(COUNT):
            body = json_body(rng)
            if rng.random() < 0.3:
                body = damage(rng, body)
            path = rng.choice(["/v1/completions", "/v1/chat/completions"])
            what = f"request {i}: {path} {body!r}"
            try:
                connection.request("POST", path, body)
                reply = connection.getresponse()
                data = reply.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                # Between requests a connection may have reached its end.
                connection.close()
                connection.request("POST", path, body)
                reply = connection.getresponse()
                data = reply.read()
            self.check_reply(reply.status, data, what)
        connection.close()
        self.server.completion("After", max_tokens=1)

    def test_raw(self):
        rng = random.Random(SEED + 1)
        whole = [serve_lib.post_bytes("/v1/completions", {"prompt": "a", "max_tokens": 1}),
                 b"GET /health HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n",
                 b"GET /v1/models HTTP/1.1\r\nRange: bytes=0-1,5-\r\nConnection: close\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"10\r\n{\"prompt\": \"a\", \r\n11\r\n\"max_tokens\": 1}  \r\n0\r\n\r\n"]
        for i in range(COUNT):
            data = damage(rng, rng.choice(whole))
            reply = self.server.raw(data)
            if reply:
                self.assertTrue(reply.startswith(b"HTTP/1.1 "), f"request {i}: {data!r}: {reply!r}")
        self.server.completion("After", max_tokens=1)
