"""OpenAI's interface, seen from outside."""
import json
import unittest

import serve_lib

PROMPT = "It was a cold morning and the"


class ProtocolTest(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.server = serve_lib.Server("--ctx", 4096, "--cache-tokens", 16384)

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0

    def complete(self, prompt=PROMPT, **fields):
        return self.server.completion(prompt, **{"temperature": 0, "max_tokens": 8, **fields})

    def refused(self, status, code, path="/v1/completions", param=None, **fields):
        got, _, body = self.server.post(path, **fields)
        self.assertEqual(got, status, body)
        self.assertEqual(set(body["error"]), {"message", "type", "param", "code"})
        self.assertEqual(body["error"]["code"], code, body)
        if param:
            self.assertEqual(body["error"]["param"], param)
        return body["error"]

    def test_models_and_health(self):
        _, _, models = self.server.request("GET", "/v1/models")
        self.assertEqual([m["id"] for m in models["data"]], ["vesper-19m"])
        self.assertEqual(self.server.request("GET", "/v1/models/vesper-19m")[2]["object"], "model")
        self.assertEqual(self.server.request("GET", "/v1/models/other")[0], 404)
        status, _, health = self.server.request("GET", "/health")
        self.assertEqual((status, health["status"], health["model"]), (200, "ok", "vesper-19m"))
        self.assertIn("<title>Twilight</title>", self.server.request("GET", "/")[2])

    def test_completion(self):
        body = self.complete()
        self.assertEqual(body["object"], "text_completion")
        choice, = body["choices"]
        self.assertTrue(choice["text"])
        self.assertEqual(choice["finish_reason"], "length")
        self.assertIsNone(choice["logprobs"])
        usage = body["usage"]
        self.assertEqual(usage["completion_tokens"], 8)
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + 8)
        self.assertIn("cached_tokens", usage["prompt_tokens_details"])
        self.assertTrue(0 < usage["kv_bytes_ratio"] <= 1.5)
        self.assertEqual(self.complete()["choices"], body["choices"])

    def test_prompt_forms(self):
        one = self.complete("The sea")["choices"][0]["text"]
        two = self.complete("A letter")["choices"][0]["text"]
        both = self.complete(["The sea", "A letter"], n=2)["choices"]
        self.assertEqual([c["index"] for c in both], [0, 1, 2, 3])
        self.assertEqual([c["text"] for c in both], [one, one, two, two])
        ids = self.complete([5, 6, 7])["choices"][0]["text"]
        lists = self.complete([[5, 6, 7], [5, 6, 7]])["choices"]
        self.assertEqual([c["text"] for c in lists], [ids, ids])

    def test_seeds(self):
        hot = {"temperature": 1, "max_tokens": 24}
        a = self.complete(seed=1, **hot)["choices"]
        self.assertEqual(self.complete(seed=1, **hot)["choices"], a)
        self.assertNotEqual(self.complete(seed=2, **hot)["choices"], a)
        pair = self.complete(seed=1, n=2, **hot)["choices"]
        self.assertEqual(pair[0]["text"], a[0]["text"])
        self.assertNotEqual(pair[1]["text"], pair[0]["text"])

    def test_echo_logprobs(self):
        body = self.complete(max_tokens=1, echo=True, logprobs=2)
        choice, = body["choices"]
        logprobs = choice["logprobs"]
        count = body["usage"]["prompt_tokens"] + 1
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            self.assertEqual(len(logprobs[name]), count, name)
        self.assertIsNone(logprobs["token_logprobs"][0])
        self.assertIsNone(logprobs["top_logprobs"][0])
        self.assertTrue(all(v <= 0 for v in logprobs["token_logprobs"][1:]))
        self.assertTrue(choice["text"].startswith(PROMPT))
        # The first token is the model's own, without text.
        for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"]))[1:]:
            self.assertEqual(choice["text"][offset:offset + len(token)], token)
        for value, top, token in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"],
                                          logprobs["tokens"]))[1:]:
            self.assertLessEqual(value, max(top.values()) + 1e-6)
            self.assertAlmostEqual(top[token], value, places=4)

    def test_scoring_keeps_the_generated_token(self):
        """Scoring clients drop the last entry, so it must be there even for an end token."""
        biased = self.complete("The end", max_tokens=1, echo=True, logprobs=1,
                               logit_bias={"1": 100})
        count = biased["usage"]["prompt_tokens"] + 1
        self.assertEqual(len(biased["choices"][0]["logprobs"]["tokens"]), count)

    def test_scoring_a_prompt(self):
        body = self.complete(max_tokens=0, echo=True, logprobs=1)
        self.assertEqual(body["choices"][0]["text"], PROMPT)
        self.assertEqual(len(body["choices"][0]["logprobs"]["tokens"]),
                         body["usage"]["prompt_tokens"])

    def test_logit_bias_and_end_token(self):
        text = self.complete(max_tokens=4, logit_bias={"300": 100})["choices"][0]
        self.assertEqual(text["finish_reason"], "length")
        ended = self.complete(logit_bias={"1": 100})
        self.assertEqual(ended["choices"][0]["finish_reason"], "stop")
        self.assertEqual(ended["choices"][0]["text"], "")

    def test_stop_strings(self):
        whole = self.complete(max_tokens=24)["choices"][0]["text"]
        # Across tokens: a piece from the middle of the text, cut at odd places.
        for at in range(6, 16):
            stop = whole[at:at + 7]
            choice = self.complete(max_tokens=24, stop=[stop, "never there"])["choices"][0]
            self.assertEqual(choice["text"], whole[:whole.index(stop)])
            self.assertEqual(choice["finish_reason"], "stop")
            events = self.server.stream("/v1/completions", prompt=PROMPT, temperature=0,
                                        max_tokens=24, stop=stop)
            text = "".join(e["choices"][0]["text"] for e in events)
            self.assertEqual(text, whole[:whole.index(stop)])

    def test_stream(self):
        whole = self.complete(logprobs=1)["choices"][0]
        events = self.server.stream("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=8,
                                    logprobs=1, stream_options={"include_usage": True})
        self.assertEqual(len({e["id"] for e in events}), 1)
        usage = events.pop()
        self.assertEqual(usage["choices"], [])
        self.assertEqual(usage["usage"]["completion_tokens"], 8)
        self.assertEqual("".join(e["choices"][0]["text"] for e in events), whole["text"])
        self.assertEqual([e["choices"][0]["finish_reason"] for e in events][-1], "length")
        tokens = [t for e in events if e["choices"][0]["logprobs"]
                  for t in e["choices"][0]["logprobs"]["tokens"]]
        self.assertEqual(tokens, whole["logprobs"]["tokens"])

    def test_chat(self):
        messages = [{"role": "system", "content": "Be short."},
                    {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        status, headers, body = self.server.post(
            "/v1/chat/completions", messages=messages, temperature=0, max_completion_tokens=6,
            logprobs=True, top_logprobs=2, stop="\n")
        self.assertEqual(status, 200, body)
        self.assertEqual(headers["X-Request-Id"], body["id"])
        self.assertEqual(body["object"], "chat.completion")
        choice, = body["choices"]
        self.assertEqual(choice["message"]["role"], "assistant")
        for entry in choice["logprobs"]["content"]:
            self.assertEqual(len(entry["top_logprobs"]), 2)
            self.assertEqual(bytes(entry["bytes"]).decode("utf-8", "replace"), entry["token"])
        events = self.server.stream("/v1/chat/completions", messages=messages, temperature=0,
                                    max_tokens=6, stop="\n")
        self.assertEqual(events[0]["choices"][0]["delta"]["role"], "assistant")
        self.assertEqual(events[0]["object"], "chat.completion.chunk")
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        self.assertEqual(text, choice["message"]["content"])
        self.assertIn(events[-1]["choices"][0]["finish_reason"], ("stop", "length"))

    def test_chat_choices(self):
        """Several choices, whole and streamed, a role for each, and fields without effect."""
        fields = {"messages": [{"role": "user", "content": "Hello"}], "n": 2, "seed": 4,
                  "max_completion_tokens": 5, "response_format": {"type": "text"},
                  "parallel_tool_calls": False, "user": "u", "metadata": {"a": "b"},
                  "store": False, "service_tier": "auto", "verbosity": "medium", "tools": None,
                  "stop": []}
        status, _, body = self.server.post("/v1/chat/completions", **fields)
        self.assertEqual(status, 200, body)
        texts = [c["message"]["content"] for c in body["choices"]]
        self.assertEqual([c["index"] for c in body["choices"]], [0, 1])
        self.assertNotEqual(texts[0], texts[1])
        self.assertEqual(body["usage"]["completion_tokens"], 10)
        events = self.server.stream("/v1/chat/completions", **fields)
        for index, text in enumerate(texts):
            deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == index]
            self.assertEqual([d for d in deltas if "role" in d], deltas[:1])
            self.assertEqual("".join(d.get("content", "") for d in deltas), text)
        self.assertNotIn("usage", events[0])

    def test_chat_takes_its_answers_back(self):
        """As clients hold a message, with what this server never fills."""
        hello = {"role": "user", "content": "Hello"}
        answer = {"role": "assistant", "content": "Good day.", "refusal": None, "annotations": [],
                  "audio": None, "function_call": None, "tool_calls": None}
        for messages in ([hello, answer, hello],
                         [hello, {**answer, "annotations": None, "tool_calls": []}, hello]):
            status, _, body = self.server.post("/v1/chat/completions", messages=messages,
                                               max_tokens=1)
            self.assertEqual(status, 200, body)

    def test_usage_of_streams(self):
        """Where a stream ends with its usage, every object before has null there."""
        for path, prompt in (("/v1/completions", {"prompt": PROMPT}),
                             ("/v1/chat/completions",
                              {"messages": [{"role": "user", "content": "Hello"}]})):
            events = self.server.stream(path, **prompt, max_tokens=4, ignore_eos=True,
                                        stream_options={"include_usage": True})
            self.assertEqual([e["usage"] for e in events[:-1]], [None] * (len(events) - 1))
            self.assertEqual(events[-1]["usage"]["completion_tokens"], 4)

    def test_no_share_of_the_mass(self):
        """top_p 0 leaves the likeliest token."""
        greedy = self.complete()["choices"][0]["text"]
        for seed in range(3):
            body = self.complete(temperature=1.5, top_p=0, seed=seed)
            self.assertEqual(body["choices"][0]["text"], greedy)

    def test_attention_fields(self):
        long = {"prompt": [9] * 3000, "max_tokens": 4, "temperature": 0}
        read = {}
        # "profile" is what the server has by itself: the profile that lies with the model.
        self.assertEqual(self.server.request("GET", "/health")[2]["attention"], "profile")
        for attention in ("dense", "adaptive", "profile", None):
            extra = {"attention": attention} if attention else {"attn_p": 0.5}
            status, _, body = self.server.post("/v1/completions", **long, **extra)
            self.assertEqual(status, 200, body)
            read[attention] = body["usage"]["kv_bytes_ratio"]
        self.assertEqual(read["dense"], 1)
        # Another index than the server keeps.
        error = self.refused(400, "invalid_value", prompt="a", attention="paper", param="attention")
        self.assertEqual(error["message"],
                         "attention: got \"paper\", accepted dense or a preset that reads the index "
                         "of 'profile', which this server keeps")
        self.assertEqual(error["type"], "invalid_request_error")
        self.refused(400, "invalid_value", prompt="a", attention="nothing", param="attention")
        self.refused(400, "invalid_value", prompt="a", attn_p=1.5, param="attn_p")
        self.refused(400, "invalid_value", prompt="a", attention="dense", attn_p=0.5)

    def test_refusals(self):
        chat = "/v1/chat/completions"
        self.refused(400, "invalid_value", param="prompt")
        self.refused(400, "invalid_value", prompt={})
        self.refused(400, "invalid_value", prompt=[[1], "a", 2])
        self.refused(400, "invalid_value", prompt=[1, 4096])
        self.refused(400, "invalid_value", prompt=[-1])
        self.refused(400, "invalid_value", prompt=[])
        self.refused(400, "invalid_value", prompt="a", max_tokens=-1, param="max_tokens")
        self.refused(400, "invalid_value", prompt="a", max_tokens=1.5)
        self.refused(400, "invalid_value", prompt="a", max_tokens=10 ** 30)
        self.refused(400, "invalid_value", prompt="a", temperature="hot", param="temperature")
        self.refused(400, "invalid_value", prompt="a", temperature=-0.1)
        self.refused(400, "invalid_value", prompt="a", top_p=-0.1, param="top_p")
        self.refused(400, "invalid_value", prompt="a", top_p=1.1)
        self.refused(400, "invalid_value", prompt="a", n=0)
        self.refused(400, "invalid_value", prompt="a", n=129)
        self.refused(400, "invalid_value", prompt=["a"] * 65, n=2)
        self.refused(400, "invalid_value", prompt="a", logprobs=21)
        error = self.refused(400, "invalid_value", prompt="a", best_of=2, param="best_of")
        self.assertIn("accepted n alone, which is 1", error["message"])
        self.refused(400, "invalid_value", prompt="a", best_of=1, n=2)
        self.refused(400, "invalid_value", prompt="a", stop=[""])
        self.refused(400, "invalid_value", prompt="a", stop=["x"] * 17)
        self.refused(400, "invalid_value", prompt="a", logit_bias={"4096": 1})
        self.refused(400, "invalid_value", prompt="a", logit_bias={"1": 101})
        self.refused(400, "invalid_value", prompt="a", stream_options={"include_usage": True})
        self.refused(400, "unsupported_parameter", prompt="a", suffix="b", param="suffix")
        self.refused(400, "unsupported_parameter", prompt="a", presence_penalty=1)
        self.refused(400, "unknown_parameter", prompt="a", foo=1, param="foo")
        self.refused(400, "context_length_exceeded", prompt=[5] * 4097, max_tokens=0)
        self.refused(400, "context_length_exceeded", prompt=[5] * 4090, max_tokens=7)
        self.refused(404, "model_not_found", prompt="a", model="gpt-4")
        error = self.refused(400, "invalid_value", chat, messages=[], param="messages")
        self.assertIn("got none, accepted a list of at least one", error["message"])
        self.refused(400, "invalid_value", chat, messages=[{"role": "tool", "content": "a"}])
        self.refused(400, "invalid_value", chat, messages=[{"role": "user"}])
        hello = [{"role": "user", "content": "a"}]
        self.refused(400, "unsupported_parameter", chat, tools=[{}], messages=hello, param="tools")
        for kind in ("json_object", "json_schema"):
            error = self.refused(400, "unsupported_parameter", chat, messages=hello,
                                 response_format={"type": kind}, param="response_format")
            self.assertIn('accepted {"type":"text"}', error["message"])
        self.refused(400, "unsupported_parameter", chat, messages=hello, reasoning_effort="low")
        self.refused(400, "unsupported_parameter", chat, messages=hello, tool_choice="auto")
        self.refused(400, "unsupported_parameter", chat,
                     messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}])
        self.refused(400, "invalid_value", chat, messages=hello, top_logprobs=2)
        self.refused(400, "invalid_value", chat, param="messages", messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
        self.assertEqual(self.server.request("PUT", "/v1/completions", "{}")[0], 405)
        self.assertEqual(self.server.request("GET", "/v1/completions")[0], 405)
        self.assertEqual(self.server.request("POST", "/v1/embeddings", "{}")[0], 404)

    def test_metrics_follow(self):
        before = self.server.metric("twilight_completion_tokens_total")
        self.complete(max_tokens=5)
        self.assertEqual(self.server.metric("twilight_completion_tokens_total"), before + 5)
        text = self.server.request("GET", "/metrics")[2]
        for name in ("twilight_time_to_first_token_seconds_bucket", "twilight_queue_seconds_count",
                     "twilight_time_per_output_token_seconds_sum", "twilight_pages_free",
                     'twilight_requests_ended_total{reason="length"}',
                     "twilight_kv_bytes_share_bucket"):
            self.assertIn(name, text)

    def test_log_line(self):
        body = self.complete()
        record = self.server.wait_record(lambda r: r.get("id") == body["id"])
        self.assertEqual((record["status"], record["completion_tokens"]), (200, 8))
        self.assertEqual(record["event"], "request")
        json.dumps(record)


class LimitsTest(unittest.TestCase):
    def test_api_key_and_rate(self):
        with serve_lib.Server("--api-key", "secret", "--rate", 0.01, "--burst", 2,
                              "--ctx", 1024) as server:
            def ask(key):
                return server.post("/v1/completions", {"Authorization": key} if key else None,
                                   prompt="a", max_tokens=1)
            for key in (None, "Bearer wrong", "Bearer secre", "Bearer secrett", "secret"):
                status, _, body = ask(key)
                self.assertEqual(status, 401)
                self.assertEqual(body["error"]["type"], "authentication_error")
            self.assertEqual(server.request("GET", "/v1/models")[0], 401)
            self.assertEqual(server.request("GET", "/health")[0], 200)
            statuses = [ask("Bearer secret") for _ in range(3)]
            self.assertEqual([s[0] for s in statuses], [200, 200, 429])
            self.assertGreaterEqual(int(statuses[2][1]["Retry-After"]), 1)
