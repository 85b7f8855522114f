"""The first pass over prompts: its kernels are compiled together, ahead of it."""

from collections.abc import Callable, Sequence

import torch

from qnext.cache.hybrid import HybridCache
from qnext.engine.inputs import state_slot
from qnext.engine.request import Request
from qnext.kernels.first_pass import compile_ahead_of


class FirstPass:
    """Compiles what a kind of pass launches before one is run for the first time.

    Args:
        cache: that passes write to.
        device: of the model.
    """

    def __init__(self, cache: HybridCache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.is_over = False

    def prepare(self, run: Callable[[], object], requests: Sequence[Request]) -> None:
        """Go through a pass as `compile_ahead_of` does, if it is the first.

        Args:
            requests: whose prompts the pass begins, so that all it leaves in the cache is written
                again, or cleared here.
        """
        if self.is_over:
            return
        self.is_over = True
        if compile_ahead_of(run, self.device):
            self.cache.reset_state([state_slot(request) for request in requests])
