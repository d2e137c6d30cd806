"""extras/lowmem.py: one network on the device at a time, one row, one tile."""
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from extras import fast, lowmem
from extras.edit import draw
from sampler import NoiseSchedule, cfg, make_denoiser
from sd import StableDiffusion
from tests.common import (
    ROOT,
    disc_mask,
    levels_apart,
    photograph,
    psnr,
    random_model,
    small,
)


@pytest.mark.parametrize("optimized", [False, True])
def test_lowmem_draws_the_same(optimized):
    """Row by row, and one tile for the whole: the same picture to the last rounding."""
    sd = random_model()
    if optimized:
        fast.optimize(sd)
    plain = sd.generate("a cat", "a dog", steps=4, batch=2)
    classes = type(sd.unet), type(sd.vae)
    lowmem.attach(sd)
    for one, other in zip(plain, sd.generate("a cat", "a dog", steps=4, batch=2)):
        assert levels_apart(one, other) <= 1 and np.asarray(one).std() > 1
    lowmem.attach(sd)  # a second time
    assert levels_apart(sd.generate("a cat", "a dog", steps=4)[0], plain[0]) <= 1
    lowmem.detach(sd)
    assert (type(sd.unet), type(sd.vae)) == classes
    assert not any(network._forward_pre_hooks for network in (sd.unet, *sd.text_encoders))
    assert all(map(np.array_equal, sd.generate("a cat", "a dog", steps=4, batch=2), plain))


FURTHER = {"sd2": {}, "sdxl": {}, "sd1-inpaint": dict(image=photograph(), mask=disc_mask()),
           "instruct-pix2pix": dict(image=photograph())}


@pytest.mark.parametrize("row", FURTHER)
def test_a_batch_equals_its_pictures_one_by_one(row):
    """As many passes as there are rows."""
    sd = random_model(small(row))
    settings = dict(steps=3, negative_prompt="a dog", sampler="euler_a") | FURTHER[row]
    together = draw(sd, "a cat", seed=7, batch=2, **settings)
    for attach in (None, lowmem.attach):
        if attach is not None:
            attach(sd)
        alone = [draw(sd, "a cat", seed=7 + i, **settings)[0] for i in range(2)]
        assert max(map(levels_apart, together, alone)) <= 1
    assert levels_apart(*together) > 10


@torch.no_grad()
def test_rows_one_by_one():
    """The numbers of the whole batch, to 60 dB; the UNet inside sees one row at a time, and the
    same tensor for a row of the context at every call."""
    sd = random_model(small("sdxl"))
    fast.optimize(sd)
    cond, uncond = (sd.encode_prompt([prompt] * 2) for prompt in ("a cat", "a dog"))
    denoise = cfg(make_denoiser(sd.unet, NoiseSchedule()), cond, uncond, 7.5)
    x = torch.randn(2, 4, 8, 8)
    plain = denoise(x, 7.0)
    lowmem.attach(sd)
    seen = []
    sd.unet.middle_block.register_forward_pre_hook(lambda _, args: seen.append(args))
    for _ in range(2):
        assert psnr(denoise(x, 7.0), plain, np.ptp(plain.numpy())) > 60
    assert [len(args[0]) for args in seen] == [1] * 8
    assert all(a[2] is b[2] for a, b in zip(seen[:4], seen[4:]))
    cond["context"].mul_(2)
    rows = lowmem.rows_of(cond["context"], 2)
    cond["context"].add_(1)
    assert torch.equal(torch.cat(lowmem.rows_of(cond["context"], 2)), cond["context"])
    assert not torch.equal(torch.cat(rows), cond["context"])


def test_lowmem_takes_its_networks_off_the_device(monkeypatch):
    """On the meta device, which computes nothing and holds nothing: each network is there only
    while it works, also after an error."""
    sd, seen = random_model(), []
    names = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoders[0]}
    x, t, context = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 77, 32)

    def moved(module: torch.nn.Module, device: object) -> torch.nn.Module:
        name, = (name for name, network in names.items() if network is module)
        seen.append((name, str(device)))
        return module
    lowmem.attach(sd, "meta")
    assert sd.device.type == "meta"
    assert not any(p.is_meta for network in names.values() for p in network.parameters())
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    for _ in range(2):
        with pytest.raises(RuntimeError):  # the inputs are there, the weights only as if
            sd.unet(x, t, context)
        assert seen == [("unet", "meta")]
    with pytest.raises(RuntimeError):
        sd.vae.decode(x)
    assert seen[1:] == [("unet", "cpu"), ("vae", "meta")]
    with suppress(RuntimeError):
        sd.encode_prompt(["a cat"])
    assert seen[3:] == [("vae", "cpu"), ("text", "meta")]


def test_weights_and_inputs_go_to_the_device():
    """Without replaced methods; the meta device is one from which nothing comes back."""
    for works in "text", "unet":
        sd = random_model()
        lowmem.attach(sd, "meta")
        if works == "text":
            out = sd.encode_prompt(["a cat"])["context"]
        else:
            out = sd.unet(torch.randn(2, 4, 8, 8), torch.ones(2), context=torch.randn(2, 77, 32))
        assert out.is_meta
        assert next(sd.text_encoders[0].parameters()).is_meta == (works == "text")
        assert next(sd.unet.parameters()).is_meta == (works == "unet")
        assert not next(sd.vae.parameters()).is_meta


@torch.no_grad()
def test_tiles_leave_no_seams():
    """The built-in VAE, a 512x512 page of its pictures: tiles of a quarter of it, against the
    whole. `pytest -s` shows the dB."""
    sd = StableDiffusion.load(None, "cpu", torch.float32)
    page = Image.open(ROOT / "docs" / "emoji.png").convert("RGB").crop((0, 0, 512, 512))
    z = sd.encode_image([page])
    whole = sd.vae.decode(z).clamp(-1, 1)
    tiled = lowmem.decode_tiled(sd.vae.decode, z, 16, tile=20, overlap=8).clamp(-1, 1)
    error = (tiled - whole) / 2
    # at each column: how much the error changes from this pixel to the next
    across = error.diff(dim=-1).abs().mean((0, 1, 2))
    seams = across[[191, 192, 319, 320]]  # the second tile begins at 192, the first ends at 320
    print(f"tiles of 320x320 against the whole: {-10 * error.square().mean().log10():.1f} dB;"
          f" change of the error at seams {seams.max():.1e}, on average {across.mean():.1e}")
    assert error.square().mean() < 1e-4  # 40 dB
    assert seams.max() < 1 / 255 and seams.max() < 2 * across.mean()
    lowmem.attach(sd)
    assert torch.equal(sd.vae.decode(z).clamp(-1, 1), lowmem.decode_tiled(
        super(lowmem.Tiled, sd.vae).decode, z, 16).clamp(-1, 1))


def test_where_tiles_begin():
    """Evenly, from end to end, with the overlap or more."""
    assert lowmem.tile_starts(64, 64, 16) == lowmem.tile_starts(10, 64, 16) == [0]
    for side in (65, 96, 112, 113, 128, 200, 1000):
        starts = lowmem.tile_starts(side, 64, 16)
        assert starts[0] == 0 and starts[-1] == side - 64
        assert max(b - a for a, b in zip(starts, starts[1:])) <= 48
