"""`python -m minrnn` is `minrnn`."""

import sys

from minrnn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
