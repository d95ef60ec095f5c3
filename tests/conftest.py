"""Several workers of pytest-xdist share the cores: one thread each, in the processes that tests start as well."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
