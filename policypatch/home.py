"""Where a checkout has its configuration."""

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
