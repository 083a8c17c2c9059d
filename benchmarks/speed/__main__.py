"""x"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from rounds import overhead

size, sites, per, rounds = sys.argv[1], *map(int, sys.argv[2:5])
print(overhead(Path("/tmp/speeddata"), size, sites, per, rounds))
