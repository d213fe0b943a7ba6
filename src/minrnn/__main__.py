"""Entry point of `python -m minrnn`."""

import sys

from minrnn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
