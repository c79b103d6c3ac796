"""`python -m s2d3d COMMAND ...` is the command `s2d3d`."""

import sys

from .console import main

if __name__ == "__main__":
    sys.exit(main())
