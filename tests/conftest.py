"""Settings of the whole suite."""

import os

# Tensors here are tiny, so threads cost more than they bring, and on a busy machine they spin while they wait for each
# other. Set before torch starts its pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
