"""Prints the fixture of a wheel."""

import json
import sys
from pathlib import Path

from tests.kernels.contracts import extract

print(json.dumps(extract(Path(sys.argv[1])), indent=1))
