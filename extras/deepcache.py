"""DeepCache (Ma, Fang & Wang 2024, section 3.2): most of the UNet only at every n-th step.

    with deepcache(sd.unet, every=3):
        images = sd.generate("a red apple")

From step to step the deep features change slowly. In the steps between, all blocks but the first
and the last give what they gave before.
"""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from model import TimestepEmbedSequential, UNetModel
from sd import UserError


class DeepCachedBlock(TimestepEmbedSequential):
    """A block that computes at every n-th call with the same context, and repeats itself between.

    The calls are counted for each context (the same tensor), since guidance may run the network
    once for all conditions, or once for each.
    """
    every: int
    kept: WeakTensorKeyDictionary  # context -> number of calls, rows of x, output

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, *args, **kwargs) -> Tensor:
        calls, rows, out = self.kept.get(context, (0, None, None))
        if calls % self.every == 0 or rows != len(x):
            out = super().forward(x, emb, context, *args, **kwargs)
        self.kept[context] = calls + 1, len(x), out
        return out


@contextmanager
def deepcache(unet: nn.Module, every: int) -> Iterator[None]:
    """Within, compute the deep blocks of `unet` at every `every`-th call only (1: at every call).

    Raises UserError if `every` is below 1, or if the network has no such blocks.
    """
    if every < 1:
        raise UserError("the deep blocks must be computed at every step (1), every second (2) or"
                        f" the like, not {every}")
    if not isinstance(unet, UNetModel):
        raise UserError(f"DeepCache needs the blocks of a UNetModel; this is a"
                        f" {type(unet).__name__}: leave --deepcache out")
    deep = [*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks[:-1]]
    other = [type(block) for block in deep if type(block) is not TimestepEmbedSequential]
    if other:
        raise UserError(f"DeepCache does not know the blocks of this UNet ({other[0].__name__}):"
                        " leave --deepcache out")
    for block in deep:
        block.__class__, block.every, block.kept = DeepCachedBlock, every, WeakTensorKeyDictionary()
    try:
        yield
    finally:
        for block in deep:
            block.__class__ = TimestepEmbedSequential
            del block.every, block.kept
