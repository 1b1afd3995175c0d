"""What turns pictures into codes, the targets of masked image modelling.

Each of them has ``num_codes``, ``stride`` (pixels of its own view to one code), ``input_size`` (side of that view for a
picture of the model's), ``encode`` (pixels in [0, 1] -> int64 [B, N], row-major) and ``decode``; and ``kind`` and
``config_dict`` for those who write it down.
"""

from __future__ import annotations

from trivium.models.dvae import DVae
from trivium.models.patch_codebook import PatchCodebook

ImageTokenizer = DVae | PatchCodebook
