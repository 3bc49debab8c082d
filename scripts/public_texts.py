#!/usr/bin/env python3
"""Writes public-domain novels as plain text, for evaluations on text the presets were not chosen by.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
    scripts/public_texts.py austen/usr/lib/R/site-library/janeaustenr/data texts/

The Debian package r-cran-janeaustenr holds Jane Austen's six novels as R character vectors, one
element a line. R keeps them in a lazy-load database: Rdata.rdb is records of a length (4 bytes, big
endian), for some a letter that names the compression, and compressed data that unserialise to one
object each.
"""

import argparse
import bz2
import lzma
import pathlib
import struct
import sys
import zlib

# XDR serialisation: version 2 or 3 header, then items that start with a 32-bit flag word whose low
# byte is the type.
STRSXP, CHARSXP = 16, 9
MIN_LINES = 1000  # shorter vectors are not novels


def records(database):
    """Uncompressed objects of a lazy-load database, found by their compression headers."""
    data = database.read_bytes()
    at = 0
    while at + 5 < len(data):
        size = struct.unpack_from(">I", data, at)[0]
        unpacker, skip = zlib.decompressobj(), 4
        if data[at + 4 : at + 5] == b"2":
            unpacker, skip = bz2.BZ2Decompressor(), 5
        elif data[at + 4 : at + 5] == b"Z":
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
            unpacker, skip = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), 5
        text = unpacker.decompress(data[at + skip :])
        if len(text) != size:
            sys.exit(f"public_texts: {database}: record at byte {at} has {len(text)} bytes, "
                     f"expected {size}")
        yield text
        rest = len(unpacker.unused_data)
        at = len(data) - rest


def strings(item):
    """Lines of a serialised character vector, or None for any other object."""
    at = 2 if item[:2] == b"X\n" else 0
    version = struct.unpack_from(">i", item, at)[0]
    at += 12
    if version == 3:  # the native encoding's name
        at += 4 + struct.unpack_from(">i", item, at)[0]
    flags, count = struct.unpack_from(">ii", item, at)
    if flags & 0xFF != STRSXP:
        return None
    at += 8
    lines = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", item, at)
        if flags & 0xFF != CHARSXP:
            return None
        at += 8
        lines.append(item[at : at + max(size, 0)].decode("utf-8", "replace"))
        at += max(size, 0)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=pathlib.Path, help="folder with Rdata.rdb")
    parser.add_argument("out", type=pathlib.Path, help="folder for the text files")
    args = parser.parse_args()
    database = args.data / "Rdata.rdb"
    if not database.is_file():
        sys.exit(f"public_texts: {database}: no such file; unpack r-cran-janeaustenr first")
    args.out.mkdir(parents=True, exist_ok=True)
    for item in records(database):
        lines = strings(item)
        if lines is None or len(lines) < MIN_LINES:
            continue
        title = next(line for line in lines if line.strip()).strip()
        name = "".join(c if c.isalnum() else "_" for c in title.title()).strip("_") + ".txt"
        (args.out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{args.out / name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
