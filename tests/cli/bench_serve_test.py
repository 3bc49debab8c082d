"""bench serve at small sizes: its own server, a running one, an interrupt, and what it refuses."""
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time

import cli_lib
from cli_lib import vesper, write

LOAD = ("--requests", 6, "--streams", 3, "--prompt-tokens", "40:200", "--output-tokens", "4,8",
        "--ctx", 512)
LATENCIES = ("first_token_seconds", "per_token_seconds", "gap_seconds", "total_seconds")


@contextlib.contextmanager
def running_server(*flags):
    process = subprocess.Popen([cli_lib.PROGRAM, "serve", "--model", vesper(), "--port", "0",
                                "--json", "--log-level", "off", *map(str, flags)],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        status = process.wait(60)
        process.stdout.close()
    if status != 0:  # e.g. what a sanitizer found
        raise AssertionError(f"the server ended with {status}")


class OddServer:
    """Answers /v1/models well and completions with what it is given."""

    def __init__(self, completion, context=512, hangs_up=False):
        self.completion = completion
        self.context = context
        self.hangs_up = hangs_up  # while a completion's body is being sent
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), contextlib.closing(connection):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, body = data.split(b"\r\n\r\n", 1)
            if self.hangs_up and head.startswith(b"POST"):
                # An end and then, because of what is unread, a reset: sending fails with EPIPE.
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.05)
                return
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    while len(body) < int(line.split(b":")[1]):
                        body += connection.recv(65536)
            path = head.split(b" ")[1]
            if path == b"/v1/models":
                text = b'{"data": [{"id": "odd", "max_model_len": %d}]}' % self.context
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                                   % (len(text), text))
            elif path == b"/metrics":
                connection.sendall(b"HTTP/1.1 404 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            else:
                connection.sendall(self.completion)


class BenchServe(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def check_result(self, result, requests):
        self.assertEqual((result["requests"], result["ok"]), (requests, requests))
        self.assertEqual(result["errors"], {})
        self.assertGreater(result["output_tokens_per_second"], 0)
        for name in LATENCIES:
            values = result[name]
            self.assertGreater(values["count"], 0, name)
            self.assertLessEqual(values["p50"], values["p90"])
            self.assertLessEqual(values["p99"], values["max"])
        self.assertGreaterEqual(result["total_seconds"]["p50"],
                                result["first_token_seconds"]["p50"])

    def test_own_server(self):
        out = os.path.join(self.folder, "load.json")
        flags = ("bench", "serve", *LOAD, "--attention", "dense,adaptive", "--dense-below", 0, "--dense-layers", 0,
                 "--min-candidates", 64, "--min-tokens", 8)
        report = self.run_json(*flags, "--out", out)
        with open(out, encoding="utf-8") as file:
            self.assertEqual(json.load(file), report)
        dense, adaptive = report["results"]
        self.assertEqual((dense["attention"], adaptive["attention"]), ("dense", "adaptive"))
        for result in (dense, adaptive):
            self.check_result(result, 6)
            self.assertTrue(result["pages_checked"])
            self.assertEqual(result["pages_lost"], 0)
            self.assertEqual(result["peak_streams"], 3)
            self.assertEqual(sum(c["ok"] for c in result["by_prompt_length"]), 6)
        # The same requests.
        for key in ("prompt_tokens", "completion_tokens"):
            self.assertEqual(dense[key], adaptive[key])
        self.assertEqual(dense["kv_bytes_ratio"], 1)
        self.assertLess(adaptive["kv_bytes_ratio"], 1)
        self.assertNotIn("output_rate_of_dense", report)
        self.assertGreater(adaptive["output_rate_of_dense"], 0)
        self.check_refused(2, ("[output]", "exists", out), *flags, "--out", out)
        table = self.run_ok("bench", "serve", *LOAD, "--attention", "dense")
        for part in ("first token", "p99", "3 streams", "every page given back"):
            self.assertIn(part, table.out)

    def test_running_server(self):
        with running_server("--ctx", 512, "--api-key", "secret") as url:
            key = write(os.path.join(self.folder, "key"), "secret\n")
            load = ("bench", "serve", "--url", url, *LOAD[:-2], "--documents", 1)
            report = self.run_json(*load, "--api-key-file", key, "--attention", "dense,adaptive",
                                   "--rounds", 2)
            self.assertEqual(report["model"], "vesper-19m")
            for result in report["results"]:
                self.check_result(result, 12)
                self.assertEqual(result["rounds"]["output_tokens_per_second"]["count"], 2)
                # A pass finds nothing of an earlier one in the prefix cache: prompts are shorter
                # than one of its blocks.
                self.assertEqual(result["cached_prompt_tokens"], 0)
            single = self.run_json("bench", "serve", "--url", url, "--api-key-file", key,
                                   "--rate", 20, "--requests", 3, "--prompt-tokens", 30,
                                   "--output-tokens", 4)
            (result,) = single["results"]
            self.assertEqual((result["attention"], single["rate"], single["streams"]),
                             ("server", 20, None))
            self.check_result(result, 3)
            refused = cli_lib.run(*load)
            self.assertEqual(refused.code, 1)
            self.assertIn("no server answers /v1/models at " + url + ": 401", refused.err)
            result = self.run_json(*load, "--api-key-file", key, "--attention", "paper",
                                   codes=(1,))["results"][0]
            self.assertEqual(result["ok"], 0)
            self.assertEqual(result["errors"], {"400 invalid_value": 6})

    def test_errors_by_kind(self):
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n"
        for answer, kind in (
                (b"", "read"),
                (b"HTTP/1.1 500 X\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno", "500"),
                (head + b'data: {"choices": [{"text": "a"}]}\n\n', "stream without an end"),
                (head + b'data: {"error": {"code": "shutdown"}}\n\ndata: [DONE]\n\n',
                 "stream shutdown"),
                (head + b'data: {"choices": [{"finish_reason": "stop"}]}\n\n',
                 "stream without an end"),
                (head + b"data: nonsense\n\ndata: [DONE]\n\n", "not JSON")):
            with self.subTest(kind):
                odd = OddServer(answer)
                self.addCleanup(odd.socket.close)
                report = self.run_json("bench", "serve", "--url", odd.url, *LOAD[:-2], codes=(1,))
                result = report["results"][0]
                self.assertEqual(result["errors"], {kind: 6})
                self.assertNotIn("pages_lost", result)

    def test_a_server_that_hangs_up_is_an_error(self):
        odd = OddServer(b"", context=65536, hangs_up=True)
        self.addCleanup(odd.socket.close)
        report = self.run_json("bench", "serve", "--url", odd.url, "--requests", 6, "--streams", 3,
                               "--prompt-tokens", 60000, "--output-tokens", 4, codes=(1,))
        self.assertEqual(sum(report["results"][0]["errors"].values()), 6)

    def test_no_room_for_threads(self):
        def little_address_space():
            resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))

        if cli_lib.run("--version", before=little_address_space).code != 0:
            self.skipTest("the program does not run in 4 GiB of addresses")
        odd = OddServer(b"")
        self.addCleanup(odd.socket.close)
        refused = cli_lib.run("bench", "serve", "--url", odd.url, "--streams", 4096,
                              "--duration", 100, "--prompt-tokens", 30,
                              before=little_address_space)
        self.assertEqual(refused.code, 1)
        self.assertRegex(refused.err, r"^twilight: \[load\] cannot start thread \d+ .*\n$")

    def test_interrupt(self):
        process = subprocess.Popen(
            [cli_lib.PROGRAM, "bench", "serve", "--json", "--ctx", "8192", "--streams", "2",
             "--duration", "300", "--prompt-tokens", "16", "--output-tokens", "20,8000",
             "--attention", "dense,adaptive"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, err), (130, b""))
        report = json.loads(out)
        self.assertTrue(report["interrupted"])
        (dense,) = report["results"]
        self.assertGreaterEqual(dense["cut"], 1)
        self.assertEqual(dense["errors"], {})
        self.assertEqual(dense["pages_lost"], 0)

    def test_refusals(self):
        for parts, flags in (
                (("[--prompt-tokens]", "got '9:3'", "accepted"), ("--prompt-tokens", "9:3")),
                (("[--output-tokens]", "got 'many'", "accepted"), ("--output-tokens", "many")),
                (("got 400 + 200", "accepted up to the server's 512"),
                 ("--ctx", 512, "--prompt-tokens", 400, "--output-tokens", 200)),
                (("--streams", "--rate", "excludes"), ("--rate", 1, "--streams", 2)),
                (("--rate", "0"), ("--rate", 0)),
                (("[attention]", "'nope'"), ("--attention", "dense,nope")),
                (("[--url]", "got 'localhost:1'", "accepted http://HOST:PORT"),
                 ("--url", "localhost:1")),
                (("--url", "--max-seqs", "excludes"), ("--url", "http://x", "--max-seqs", 2)),
                (("--api-key-file", "--url"), ("--api-key-file", "x"))):
            with self.subTest(flags):
                self.check_refused(2, parts, "bench", "serve", *flags)
        self.check_refused(1, ("[--url]", "no server answers", "connect"), "bench", "serve", "--url",
                           "http://127.0.0.1:1")
