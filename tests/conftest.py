"""Before torch is imported: one thread a process.

The models of the tests are tiny. Threads that wait for each other cost more than they save, and far more when the tests
run in several processes. And two forwards give the same bits then, whatever the environment says.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
