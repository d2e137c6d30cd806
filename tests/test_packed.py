"""extras/packed.py: the numbers stay, and whoever looks at a weight finds it as it was."""
import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

import model
from extras import fast, int8, packed
from extras.lora import LoRA, apply_lora
from sd import StableDiffusion
from tests.common import SMALL, cast, fixed_seed, random_model, relative_error  # noqa: F401
from tests.test_lora import randomize_up

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bf16 on this CPU")


@pytest.fixture(autouse=True)
def packs_all(monkeypatch):
    """On every CPU, and the small layers of the tests too."""
    monkeypatch.setattr(packed, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(packed, "LEAST", 0)


def plain_model(dtype: torch.dtype = torch.bfloat16) -> StableDiffusion:
    torch.manual_seed(1)
    sd = random_model(SMALL)
    cast(sd, dtype)
    sd.unet.requires_grad_(False)
    fast.optimize(sd)
    return sd


def inputs(rows: int = 2, side: int = 8) -> tuple:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(rows, 4, side, side, generator=generator), torch.tensor([500] * rows),
            torch.randn(rows, 77, 32, generator=generator))


def drawn_model() -> StableDiffusion:
    sd = plain_model()
    with torch.no_grad():
        sd.unet(*inputs())
    assert len(layers(sd.unet)) > 50
    return sd


def layers(unet: nn.Module) -> list[nn.Module]:
    return [layer for layer in unet.modules() if isinstance(layer, packed.Packed)]


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].stride() == theirs[name].stride()
    assert [name for name, _ in found.named_parameters()] == [
        name for name, _ in expected.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("rows, side", [(2, 8), (1, 8), (3, 16)])
def test_packed_and_plain_agree(monkeypatch, rows, side):
    """Packed by inputs of one shape, used with others. bf16 beside fp32 of the same weights."""
    sd, exact = drawn_model(), plain_model()
    cast(exact, torch.float32)
    given = inputs(rows, side)
    ours, right = sd.unet(*given), exact.unet(*given)
    assert layers(sd.unet) and not layers(exact.unet)
    monkeypatch.setattr(packed, "cpu_multiplies_bf16", lambda: False)
    plain = plain_model().unet(*given)
    errors = [relative_error(found.float(), right) for found in (ours, plain)]
    assert errors[0] < 0.05 and errors[0] < 1.3 * errors[1] + 1e-3, errors


def test_a_packed_layer_holds_no_plain_weight():
    """And what is looked at in every call is not packed."""
    sd = drawn_model()
    for layer in layers(sd.unet):
        assert "weight" not in vars(layer)["_parameters"]
    packed_ones = set(layers(sd.unet))
    with torch.no_grad():
        sd.unet(*inputs())
    assert set(layers(sd.unet)) == packed_ones
    assert all(packed.TIMES[layer] == 1 for layer in packed_ones)


def test_weights_come_back_to_the_bit():
    sd, other = drawn_model(), plain_model()
    assert_same_state(sd.unet, other.unet)
    assert not layers(sd.unet)
    assert [type(a) for a in sd.unet.modules()] == [type(b) for b in other.unet.modules()]


LOOKS = {
    "weight": lambda unet: [layer.weight for layer in layers(unet)],
    "parameters": lambda unet: list(unet.parameters()),
    "to": lambda unet: unet.to(torch.float64).to(torch.bfloat16),
    "load_state_dict": lambda unet: unet.load_state_dict(plain_model().unet.state_dict()),
    "delattr": lambda unet: [delattr(layer, "bias") or setattr(layer, "bias", None)
                             for layer in layers(unet)],
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_makes_plain(look):
    sd = drawn_model()
    LOOKS[look](sd.unet)
    assert not layers(sd.unet)
    with torch.no_grad():
        sd.unet(*inputs())
    assert layers(sd.unet)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy,
                                       lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_are_whole(duplicate):
    sd = drawn_model()
    found = duplicate(layers(sd.unet)[3])
    assert isinstance(found.weight, nn.Parameter)
    with torch.no_grad():
        assert_same_state(duplicate(sd.unet), plain_model().unet)


@torch.no_grad()
def test_a_new_weight_is_used():
    """Assigned, or changed in place, after drawing."""
    sd, other = drawn_model(), plain_model()
    for one in sd, other:
        layer = one.unet.input_blocks[1][0].in_layers[2]
        layer.weight = nn.Parameter(-layer.weight, requires_grad=False)
        one.unet.middle_block[1].proj_in.weight.mul_(2)
    assert torch.equal(sd.unet(*inputs()), other.unet(*inputs()))


@torch.no_grad()
def test_a_lora_after_drawing(tmp_path):
    sd, other = drawn_model(), plain_model()
    path = tmp_path / "l.safetensors"
    randomize_up(LoRA(plain_model(torch.float32), 2), 0.3).save(path)
    before = sd.unet(*inputs())
    for one in sd, other:
        apply_lora(one, path)
    assert torch.equal(sd.unet(*inputs()), other.unet(*inputs()))
    assert not torch.equal(sd.unet(*inputs()), before)


@torch.no_grad()
def test_hooks_are_called_and_may_look():
    sd, seen = drawn_model(), []
    layer = layers(sd.unet)[5]
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    assert torch.equal(sd.unet(*inputs()), plain_model().unet(*inputs()))
    assert len(seen) == 2 and type(seen[0]) is nn.Parameter


class LooksAtEachCall(model.GEGLU):
    """A fork's class that reads the weight of its layer itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight, self.proj.bias).chunk(2, -1)[0]


@torch.no_grad()
def test_a_fork_that_reads_a_weight_at_each_call():
    """It works, and after some calls the layer stays plain."""
    sd, other = plain_model(), plain_model()
    for one in sd, other:
        for module in one.unet.modules():
            if type(module) is model.GEGLU:
                module.__class__ = LooksAtEachCall
    mine = [module for module in sd.unet.modules() if type(module) is LooksAtEachCall]
    for _ in range(packed.MOST_TIMES + 3):
        found = sd.unet(*inputs())
    assert all(packed.TIMES[module.proj] == packed.MOST_TIMES for module in mine)
    assert not any(isinstance(module.proj, packed.Packed) for module in mine)
    assert torch.equal(found, other.unet(*inputs()))


def test_what_is_trained_stays_plain():
    """Else an optimizer would hold weights that are no longer those of the model."""
    sd = plain_model()
    sd.unet.requires_grad_(True)
    before = list(sd.unet.parameters())
    with torch.no_grad():
        sd.unet(*inputs())
    assert not layers(sd.unet)
    assert all(a is b for a, b in zip(before, sd.unet.parameters()))


def test_gradients_go_through_frozen_layers():
    """To the text, as textual inversion needs it."""
    answers = []
    for sd in drawn_model(), plain_model():
        x, t, context = inputs()
        context = context.bfloat16().requires_grad_()
        sd.unet(x, t, context).float().square().sum().backward()
        answers.append(context.grad)
    assert torch.equal(*answers) and answers[0].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("scope", [lambda: torch.autocast("cpu", torch.bfloat16),
                                   torch.inference_mode])
def test_other_scopes(scope):
    sd, other = drawn_model(), plain_model()
    with scope():
        assert torch.equal(sd.unet(*inputs()), other.unet(*inputs()))
    sd.unet(*inputs())
    assert_same_state(sd.unet, other.unet)


@torch.no_grad()
def test_restored_and_rounded():
    sd, other = drawn_model(), plain_model()
    fast.restore(sd)
    fast.restore(other)
    assert [type(a) for a in sd.unet.modules()] == [type(b) for b in other.unet.modules()]
    assert torch.equal(sd.unet(*inputs()), other.unet(*inputs()))
    sd, other = drawn_model(), plain_model()
    for one in sd, other:
        int8.attach(one)
    assert torch.equal(sd.unet(*inputs()), other.unet(*inputs()))


@torch.no_grad()
@pytest.mark.parametrize("second", ["looks", "draws"])
def test_two_threads(second):
    """One draws, packing from the start, while the other looks at weights or draws too."""
    sd, right, failed = plain_model(), drawn_model().unet(*inputs()), []

    def draw():
        for _ in range(20):
            if not torch.equal(sd.unet(*inputs()), right):
                failed.append("another picture")

    def look():
        for _ in range(20):
            if any(p is None for p in sd.unet.parameters()):
                failed.append("no weight")

    def guarded(work):
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            failed.append(repr(error))
    works = draw, {"looks": look, "draws": draw}[second]
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)     # they take turns more often
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not failed
