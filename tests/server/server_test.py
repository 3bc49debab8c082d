#!/usr/bin/env python3
"""Runs the server's test modules: server_test.py PROGRAM SOURCE MODULE..."""
import importlib
import sys
import unittest

import serve_lib


def main():
    serve_lib.PROGRAM, serve_lib.SOURCE, *names = sys.argv[1:]
    suite = unittest.TestSuite(
        unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(name))
        for name in names)
    if suite.countTestCases() == 0:
        sys.exit("server_test: no tests")
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    if result.wasSuccessful():
        print("server_test: PASSED")
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
