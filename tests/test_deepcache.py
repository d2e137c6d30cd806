"""extras/deepcache.py: deep blocks at every n-th step only."""
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from extras import fast, lowmem
from extras.deepcache import deepcache
from extras.edit import draw
from model import TimestepEmbedSequential, UNetModel
from sd import UserError
from tests.common import (
    SMALL,
    disc_mask,
    levels_apart,
    photograph,
    random_model,
    randomize,
    reference_unet,
    relative_error,
    small,
    with_prefix,
)


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
def test_deep_features_match_diffusers_with_the_last_block_given_them(optimized):
    """Every third call is whole. Between, diffusers' last block is given what came up to it in
    the whole one. Two contexts are counted apart."""
    sd = random_model()
    unet = sd.unet
    reference = reference_unet(SMALL.unet, with_prefix("model.diffusion_model.",
                                                       unet.state_dict()))
    if optimized:
        fast.optimize(sd)
    deep = []

    def give(block: nn.Module, args: tuple) -> tuple:
        came, skip = args[0].split([args[0].shape[1] - 32, 32], dim=1)
        if whole:
            deep.append(came)
        return torch.cat([deep[-1], skip], dim=1), *args[1:]
    reference.up_blocks[-1].resnets[-1].register_forward_pre_hook(give)
    contexts, wanted = list(torch.randn(2, 1, 77, 32)), {}

    def x(call: int) -> Tensor:
        return torch.full((1, 4, 16, 16), call + 1.0)
    for which, context in enumerate(contexts):
        for call in range(5):
            whole = call % 3 == 0
            wanted[which, call] = reference(x(call), 900 - call, context).sample
    alone = unet(x(1), torch.tensor([899]), contexts[0])
    with deepcache(unet, 3):
        for call in range(5):
            for which, context in enumerate(contexts):
                found = unet(x(call), torch.tensor([900 - call]), context=context)
                assert relative_error(found, wanted[which, call]) < 1e-5
    assert relative_error(alone, wanted[0, 1]) > 1e-3
    assert torch.equal(unet(x(1), torch.tensor([899]), contexts[0]), alone)


@pytest.mark.parametrize("optimized", [False, True])
def test_deep_blocks_at_every_nth_step(optimized):
    """At every step: nothing changes. With guidance for a share of the steps, or row by row, the
    blocks are computed when they must be."""
    sd, computed = random_model(), []
    if optimized:
        fast.optimize(sd)
    sd.unet.middle_block[0].register_forward_hook(lambda *_: computed.append(1))

    def count(every: int | None = None, **options) -> tuple[np.ndarray, int]:
        computed.clear()
        if every is None:
            return np.asarray(draw(sd, "a cat", steps=6, **options)[0]), len(computed)
        with deepcache(sd.unet, every):
            return np.asarray(draw(sd, "a cat", steps=6, **options)[0]), len(computed)
    picture, calls = count()
    assert np.array_equal(count(1)[0], picture) and calls == 6
    other, calls = count(3)
    assert not np.array_equal(other, picture) and calls == 2
    assert count(3, cfg_end=0.5)[1] == 2  # one for each batch
    lowmem.attach(sd)
    two_passes, calls = count(3)
    assert calls == 4 and levels_apart(two_passes, other) <= 1
    assert count(3, cfg_end=0.5)[1] == 3
    lowmem.detach(sd)
    assert np.array_equal(count()[0], picture)


FURTHER = {"sd2": {}, "sdxl": {}, "sd1-inpaint": dict(image=photograph(), mask=disc_mask()),
           "instruct-pix2pix": dict(image=photograph())}


@pytest.mark.parametrize("row", FURTHER)
def test_a_batch_equals_its_pictures_one_by_one(row):
    """Also with little memory: as many passes as there are rows."""
    sd = random_model(small(row))
    fast.optimize(sd)
    settings = dict(steps=3, negative_prompt="a dog", sampler="euler_a") | FURTHER[row]

    def pictures(seed: int, batch: int = 1) -> list:
        with deepcache(sd.unet, 2):
            return draw(sd, "a cat", seed=seed, batch=batch, **settings)
    together = pictures(7, 2)
    for attach in (None, lowmem.attach):
        if attach is not None:
            attach(sd)
        alone = [pictures(7 + i)[0] for i in range(2)]
        assert max(map(levels_apart, together, alone)) <= 1
    assert levels_apart(*together) > 10


def test_rows_may_change_between_calls():
    """One context, batches of different sizes: nothing of another size is given."""
    unet = randomize(UNetModel(SMALL.unet))
    context = torch.randn(1, 9, 32)
    with torch.no_grad(), deepcache(unet, 3):
        for rows in (1, 2, 2, 1):
            x = torch.randn(rows, 4, 8, 8)
            out = unet(x, torch.ones(rows), context.expand(rows, -1, -1) if rows > 1 else context)
            assert out.shape == x.shape


def test_what_is_refused():
    class Block(TimestepEmbedSequential):
        pass

    class Network(nn.Module):
        pass

    unet = UNetModel(SMALL.unet)
    with pytest.raises(UserError, match=r"must be computed at every step \(1\)"):
        deepcache(unet, 0).__enter__()
    with pytest.raises(UserError, match="this is a Network: leave --deepcache out"):
        deepcache(Network(), 2).__enter__()
    unet.middle_block.__class__ = Block
    with pytest.raises(UserError, match="blocks of this UNet"):
        deepcache(unet, 2).__enter__()
    assert not any("Cached" in type(module).__name__ for module in unet.modules())
