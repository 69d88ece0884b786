"""Before torch is imported: one thread a process.

The models of the tests are tiny. Threads that wait for each other cost more than they save, and far more when the tests
run in several processes.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
