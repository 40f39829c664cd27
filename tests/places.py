"""Where the repository is, and the data that lies beside it where there is any."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
