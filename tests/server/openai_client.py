#!/usr/bin/env python3
"""The official Python client against the server: openai_client.py PROGRAM SOURCE.

Exits with 77, which CTest reports as skipped, where the `openai` module is not installed.
"""
import sys

try:
    import openai
except ImportError:
    print("skipped: no Python module `openai`; pip install openai runs this test")
    sys.exit(77)

import serve_lib

MESSAGES = [{"role": "user", "content": "Hello, who are you?"}]


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def check_completions(client):
    whole = client.completions.create(model="vesper-19m", prompt="It was a cold", max_tokens=8,
                                      temperature=0, logprobs=2, echo=True, seed=1)
    choice = whole.choices[0]
    expect(choice.text.startswith("It was a cold"), choice.text)
    expect(choice.logprobs.token_logprobs[0] is None, "the first token has a logprob")
    expect(len(choice.logprobs.tokens) == whole.usage.total_tokens, "tokens and usage differ")
    pieces = list(client.completions.create(
        model="vesper-19m", prompt="It was a cold", max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True}))
    text = "".join(p.choices[0].text for p in pieces if p.choices)
    expect("It was a cold" + text == choice.text, "stream and whole differ")
    expect(pieces[-1].usage.completion_tokens == 8, "no usage at the end")
    several = client.completions.create(model="vesper-19m", prompt=["A", "B"], n=2, max_tokens=3)
    expect([c.index for c in several.choices] == [0, 1, 2, 3], "choices")
    sparse = client.completions.create(
        model="vesper-19m", prompt="A", max_tokens=2, extra_body={"attention": "adaptive",
                                                                  "attn_p": 0.9})
    expect(sparse.usage.model_extra["kv_bytes_ratio"] > 0, "no kv_bytes_ratio")


def check_chat(client):
    whole = client.chat.completions.create(model="vesper-19m", messages=MESSAGES, max_tokens=12,
                                           temperature=0, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    expect(choice.message.role == "assistant", choice.message.role)
    expect(all(len(t.top_logprobs) == 3 for t in choice.logprobs.content), "top_logprobs")
    with client.chat.completions.create(model="vesper-19m", messages=MESSAGES, max_tokens=12,
                                        temperature=0, stream=True) as stream:
        text = "".join(p.choices[0].delta.content or "" for p in stream)
    expect(text == choice.message.content, "stream and whole differ")
    for answer in (choice.message, choice.message.model_dump()):
        more = client.chat.completions.create(
            model="vesper-19m", messages=[*MESSAGES, answer, *MESSAGES], max_completion_tokens=2,
            n=2, stop=["\n", "--"], logit_bias={"300": -100})
        expect([c.index for c in more.choices] == [0, 1], "choices")


def check_errors(client, port):
    for fields, kind in (({"prompt": "a", "max_tokens": -1}, openai.BadRequestError),
                         ({"prompt": "a", "suffix": "b"}, openai.BadRequestError),
                         ({"prompt": "a", "model": "gpt-4"}, openai.NotFoundError)):
        try:
            client.completions.create(**{"model": "vesper-19m", **fields})
        except kind as error:
            expect(error.code, "no code")
        else:
            raise AssertionError(f"{fields} was accepted")
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="no")
    try:
        stranger.models.list()
    except openai.AuthenticationError as error:
        expect(error.code == "invalid_api_key", error.code)
    else:
        raise AssertionError("a wrong key was accepted")


def main():
    serve_lib.PROGRAM, serve_lib.SOURCE = sys.argv[1:]
    with serve_lib.Server("--ctx", 2048, "--api-key", "k3y") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="k3y",
                               max_retries=0)
        expect([m.id for m in client.models.list()] == ["vesper-19m"], "models")
        expect(client.models.retrieve("vesper-19m").object == "model", "model")
        check_completions(client)
        check_chat(client)
        check_errors(client, server.port)
    print(f"openai_client: PASSED with openai {openai.__version__}")


if __name__ == "__main__":
    main()
