#!/usr/bin/env python3
"""The page in headless Chromium: page_test.py PROGRAM SOURCE [PICTURE.png].

Sends messages as a user would and checks what the page shows; with PICTURE.png also draws a longer
conversation. Exits with 77, which CTest reports as
skipped, where there is no Chromium.
"""
import os
import re
import sys

import browser_lib
import serve_lib

SAY = "Tell me about the sea, the captain and the long winter at Lyme."
FACT = "The special magic number for quiet river is 7493158."
CUE = "What is the special magic number for quiet river? The special magic number for quiet river is"
PROSE = "Anne walked along the beach with Captain Wentworth, and"
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
    # Plain text goes on where it ends.
    browser.evaluate("""turns.length = 0; document.getElementById('plain').click();
        document.getElementById('temperature').value = 0""")
    browser.evaluate(SEND % ("It was a cold morning. " + FACT + " " + CUE))
    browser.wait("document.querySelectorAll('.note').length === 3")
    assert re.match(r"\d{7}\.", browser.evaluate(ANSWER)[2]), browser.evaluate(ANSWER)
    assert browser.evaluate("document.querySelectorAll('.error').length") == 0


def draw(browser, picture):
    """A conversation about a long text: a fact found in it twice, then prose, half written."""
    novel = open(os.path.join(serve_lib.SOURCE, "data", "Persuasion.txt"), encoding="utf-8").read()
    start = novel.index("Chapter 12")
    text = " ".join(novel[start:start + 18000].split())
    middle = text.index(". ", 7000) + 2
    question = text[:middle] + FACT + " " + text[middle:text.rindex(". ") + 1] + "\n" + CUE
    browser.evaluate("document.getElementById('plain').click()")
    for number, (say, attention, tokens, heat) in enumerate(
            ((question, "dense", 9, 0), (CUE, "twilight", 9, 0), (PROSE, "twilight", 160, 0.6))):
        browser.evaluate(f"""document.querySelector('[value={attention}]').click();
            document.getElementById('tokens').min = document.getElementById('tokens').step = 1;
            for (const [id, value] of [["tokens", {tokens}], ["temperature", {heat}]]) {{
                document.getElementById(id).value = value;
                document.getElementById(id).dispatchEvent(new Event("input"));
            }}""")
        browser.evaluate(SEND % say)
        if tokens < 99:
            browser.wait(f"document.querySelectorAll('.note').length === {number + 1}", 300)
            browser.wait("document.getElementById('send').textContent === 'Send'")
    browser.wait("Number(document.getElementById('count').textContent) >= 56", 300)
    browser.screenshot(picture)


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
            with browser_lib.Browser(binary, height=960) as browser:
                browser.open(f"http://127.0.0.1:{server.port}/")
                browser.wait("document.getElementById('model').textContent === 'vesper-19m'")
                draw(browser, sys.argv[3])
            assert os.path.getsize(sys.argv[3]) < 300_000, "picture too large"
    print("page_test: PASSED")


if __name__ == "__main__":
    main()
