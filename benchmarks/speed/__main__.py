"""x"""

import argparse, os

os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path
from rounds import overhead
import sys

size, sites, per, rounds = sys.argv[1], *map(int, sys.argv[2:5])
print(overhead(Path(f"/tmp/speeddata"), size, sites, per, rounds))
