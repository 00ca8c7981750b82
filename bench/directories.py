"""Which directories do the benches use, and which modules of demo/ and tests/?"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "bench"
RESULTS = ROOT / "bench" / "results"

# From demo/: the S3 server and the real model. From tests/: servers with faults, running engines,
# containers. Both are directories of scripts, not packages.
for borrowed in (ROOT / "demo", ROOT / "tests", ROOT / "tests" / "e2e", ROOT / "tests" / "image"):
    if str(borrowed) not in sys.path:
        sys.path.append(str(borrowed))
