"""extras/int8.py: layers of 8 bits beside those of full precision."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import model
from extras import cli, fast, int8, lowmem
from extras.deepcache import deepcache
from extras.lora import LoRA, apply_lora
from sd import StableDiffusion, UserError
from tests.command import array, assert_refused, run_cli
from tests.common import (
    SMALL,
    cast,
    fixed_seed,  # noqa: F401
    psnr,
    random_model,
    relative_error,
)
from tests.training import tiny  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")


@pytest.fixture(autouse=True)
def same_on_all_processors(monkeypatch):
    """Without VNNI the numbers are the same, but for weights of 7 bits, and a line says so."""
    monkeypatch.setattr(int8, "has_vnni", lambda: True)
    monkeypatch.setattr(int8, "linear_pays", lambda *_: True)


def plain_model(dtype: torch.dtype = torch.float32) -> StableDiffusion:
    sd = random_model(SMALL)
    cast(sd, dtype)
    return sd


def rounded_model(dtype: torch.dtype = torch.float32, optimized: bool = True) -> StableDiffusion:
    sd = plain_model(dtype)
    if optimized:
        fast.optimize(sd)
    int8.attach(sd)
    return sd


def inputs(rows: int = 2) -> tuple:
    return torch.randn(rows, 4, 8, 8), torch.tensor([500] * rows), torch.randn(rows, 77, 32)


def count(unet: nn.Module) -> int:
    return sum(isinstance(layer, int8.Int8) for layer in unet.modules())


# --- one layer ---

@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_layers_agree_with_those_of_full_precision(dtype, shift):
    """Inputs of both signs, and of one sign alone: borders of pictures are true zeros then."""
    x = torch.randn(2, 48, 9, 9) + shift
    for layer, given in [(nn.Linear(48, 80), x.permute(0, 2, 3, 1)),
                         (nn.Linear(48, 80, bias=False), x[:, :, 0, 0]),
                         (nn.Conv2d(48, 64, 3, padding=1), x),
                         (nn.Conv2d(48, 64, 3, stride=2, padding=1),
                          x.contiguous(memory_format=torch.channels_last)),
                         (nn.Conv2d(48, 64, 1), x)]:
        layer, given = layer.to(dtype), given.to(dtype)
        expected = layer(given)
        int8.pack(layer)
        found = layer(given)
        assert found.dtype == dtype and found.shape == expected.shape
        assert relative_error(found.float(), expected.float()) < 0.012   # 0.008 at most


@torch.no_grad()
def test_rounding_is_exact_where_it_can_be():
    """Whole numbers within the ranges come out as they are; nothing lies outside of 0...255."""
    x = torch.arange(-100.0, 154.0).view(2, 127)
    q, scale, zero = int8.rounded(x)
    assert (scale, zero) == (253 / 254, 101) or q.min() >= 0
    assert ((q.float() - zero) * scale - x).abs().max() <= scale / 2 + 1e-4
    for values in (torch.zeros(3, 4), torch.full((3, 4), 5.0), torch.full((3, 4), -5.0),
                   torch.tensor([[1e30, -1e30]]), torch.tensor([[1e-30, 0]])):
        q, scale, zero = int8.rounded(values)
        assert 1 <= zero <= 255
        assert torch.allclose((q.float() - zero) * scale, values, rtol=0.01, atol=1e-9)
    w = torch.randn(5, 7) * torch.tensor([1, 10, 100, 0, 1e-3])[:, None]
    q, scale = int8.rounded_weight(w, 127)
    assert q.abs().max() == 127 and (q[3] == 0).all()
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] / 2 + 1e-6).all()


@torch.no_grad()
def test_nan_and_infinity_come_out_as_nan():
    """Then the picture ends in the usual line."""
    for bad in (float("nan"), float("inf")):
        for layer, x in (nn.Linear(8, 8), torch.ones(2, 8)), \
                (nn.Conv2d(8, 8, 3), torch.ones(1, 8, 4, 4)):
            int8.pack(layer)
            x[0, 3] = bad
            assert layer(x).isnan().all()


@torch.no_grad()
def test_the_same_input_is_rounded_once(monkeypatch):
    """Queries, keys and values share it, until it is written to."""
    seen, rounded = [], int8.rounded
    monkeypatch.setattr(int8, "rounded", lambda x: seen.append(1) or rounded(x))
    layers, x = [nn.Linear(8, 8) for _ in range(3)], torch.randn(2, 3, 8)
    for layer in layers:
        int8.pack(layer)
        layer(x)
    assert len(seen) == 1
    before = layers[0](x)
    x += 1
    assert not torch.equal(layers[0](x), before) and len(seen) == 2
    layers[0](x.clone())
    assert len(seen) == 3


# --- the network ---

@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_agrees_and_takes_less_memory(dtype):
    x, t, context = inputs()
    sd = plain_model(dtype)
    expected, before = sd.unet(x, t, context).float(), sum(p.nbytes for p in sd.unet.parameters())
    for optimized in (False, True):
        sd = rounded_model(dtype, optimized)
        assert count(sd.unet) == 81
        assert relative_error(sd.unet(x, t, context).float(), expected) < 0.05
        assert sum(p.nbytes for p in sd.unet.parameters()) < before / 2
        int8.attach(sd)
        assert count(sd.unet) == 81
    kept = {name for name, layer in sd.unet.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not isinstance(layer, int8.Int8)}
    assert {"input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2"} < kept
    assert all(int8.KEPT.match(name) for name in kept)


@torch.no_grad()
def test_linear_layers_stay_where_rounding_does_not_pay(monkeypatch):
    monkeypatch.setattr(int8, "linear_pays", lambda *_: False)
    sd, given = rounded_model(torch.bfloat16), inputs()
    found = {type(layer) for layer in sd.unet.modules() if isinstance(layer, int8.Int8)}
    assert found == {int8.Int8Conv2d}
    monkeypatch.setattr(int8, "linear_pays", lambda *_: True)
    before = count(sd.unet)
    int8.attach(sd)     # the layers that are left must not look like most of the weights
    assert count(sd.unet) == before
    expected = plain_model(torch.bfloat16).unet(*given).float()
    assert relative_error(sd.unet(*given).float(), expected) < 0.05


@pytest.mark.parametrize("amx, dtype, width, pays", [
    (True, torch.bfloat16, 8, False), (True, torch.float32, 8, True),
    (False, torch.bfloat16, 8, True), (True, torch.bfloat16, 80, True)])
def test_linear_layers_pay_but_with_amx_in_bf16(monkeypatch, amx, dtype, width, pays):
    """And there too, where they hold most of the weights."""
    monkeypatch.undo()
    monkeypatch.setattr(int8, "AMX", amx)
    assert int8.linear_pays([nn.Linear(width, width), nn.Conv2d(8, 8, 3)], dtype) == pays


@torch.no_grad()
def test_rows_are_shared_and_texts_kept_as_without_it():
    """fast.py computes one row up to the first text, and a text's keys once."""
    sd = rounded_model()
    x, t, context = inputs(1)
    both = context.repeat(2, 1, 1) + torch.tensor([0.0, 1.0])[:, None, None]
    assert sd.unet.can_share(x.repeat(2, 1, 1, 1), t.repeat(2), both)
    shared = sd.unet(x.repeat(2, 1, 1, 1), t.repeat(2), both)
    fast.restore(sd)
    assert count(sd.unet) == 81
    # mostly 5e-7; 0.02 where a last digit makes a value round the other way
    assert relative_error(shared, sd.unet(x.repeat(2, 1, 1, 1), t.repeat(2), both)) < 0.03


@torch.no_grad()
def test_hooks_and_classes_of_forks_are_left_alone():
    class Mine(model.CrossAttention):
        def forward(self, x, context=None, size=None):
            return super().forward(x, context, size) * self.to_q.weight.mean()

    class MyLinear(nn.Linear):
        pass

    sd, calls = plain_model(), []
    block = sd.unet.middle_block
    attention = block[1].transformer_blocks[0].attn1
    attention.__class__ = Mine
    block[1].proj_in.__class__ = MyLinear
    block[1].proj_out.forward = lambda x: calls.append("own") or x
    block[0].in_layers[2].register_forward_hook(lambda *_: calls.append("layer"))
    block[2].register_forward_hook(lambda *_: calls.append("block"))
    fast.optimize(sd)
    int8.attach(sd)
    assert type(attention.to_q) is fast.FastLinear and type(block[1].proj_in) is MyLinear
    assert not isinstance(block[0].in_layers[2], int8.Int8) and count(block[1].proj_out) == 0
    assert isinstance(block[2].in_layers[2], int8.Int8)
    sd.unet(*inputs())
    assert calls == ["layer", "own", "block"]
    block[2].in_layers[2].register_forward_hook(lambda *_: calls.append("afterwards"))
    sd.unet(*inputs())
    assert calls[3:] == ["layer", "own", "afterwards", "block"]


def test_an_edited_class_is_left_alone(monkeypatch):
    monkeypatch.setattr(model.Upsample, "forward", lambda self, x, size: self.conv.weight.mean())
    sd = plain_model()
    int8.attach(sd)
    assert count(sd.unet) == 80


def test_what_needs_the_weights_ends_in_one_line(tmp_path):
    lora = LoRA(random_model(SMALL), 2)
    lora.save(tmp_path / "lora.safetensors")
    sd = rounded_model()
    for work in (sd.state_dict, lambda: sd.unet.load_state_dict({}), lambda: LoRA(sd, 2),
                 lambda: apply_lora(sd, tmp_path / "lora.safetensors")):
        with pytest.raises(UserError, match="int8: the UNet's weights are rounded, and gone"):
            work()
    x, t, context = inputs()
    with pytest.raises(UserError, match="int8: rounded layers have no gradient"):
        sd.unet(x.requires_grad_(), t, context)


def test_where_it_cannot_be(monkeypatch):
    for device, dtype, said in (("cuda", torch.float32, "for CPUs of Intel and AMD, not for cuda"),
                                ("mps", torch.float32, "not for mps"),
                                ("cpu", torch.float16, "goes with --dtype fp32 or bf16")):
        with pytest.raises(UserError, match=said):
            int8.check(device, dtype)
    other = SimpleNamespace(device="cpu", dtype=torch.float32, unet=nn.Sequential(nn.Tanh()))
    with pytest.raises(UserError, match="finds none in this Sequential: leave it out"):
        int8.attach(other)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match="this CPU has no VNNI"):
        int8.check("cpu", torch.float32)


@torch.no_grad()
def test_without_vnni_weights_have_seven_bits(monkeypatch):
    """Two products of 255 * 63 fit 16 bits, and two of 255 * 127 do not."""
    seen, whole = [], int8.rounded_weight
    monkeypatch.setattr(int8, "rounded_weight",
                        lambda w, most: seen.append(most) or whole(w, most))
    for there, most in (True, 127), (False, 63):
        monkeypatch.setattr(int8, "has_vnni", lambda: there)
        layer, x = nn.Linear(64, 64), torch.randn(8, 64)
        expected = layer(x)
        int8.pack(layer)
        assert relative_error(layer(x), expected) < 0.02 and seen[-1] == most
    assert 2 * 255 * 63 < 2**15 < 2 * 255 * 127


# --- the command ---

def test_the_built_in_model_draws_nearly_the_same():
    """Two of the 24 prompts of `tools/bench.py int8`: 43.6 dB, 35.6 at least."""
    plain, sd = (StableDiffusion.load(None, "cpu", torch.float32) for _ in range(2))
    int8.attach(sd)
    for prompt, least in {"a red apple": 34, "a blue cat": 39}.items():     # 35.6, 41.1
        assert psnr(sd.generate(prompt)[0], plain.generate(prompt)[0]) > least


def test_it_goes_with_the_other_options(tiny, tmp_path, capsys):  # noqa: F811
    """The picture changes by little, with a LoRA too, which is merged first."""
    lora = LoRA(StableDiffusion.load(tiny), 2)
    for layer in lora.layers.values():
        nn.init.normal_(layer["lora_up"].weight, std=0.3)
    lora.save(tmp_path / "lora.safetensors")

    def draw(name: str, *more: object) -> np.ndarray:
        code, err, _ = run_cli(capsys, "a cat", "--ckpt", tiny, "--steps", 4, "--out",
                               tmp_path / f"{name}.png", *more)
        assert code == 0 and "int8" not in err, err
        return array(tmp_path / f"{name}.png")
    for more in ([], ["--no-fast"], ["--lowmem"], ["--deepcache", 2], ["--dtype", "bf16"],
                 ["--lora", tmp_path / "lora.safetensors"], ["--attn", tmp_path / "maps"],
                 ["--report", tmp_path / "r.html"]):
        plain, rounded = draw("plain", *more), draw("int8", "--int8", *more)
        difference = np.abs(plain - rounded)
        assert 0 < difference.mean() < 0.1 * plain.std(), more


def test_the_command_refuses_it_in_one_line(tiny, tmp_path, capsys):  # noqa: F811
    line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, "--int8", "--dtype", "fp16")
    assert line == "sd.py: --int8 goes with --dtype fp32 or bf16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "best_device_and_dtype", lambda *_: ("cuda", torch.float16))
        line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, "--int8")
    assert line == "sd.py: --int8 is for CPUs of Intel and AMD, not for cuda: leave it out"


@torch.no_grad()
def test_row_by_row_and_deep_blocks_kept():
    """From Python: lowmem and deepcache attached afterwards."""
    sd = rounded_model()
    expected = sd.generate("a cat", steps=4)[0]
    lowmem.attach(sd)
    with deepcache(sd.unet, 1):
        found = sd.generate("a cat", steps=4)[0]
    difference = np.abs(np.asarray(found, float) - np.asarray(expected))
    assert difference.mean() < 0.15 * np.asarray(expected).std()
