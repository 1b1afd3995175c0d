"""torch.compile, block by block: one small graph for a whole stack of alike blocks, in seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Of one function, after which torch says so once and runs every further form uncompiled. Its own 8 are too few: a block
# is called with a mask and without, at all positions, the first or an index of them, and each of these first with sizes
# that are fixed, then with sizes that vary.
FORMS = 64


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor", dynamic: bool | None = None) -> None:
    """Compile each block in place, when it is first called.

    Args:
        dynamic: None: for sizes that vary once a second one is seen; False: for each anew, where there are few.
    """
    import torch._dynamo.config as dynamo  # here, since it takes a second to load

    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)
