"""What only a GPU shows. Recorded steps without a GPU: test_fast.py."""
import numpy as np
import pytest
import torch

from extras import fast
from extras.attention_maps import AttentionStore, capture_attention
from extras.edit import draw
from sd import StableDiffusion
from tests.common import psnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optimized", [True, False])
def test_a_gpu_draws_what_the_cpu_draws(optimized):
    cpu = StableDiffusion.load(None, "cpu", torch.float32)
    gpu = StableDiffusion.load(None, "cuda", fast=optimized)
    assert gpu.unet.out[2].weight.dtype == torch.float16
    for prompt in "a red apple", "a penguin, twemoji", "a blue heart next to a red apple":
        assert psnr(gpu.generate(prompt)[0], cpu.generate(prompt)[0]) > 50


@pytest.mark.parametrize("how", [{}, {"batch": 3}, {"guidance": 1.0}, {"cfg_end": 0.5},
                                 {"sampler": "euler_a"}, {"width": 96}], ids=str)
def test_cuda_graph_matches_eager(monkeypatch, how):
    """Pictures, with attention maps and without, and the maps, to the last bit.

    With maps nothing is recorded. Without, one graph for each prompt, or two with guidance for a
    part of the steps.
    """
    sd, found = StableDiffusion.load(None, "cuda"), []
    recorded, record = [], torch.cuda.graph

    def counted_record(*args, **settings):
        recorded.append(1)
        return record(*args, **settings)

    monkeypatch.setattr(torch.cuda, "graph", counted_record)
    for graph_device in "cuda", "none":
        monkeypatch.setattr(fast, "GRAPH_DEVICE", graph_device)
        store, pair = AttentionStore(), "a blue heart next to a red apple"
        with capture_attention(sd.unet, store):
            images = draw(sd, pair, steps=6, callback=store.step, **how)
        images += draw(sd, pair, steps=6, **how)
        images += draw(sd, "a red apple", steps=6, **how)
        found.append([*map(np.asarray, images), store.mean().numpy()])
        assert len(recorded) == (4 if "cfg_end" in how else 2)
    assert all(np.array_equal(replayed, computed) for replayed, computed in zip(*found))
