#!/usr/bin/env python3
"""The page in headless Chromium: page_test.py PROGRAM SOURCE [PICTURE.png].

Sends messages as a user would and checks what the page shows. Exits with 77, which CTest reports as
skipped, where there is no Chromium.
"""
import os
import sys

import browser_lib
import serve_lib

SAY = "Tell me about the sea, the captain and the long winter at Lyme."
ANSWER = "[...document.querySelectorAll('.assistant')].map(e => e.textContent)"
SEND = """document.getElementById('input').value = %r;
document.getElementById('form').requestSubmit()"""


def check(browser):
    browser.wait("document.getElementById('model').textContent === 'vesper-19m'")
    browser.evaluate(SEND % SAY)
    browser.wait("Number(document.getElementById('speed').textContent) > 0")
    browser.wait("document.querySelectorAll('#map div[title]').length === 16")
    browser.wait("document.querySelectorAll('.note').length === 1")
    browser.wait("/^[0-9]+ %$/.test(document.getElementById('bytes').textContent)")
    browser.wait("document.getElementById('send').textContent === 'Send'")
    first = browser.evaluate(ANSWER)
    assert len(first) == 1 and first[0].strip(), first
    browser.evaluate("document.querySelector('[value=dense]').click()")
    browser.evaluate(SEND % "And then?")
    browser.wait("document.querySelectorAll('.note').length === 2")
    note = browser.evaluate("document.querySelectorAll('.note')[1].textContent")
    assert note.startswith("dense"), note
    bytes_read = browser.evaluate("document.getElementById('bytes').textContent")
    assert bytes_read == "100 %", bytes_read
    assert browser.evaluate("document.querySelectorAll('.error').length") == 0


def main():
    serve_lib.PROGRAM, serve_lib.SOURCE = sys.argv[1:3]
    binary = browser_lib.find()
    if binary is None:
        print("skipped: no Chromium on this machine")
        sys.exit(77)
    with serve_lib.Server("--ctx", 8192, "--dense-below", 0) as server:
        with browser_lib.Browser(binary) as browser:
            browser.open(f"http://127.0.0.1:{server.port}/")
            check(browser)
        if len(sys.argv) > 3:
            with browser_lib.Browser(binary) as browser:
                browser.open(f"http://127.0.0.1:{server.port}/")
                browser.wait("document.getElementById('model').textContent === 'vesper-19m'")
                novel = open(os.path.join(serve_lib.SOURCE, "data", "Persuasion.txt"),
                             encoding="utf-8").read(6000)
                browser.evaluate("turns.push({role: 'user', content: %r})" % novel)
                browser.evaluate(SEND % SAY)
                browser.wait("document.querySelectorAll('.note').length === 1")
                browser.screenshot(sys.argv[3])
                assert os.path.getsize(sys.argv[3]) < 300_000, "picture too large"
    print("page_test: PASSED")


if __name__ == "__main__":
    main()
