"""``python -m attnpass``."""

import sys

from attnpass.cli import main

if __name__ == "__main__":
    sys.exit(main())
