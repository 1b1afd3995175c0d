"""``python -m trivium`` is the command ``trivium``."""

from __future__ import annotations

import sys

from trivium.cli import main

sys.exit(main())
