"""Test processes that run side by side compute on one thread each: with a team of threads on every core
they would spend their time waiting for each other. Tests that are about threads set their own number."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and no test is yet
