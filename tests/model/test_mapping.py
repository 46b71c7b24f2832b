"""The handler that ends the process when a mapped file is truncated."""

import subprocess
import sys

TWO_THREADS = """
import os, threading, time
from model import mapping

def write_slowly(*arguments):  # it releases the GIL, as os.write does
    write(*arguments)
    time.sleep(0.2)

write, os.write = os.write, write_slowly
for _ in range(2):
    threading.Thread(target=mapping._end, args=(7,)).start()
"""


def test_two_threads_that_read_a_truncated_file_report_it_once():
    result = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1


INACCESSIBLE = """
from pathlib import Path
from model import mapping
mapping._mapped[Path("x" * 5000)] = 1
mapping._end(7)
"""


def test_a_file_that_has_become_inaccessible_ends_the_process():
    """If the handler raised an exception, the read that failed would be repeated for ever."""
    result = subprocess.run([sys.executable, "-c", INACCESSIBLE], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == f"error: {'x' * 5000} was truncated while in use: restore the complete file\n"
