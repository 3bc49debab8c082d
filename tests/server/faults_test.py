"""What clients and machines do wrong; after each the server still serves."""
import contextlib
import gzip
import json
import os
import signal
import subprocess
import threading
import time
import unittest

import serve_lib

LONG = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}


def first_chunk(server, sock, **fields):
    """Begins a stream and waits for its first token."""
    sock.sendall(serve_lib.post_bytes("/v1/completions", {"stream": True, **fields}))
    data = b""
    while b"data: " not in data:
        part = sock.recv(4096)
        if not part:
            raise AssertionError("closed early: " + data.decode())
        data += part
    return data


class FaultsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_lib.Server("--ctx", 4096, "--cache-tokens", 16384, "--max-body", 0.25,
                                      "--read-timeout", 2, "--write-timeout", 30,
                                      "--stream-buffer", 400, "--max-connections", 80)

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0

    def tearDown(self):
        serve_lib.wait_for(self.server.idle)
        self.assertEqual(
            self.server.completion("Still here", max_tokens=1)["usage"]["completion_tokens"], 1)

    def test_client_gone_mid_stream(self):
        with contextlib.closing(self.server.connect()) as sock:
            head = first_chunk(self.server, sock, prompt="A client that leaves", **LONG)
        request = json.loads(head.split(b"data: ")[1].split(b"\n")[0])["id"]
        record = self.server.wait_record(lambda r: r.get("id") == request, 30)
        self.assertEqual((record["status"], record["outcome"]), (499, "client_gone"))
        self.assertLess(record["completion_tokens"], 3000)

    def test_client_gone_while_waiting(self):
        with contextlib.closing(self.server.connect()) as sock:
            sock.sendall(serve_lib.post_bytes("/v1/completions", {"prompt": "Gone", **LONG}))
            serve_lib.wait_for(lambda: not self.server.idle())
        record = self.server.wait_record(
            lambda r: r.get("outcome") == "client_gone" and not r["stream"], 30)
        self.assertLess(record["completion_tokens"], 3000)

    def test_slow_reader(self):
        """One who does not read loses the stream, and others are not held up."""
        with contextlib.closing(self.server.connect(receive_buffer=2048)) as sock:
            first_chunk(self.server, sock, prompt="A slow reader", **LONG, logprobs=5)
            start = time.monotonic()
            self.server.completion("Another", max_tokens=4)
            self.assertLess(time.monotonic() - start, 60)
            record = self.server.wait_record(lambda r: r.get("outcome") == "slow_reader")
            self.assertLess(record["completion_tokens"], 3000)
        self.assertGreaterEqual(self.server.metric("twilight_slow_readers_total"), 1)

    def test_oversize_bodies(self):
        big = json.dumps({"prompt": "a" * (1 << 20)}).encode()
        status, _, body = self.server.request("POST", "/v1/completions", big)
        self.assertEqual((status, body["error"]["code"]), (413, "too_large"))
        chunked = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                   + b"".join(b"1000\r\n" + b"[" * 4096 + b"\r\n" for _ in range(200)))
        self.assertIn(b" 413 ", self.server.raw(chunked))
        bomb = gzip.compress(b" " * (64 << 20))
        status, _, body = self.server.request("POST", "/v1/completions", bomb,
                                              {"Content-Encoding": "gzip"})
        self.assertEqual(status, 413, body)
        said = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"
        self.assertIn(b" 413 ", self.server.raw(said))

    def test_odd_requests(self):
        for data, status in ((b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"400"),
                             (b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
                             (b"nonsense\r\n\r\n", b"400"),
                             (b"GET / HTTP/9.9\r\n\r\n", b"400"),
                             (b"GET /" + b"a" * 10000 + b" HTTP/1.1\r\n\r\n", b"414"),
                             (b"GET /\r\n" + b"X: y\r\n" * 50000, b"400"),
                             (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400")):
            reply = self.server.raw(data)
            self.assertEqual(reply[:13].split(b" ")[1:2], [status], (data[:60], reply[:200]))
        headers = b"GET /health HTTP/1.1\r\n" + b"X-Y: z\r\n" * 50000 + b"\r\n"
        self.assertIn(b" 400 ", self.server.raw(headers))
        deep = b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}"
        status, _, body = self.server.request("POST", "/v1/completions", deep)
        self.assertEqual((status, body["error"]["code"]), (400, "invalid_json"))
        status, _, _ = self.server.request("POST", "/v1/completions", b'{"prompt": "\xff\xfe"}')
        self.assertEqual(status, 400)
        ranged = self.server.request("GET", "/v1/models", headers={"Range": "bytes=0-3"})
        self.assertEqual((ranged[0], ranged[2]["object"]), (200, "list"))

    def test_slow_request(self):
        """A request that trickles in is cut off, however steadily it trickles."""
        start = time.monotonic()
        with contextlib.closing(self.server.connect()) as sock:
            data = serve_lib.post_bytes("/v1/completions", {"prompt": "a" * 500})
            with contextlib.suppress(OSError):
                for byte in data:
                    sock.sendall(bytes([byte]))
                    time.sleep(0.05)
                    if time.monotonic() - start > 15:
                        break
        self.assertLess(time.monotonic() - start, 12)

    def test_too_many_connections(self):
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(contextlib.closing(self.server.connect()))
                     for _ in range(90)]
            socks[-1].settimeout(2)
            reply = b""
            for sock in reversed(socks):
                with contextlib.suppress(OSError):
                    sock.settimeout(0.2)
                    reply = sock.recv(4096)
                    if reply:
                        break
            self.assertIn(b" 503 ", reply)
            self.assertIn(b"Retry-After", reply)
        time.sleep(0.5)

    def test_many_streams(self):
        """64 streams at once all end well."""
        results = []

        def ask(i):
            events = self.server.stream("/v1/completions", prompt=f"Stream {i}", max_tokens=6,
                                        temperature=0, ignore_eos=True)
            results.append(events[-1]["choices"][0]["finish_reason"])
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, ["length"] * 64)


class PressureTest(unittest.TestCase):
    def test_port_in_use(self):
        with serve_lib.Server("--ctx", 512) as server:
            second = subprocess.run(
                [serve_lib.PROGRAM, "serve", "--model", serve_lib.vesper(), "--port",
                 str(server.port)], capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(second.returncode, 1)
            self.assertEqual(second.stderr.count("\n"), 1)
            self.assertIn(f"127.0.0.1:{server.port}: Address already in use", second.stderr)
            self.assertEqual(server.request("GET", "/health")[0], 200)

    def test_full_queue(self):
        with serve_lib.Server("--ctx", 4096, "--max-seqs", 1, "--max-queue", 1) as server:
            socks = []
            try:
                statuses = []
                for i in range(4):
                    sock = server.connect()
                    socks.append(sock)
                    sock.sendall(serve_lib.post_bytes("/v1/completions",
                                                      {"prompt": f"Full {i}", **LONG}))
                    time.sleep(0.3)
                    sock.settimeout(0.2)
                    with contextlib.suppress(OSError):
                        statuses.append(sock.recv(200))
                self.assertTrue(statuses)
                self.assertIn(b" 429 ", statuses[0])
                self.assertIn(b"Retry-After: 1", statuses[0])
            finally:
                for sock in socks:
                    sock.close()

    def test_terminate_under_load(self):
        """Requests that end within the grace do, others end with an error, and the exit is 0."""
        with serve_lib.Server("--ctx", 4096, "--grace", 1.5, "--max-seqs", 4) as server:
            results = []

            def ask(i, tokens):
                try:
                    events = server.stream("/v1/completions", prompt=f"Load {i}", temperature=0,
                                           max_tokens=tokens, ignore_eos=True)
                    last = events[-1]
                    results.append(last["error"]["code"] if "error" in last
                                   else last["choices"][0]["finish_reason"])
                except AssertionError as error:
                    results.append(str(error))
            threads = [threading.Thread(target=ask, args=(i, 4000)) for i in range(8)]
            for thread in threads:
                thread.start()
            serve_lib.wait_for(lambda: server.metric("twilight_completion_tokens_total") > 0 or
                               not server.idle())
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                status, _, body = server.post("/v1/completions", prompt="late", max_tokens=1)
                self.assertEqual((status, body["error"]["code"]), (503, "shutdown"))
            start = time.monotonic()
            self.assertEqual(server.process.wait(30), 0)
            self.assertLess(time.monotonic() - start, 20)
            for thread in threads:
                thread.join()
            self.assertEqual(len(results), 8)
            self.assertIn("shutdown", results)
            self.assertLessEqual(set(results), {"shutdown", "length"})

    def test_more_than_the_cache_holds(self):
        """Requests that one by one fit end well, however many come at once."""
        with serve_lib.Server("--ctx", 1024, "--cache-tokens", 1024, "--max-seqs", 4) as server:
            status, _, body = server.post("/v1/completions", prompt=[7] * 1000, max_tokens=100)
            self.assertEqual((status, body["error"]["code"]), (400, "context_length_exceeded"))
            results = []

            def ask(i):
                status, _, body = server.post("/v1/completions", prompt=[20 + i] * 300,
                                              max_tokens=400, ignore_eos=True, temperature=0)
                results.append((status, body["usage"]["completion_tokens"]))
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(results, [(200, 400)] * 4)
            self.assertGreater(server.metric("twilight_preemptions_total"), 0)
            # One that takes every page, those of the prefix cache included.
            self.assertGreater(server.metric("twilight_pages_cached"), 0)
            body = server.completion([9] * 1000, max_tokens=24, ignore_eos=True, temperature=0)
            self.assertEqual(body["usage"]["completion_tokens"], 24)
            self.assertEqual(server.metric("twilight_pages_free") +
                             server.metric("twilight_pages_cached"),
                             server.metric("twilight_pages_total"))

    def test_no_thread_is_left(self):
        with serve_lib.Server("--ctx", 512) as server:
            server.completion("One", max_tokens=1)
            tasks = f"/proc/{server.process.pid}/task"
            before = len(os.listdir(tasks))
            for i in range(40):
                server.completion(f"Again {i}", max_tokens=1)
            self.assertLessEqual(len(os.listdir(tasks)), before + 4)
