"""What holds for the slow tests: they use what lies beside the others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
