"""Tests of the twilight program from outside. Usage: cli_test.py PROGRAM SOURCE_DIR [unittest
arguments]. The last line tells the outcome."""
import sys
import unittest

import cli_lib


def main():
    cli_lib.PROGRAM, cli_lib.SOURCE = sys.argv[1:3]
    names = sys.argv[3:] or ["usage_test", "models_test", "gguf_test", "commands_test",
                             "model_profile_test"]
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    result = unittest.TextTestRunner(verbosity=1).run(suite)
    passed = result.testsRun - len(result.failures) - len(result.errors) - len(result.skipped)
    ok = result.wasSuccessful() and result.testsRun > 0
    print(f"cli_test: {'PASSED' if ok else 'FAILED'}, {passed} of {result.testsRun} passed, "
          f"{len(result.skipped)} skipped")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
