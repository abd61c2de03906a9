"""`python -m tundp`."""

import sys

from tundp.cli import main

if __name__ == "__main__":
    sys.exit(main())
