"""extras/fast.py and extras/memory.py: faster, the same numbers, and code of others runs."""
import copy
import gc
import pickle
import platform
import re
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import model
import vae
from extras import fast, fingerprints, memory
from model import UNetModel
from sampler import (
    SAMPLERS,
    SIGMAS,
    SPACINGS,
    NoiseSchedule,
    cfg,
    make_denoiser,
    noise_sampler,
)
from sd import StableDiffusion
from tests.common import (
    ROOT,
    SMALL,
    cast,
    levels_apart,
    official_state_dict,
    random_model,
    reference_unet,
    relative_error,
    run_command,
    small,
    with_prefix,
)


def fast_model(preset=SMALL) -> StableDiffusion:
    sd = random_model(preset)
    fast.optimize(sd)
    return sd


def fast_unet(preset=SMALL) -> UNetModel:
    return fast_model(preset).unet


@contextmanager
def rows_seen(layers: list[nn.Module]):
    """Within, the rows of what these layers return, by no hook: hooks keep fast.py off."""
    rows, call = [], nn.Module.__call__

    def spy(module: nn.Module, *args, **kwargs):
        out = call(module, *args, **kwargs)
        if any(module is layer for layer in layers):
            rows.append(len(out))
        return out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", spy)
        yield rows


# --- swapping classes ---

@torch.no_grad()
def test_optimized_and_not_agree():
    """The whole model, and back: classes, names, and the numbers to the last bit."""
    sd = random_model()
    classes = [type(module) for module in sd.unet.modules()]
    names = list(sd.state_dict())
    plain = sd.generate("a cat", steps=4, batch=2)
    fast.optimize(sd)
    found = {type(module) for network in (sd.unet, sd.vae) for module in network.modules()}
    assert found >= {fast.FastUNetModel, fast.FastCrossAttention, fast.FastSelfAttention,
                     fast.FastUpsample, fast.FastVAEUpsample, fast.FastAttnBlock, fast.FastLinear}
    assert list(sd.state_dict()) == names
    for _ in range(2):
        quick = sd.generate("a cat", steps=4, batch=2)
        assert max(map(levels_apart, plain, quick)) <= 1
    fast.restore(sd)
    assert [type(module) for module in sd.unet.modules()] == classes
    assert not sd.vae.decoder._forward_pre_hooks
    assert all(map(np.array_equal, sd.generate("a cat", steps=4, batch=2), plain))


def test_fingerprints_are_current():
    """If this fails: make extras/fast.py do what the core now does, then take the new ones."""
    found = fingerprints.fingerprints("model") | fingerprints.fingerprints("vae")
    assert found == fingerprints.FINGERPRINTS, "python -m extras.fingerprints prints them"
    assert all(map(fingerprints.is_current, found))
    repeated = {name for names in fast.REPEATS.values() for name in names}
    known = {f"model.{cls.__name__}" for cls in fast.known_classes() if cls.__module__ == "model"}
    assert repeated | known == set(found)


EDITS = [  # file, line, what it becomes, what fast.py must leave alone
    ("model.py", 'mode="nearest"))', 'mode="bilinear"))', "model.Upsample"),
    ("model.py", "return F.scaled_dot_product_attention(q, k, v)",
     "return F.scaled_dot_product_attention(q, k, v) * 1.5", "model.attention"),
    ("model.py", "h = self.middle_block(h, emb, context)",
     "h = 2 * self.middle_block(h, emb, context)", "model.UNetModel"),
    ("vae.py", 'scale_factor=2, mode="nearest"))', 'scale_factor=2, mode="bilinear"))',
     "vae.Upsample"),
    ("model.py", "# 'b h t d -> b t (h d)'", "# another comment", None)]


@pytest.mark.parametrize("edits", [EDITS[:-1], EDITS[-1:]], ids=["code", "comment"])
def test_an_edited_class_runs_as_it_is_written(edits, tmp_path):
    """In a copy of the project: the picture is the edit's, with one line about each, and the rest
    is fast. Comments may change."""
    for name in "model.py vae.py sd.py sampler.py clip.py weights extras".split():
        (tmp_path / name).symlink_to(ROOT / name)
    for file, line, edited, _ in edits:
        source = (tmp_path / file).read_text("utf-8")
        assert line in source
        (tmp_path / file).unlink()
        (tmp_path / file).write_text(source.replace(line, edited), "utf-8")
    code = """if True:
        import sys; sys.path[0] = ""
        import numpy as np, torch
        from sd import StableDiffusion
        for fast in (False, True):
            sd = StableDiffusion.load(device="cpu", dtype=torch.float32, fast=fast)
            np.save(f"{fast}.npy", np.asarray(sd.generate("a red apple", steps=2)[0]))
        print(*sorted({type(m).__name__ for n in (sd.unet, sd.vae) for m in n.modules()}))
    """
    done = run_command("-c", code, cwd=tmp_path)
    plain, quick = (np.load(tmp_path / f"{name}.npy") for name in (False, True))
    usual = StableDiffusion.load(None, "cpu", torch.float32, fast=False)
    edits_show = levels_apart(plain, usual.generate("a red apple", steps=2)[0]) > 20
    left = [name for *_, name in edits if name is not None]
    assert levels_apart(plain, quick) <= 1 and edits_show == bool(left)
    assert sorted(re.findall(r"UserWarning: (\S+) was edited", done.stderr)) == sorted(left)
    classes = done.stdout.split()
    assert "FastLinear" in classes and ("FastUNetModel" in classes) == (not left)


def test_a_class_of_a_fork_is_left_alone():
    """A subclass, a patched method, a patched function: each runs."""
    class Mine(model.CrossAttention):
        def attend(self, q, k, v):
            calls.append(1)
            return super().attend(q, k, v)

    calls, sd = [], random_model()
    layers = [m for m in sd.unet.modules() if type(m) is model.CrossAttention]
    layers[0].__class__ = Mine
    fast.optimize(sd)
    assert type(layers[0]) is Mine and type(layers[1]) is fast.FastCrossAttention
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 77, 32)
    with torch.no_grad():
        sd.unet(x, t, context)
        assert len(calls) == 1
        with pytest.MonkeyPatch.context() as patch:  # a function of the core, patched afterwards
            patch.setattr(model, "attention", lambda q, k, v: calls.append(2) or v[:, :, :1] + q)
            sd.unet(x, t, context)
        assert calls.count(2) == len(layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Upsample, "forward", lambda self, x, size: x)
        sd = random_model()
        with pytest.warns(UserWarning, match="model.Upsample was edited"):
            fast.optimize(sd)
        assert {type(m) for m in sd.unet.modules()} & {model.Upsample, fast.FastUpsample} == {
            model.Upsample}


@torch.no_grad()
def test_copies_and_files_of_an_optimized_model(tmp_path):
    """deepcopy, pickle and state_dict of a UNet that has kept keys and values."""
    unet = fast_unet()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 77, 32)
    wanted = unet(x, t, context)
    copied, pickled = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
    for p in unet.parameters():
        p.mul_(1.1)
    assert not torch.equal(unet(x, t, context), wanted)
    for other in copied, pickled:
        assert type(other) is fast.FastUNetModel and torch.equal(other(x, t, context), wanted)
        other.load_state_dict(unet.state_dict())
        assert torch.equal(other(x, t, context), unet(x, t, context))


# --- what comes before the text is computed once ---

@torch.no_grad()
def test_one_x_meets_several_contexts():
    """As in guidance: what comes before the text is computed for one row. Not if x or t differ,
    and not if there is a hook, which sees the whole batch."""
    unet = fast_unet()
    reference = reference_unet(SMALL.unet, with_prefix("model.diffusion_model.",
                                                       unet.state_dict()))
    contexts = torch.randn(3, 77, 32)
    x, t = torch.randn(1, 4, 16, 24).expand(3, -1, -1, -1), torch.tensor([500]).expand(3)
    other_x, other_t = torch.cat([x[:2], -x[:1]]), torch.tensor([1, 500, 999])
    block = unet.input_blocks[1]
    layers = [unet.input_blocks[0], block[0], block[1].transformer_blocks[0].attn1, block]
    cases = [(x, t, True), (x.contiguous(), t.contiguous(), True), (other_x, t, False),
             (x, other_t, False)]
    for given_x, given_t, once in cases:
        with rows_seen(layers) as rows:
            found = unet(given_x, given_t, contexts)
        assert relative_error(found, reference(given_x, given_t, contexts).sample) < 1e-5
        assert rows == ([1, 1, 1, 3] if once else [3, 3, 3, 3])
    denoise = make_denoiser(unet, NoiseSchedule())
    uncond, cond = ({"context": one} for one in contexts.split(1)[:2])
    with rows_seen(layers) as rows:
        cfg(denoise, cond, uncond, 7.5)(x[:1], 7.0)
    assert rows == [1, 1, 1, 2]
    seen = []
    for layer in layers:
        hook = layer.register_forward_hook(lambda layer, args, out: seen.append(len(out)))
        seen.clear()
        assert relative_error(unet(x, t, contexts), reference(x, t, contexts).sample) < 1e-5
        assert seen == [3]
        hook.remove()


@pytest.mark.parametrize("row", ["sd2", "sdxl", "lcm"])
@torch.no_grad()
def test_rows_that_are_equal_in_other_families(row):
    """Also where there is y or w beside the context."""
    sd = random_model(small(row))
    cond = sd.encode_prompt(["a cat", "a dog"])
    if sd.preset.unet.time_cond_proj_dim is not None:
        cond["w"] = torch.tensor([2.0, 9.0])
    x, t = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([700, 700])
    plain = sd.unet(x, t, **cond)
    fast.optimize(sd)
    assert relative_error(sd.unet(x, t, **cond), plain) < 1e-5


# --- keys and values of the text ---

@torch.no_grad()
def test_keys_and_values_are_kept_and_change_nothing(monkeypatch):
    """Computed once for all steps; at every step if there is a hook that wants to see them."""
    sd = random_model()
    picture = np.asarray(sd.generate("a cat", steps=3, batch=2)[0])
    layer = sd.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    fast.optimize(sd)
    with rows_seen([layer.to_k]) as rows:
        kept = np.asarray(sd.generate("a cat", steps=3, batch=2)[0])
    assert rows == [4]  # for three steps
    assert levels_apart(kept, picture) <= 1
    seen = []
    hook = layer.to_k.register_forward_hook(lambda *_: seen.append(1))
    assert np.array_equal(sd.generate("a cat", steps=3, batch=2)[0], kept) and len(seen) == 3
    hook.remove()
    monkeypatch.setattr(fast, "computes_anew", lambda x: True)
    with rows_seen([layer.to_k]) as rows:
        assert levels_apart(sd.generate("a cat", steps=3, batch=2)[0], kept) <= 1
    assert rows == [4] * 3


def change_in_place(layer: nn.Linear) -> None:
    layer.weight.mul_(2)


def replace_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(2 * layer.weight)


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = 2 * layer.weight.data


def wrap(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * F.linear(x, layer.weight)


@pytest.mark.parametrize("change", [change_in_place, replace_weight, replace_data, wrap])
@torch.no_grad()
def test_changed_weights_are_seen(change):
    """LoRA merges, loaded weights, moved networks: kept keys are those of the weights now."""
    unet, x, t, context = fast_unet(), torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 9, 32)
    before = unet(x, t, context)
    for module in unet.modules():
        if isinstance(module, model.CrossAttention):
            change(module.to_v)
    after = unet(x, t, context)
    assert relative_error(after, before) > 1e-3
    fast.release()
    assert torch.equal(unet(x, t, context), after)


@torch.no_grad()
def test_changed_contexts_are_seen():
    """In place, and of another dtype than the UNet, whose cast is kept too."""
    unet, x, t = fast_unet(), torch.randn(1, 4, 8, 8), torch.ones(1)
    for context in torch.randn(1, 9, 32), torch.randn(1, 9, 32).double():
        before = unet(x, t, context)
        assert torch.equal(unet(x, t, context), before)
        casts = [len(kept) for kept in fast.CASTS.values()]
        assert casts == ([1] if context.dtype == torch.float64 else [])
        context.add_(1)
        after = unet(x, t, context)
        assert relative_error(after, before) > 1e-3
        fast.release()
        assert torch.equal(unet(x, t, context), after)
        fast.release()


@torch.no_grad()
def test_what_is_kept_dies_with_its_context_and_its_model():
    fast.release()
    unet = fast_unet()
    for _ in range(3):
        unet(torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 9, 32))
    gc.collect()
    assert all(len(kept) == 0 for kept in fast.KEYS_VALUES.values())
    contexts = [torch.randn(1, 9, 32) for _ in range(3 * fast.MOST_KEPT)]
    for context in contexts:
        unet(torch.randn(1, 4, 8, 8), torch.ones(1), context)
    assert all(0 < len(kept) <= fast.MOST_KEPT for kept in fast.KEYS_VALUES.values())
    del unet
    gc.collect()
    assert len(fast.KEYS_VALUES) == 0


def test_gradients_are_those_of_the_plain_unet():
    """With gradients nothing is kept or shared, and all weights get theirs."""
    sd = random_model()
    x, t = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([5, 5])
    context, found = torch.randn(2, 9, 32), []
    sd.unet.requires_grad_()
    for optimize in (False, True):
        if optimize:
            fast.optimize(sd)
        for _ in range(2):
            sd.unet.zero_grad()
            sd.unet(x, t, context).square().mean().backward()
            found.append([p.grad.clone() for p in sd.unet.parameters()])
    for mine, theirs in zip(found[-1], found[0]):
        assert relative_error(mine, theirs) < 1e-4
    assert all(map(torch.equal, found[2], found[3]))


# --- bf16 ---

@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_in_diffusers():
    """The built-in model's latents after 20 guided steps, 16x16, so that attention goes in blocks
    (without AMX). `pytest -s` shows the relative errors. Of twelve prompts the median: now and
    then rounding sends a run another way, ours or theirs, and doubles its error."""
    sd = StableDiffusion.load(None, "cpu", torch.float32)
    theirs = reference_unet(sd.preset.unet, official_state_dict(sd)).bfloat16()
    half = copy.deepcopy(sd.unet).bfloat16()

    prompts = ["a red apple", "a blue cat", "three stars", "a rocket", "pizza, twemoji", "a crown",
               "two green frogs", "a guitar", "a snowman", "a small dog on the left", "a bus",
               "a tiger"]
    if not torch.cpu._is_avx512_bf16_supported():  # it takes minutes
        prompts = prompts[:4]
    cond, uncond = sd.encode_both(prompts, "", 128, 128)
    start = noise_sampler((16, 16, 16), range(len(prompts)), "cpu")() * float(SIGMAS[-1])
    sigmas = [*SPACINGS["leading"](20, SIGMAS), 0.0]

    def latents(unet) -> Tensor:
        denoise = cfg(make_denoiser(unet, NoiseSchedule("v")), cond, uncond, 3.0)
        return list(SAMPLERS["dpmpp_2m"].sample(denoise, start, sigmas, None))[-1].x.flatten(1)

    def diffusers_unet(x, t, context, y) -> Tensor:
        return theirs(x.bfloat16(), t, context.bfloat16(), class_labels=y.bfloat16()).sample
    exact = latents(sd.unet)
    ours, others = (float(((latents(unet) - exact).norm(dim=1) / exact.norm(dim=1)).median())
                    for unet in (half, diffusers_unet))
    print(f"bf16 and fp32 are {ours:.4f} apart, in diffusers {others:.4f}")
    assert ours < 0.02 and ours < 1.1 * others


# --- CUDA graphs ---

class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: it notes every operation within, and `replay` does them
    again, into the same memory."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.done:
            again = operation(*args, **kwargs)
            pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (again, out)))
            for new, old in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view
                    old.copy_(new)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """FastUNetModel takes the CPU for a GPU. Returns the list of the graphs it records."""
    recorded = []

    def make_graph() -> Recording:
        recorded.append(Recording())
        return recorded[-1]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(fast, "recording_stream", lambda device: None)
    monkeypatch.setattr(fast, "GRAPH_DEVICE", "cpu")
    return recorded


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_cuda_graph_matches_eager(graphs_on_cpu, monkeypatch, count):
    """Guided steps and others between them. The UNet is computed at the first two of a kind."""
    sd = random_model()
    uncond, cond = ({"context": sd.encode_prompt([prompt] * count)["context"]}
                    for prompt in ("", "a cat"))
    x, called = torch.randn(7, count, 4, 8, 8), []

    def answers() -> list[Tensor]:
        denoise = {scale: cfg(make_denoiser(sd.unet, NoiseSchedule()), cond, uncond, scale)
                   for scale in (7.5, 1.0)}
        steps = [(7.5, 14), (7.5, 9), (1.0, 5), (7.5, 3), (7.5, 1), (1.0, 0.5), (1.0, 0.1)]
        return [denoise[scale](x[i], sigma) for i, (scale, sigma) in enumerate(steps)]
    fast.optimize(sd)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "GRAPH_DEVICE", "none")
        computed = answers()
    assert not graphs_on_cpu
    compute = fast.FastUNetModel.compute
    monkeypatch.setattr(fast.FastUNetModel, "compute",
                        lambda *args: called.append(1) or compute(*args))
    again = answers()
    assert all(map(torch.equal, computed, again))
    assert len(called) == 4 and len(graphs_on_cpu) == 2
    fast.restore(sd)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(answers(), computed))


def set_hook(unet: UNetModel, seen: list) -> None:
    unet.middle_block[0].register_forward_hook(lambda *_: seen.append(1))


def set_capture(unet: UNetModel, seen: list) -> None:
    layer = next(m for m in unet.modules() if type(m) is fast.FastCrossAttention)
    layer.capture = lambda probs: seen.append(1)


def set_class(unet: UNetModel, seen: list) -> None:
    class Mine(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(1)
            return super().forward(x)
    unet.out[1] = Mine()


@pytest.mark.parametrize("attach", [set_hook, set_capture, set_class])
@pytest.mark.parametrize("when", [0, 3])
@torch.no_grad()
def test_a_graph_skips_nobodys_code(graphs_on_cpu, attach, when):
    """A hook, a capture, a class of a fork, from the start or once a graph is recorded."""
    unet, seen = fast_unet(), []
    x, t, context = torch.randn(5, 2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 9, 32)
    for i in range(5):
        if i == when:
            attach(unet, seen)
        unet(x[i], t, context)
    assert len(seen) == 5 - when
    assert len(graphs_on_cpu) == (when > 0)


@pytest.mark.parametrize("change", [change_in_place, replace_weight, replace_data])
@torch.no_grad()
def test_a_graph_is_of_the_weights_and_conditions_now(graphs_on_cpu, change):
    preset = small("sdxl")
    unet = fast_unet(preset)
    context, y = torch.randn(2, 9, 80), torch.randn(2, preset.unet.adm_in_channels)
    x, t = torch.randn(9, 2, 4, 8, 8), torch.tensor([5, 50])
    for i in range(3):
        unet(x[i], t, context, y)
    assert len(graphs_on_cpu) == 1
    for i, act in enumerate([lambda: change(unet.time_embed[0]), lambda: y.add_(1),
                             lambda: context.mul_(2)], 3):
        act()
        found = unet(x[i], t, context, y)
        fast.release()
        assert torch.equal(unet(x[i], t, context, y), found)
        unet(x[i], t, context, y)
    assert len(graphs_on_cpu) == 4
    assert not torch.equal(unet(x[8], t, context, y), unet(x[8], t + 1, context, y))
    copied = unet(x[8], t, context, y)
    unet(x[7], t, context, y)
    assert torch.equal(copied, unet(x[8], t, context, y))  # results are not overwritten


# --- the parts ---

@torch.no_grad()
def test_attention_of_bf16_on_a_cpu_goes_in_blocks(monkeypatch):
    """Where products are slow in the fused kernel. Of 600 queries, which is no multiple of a
    block; against float64. Scores of up to 4, rounded to 8 bits, are up to 0.008 off."""
    q, k, v = (torch.randn(2, n, 3, 40).bfloat16().transpose(1, 2) for n in (600, 300, 300))
    monkeypatch.setattr(fast, "AMX", False)
    h = fast.attention(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert h.dtype == torch.bfloat16 and h.shape == q.shape
    assert relative_error(h.double(), exact) < 0.01
    assert torch.equal(h, fast.attention_in_blocks(q, k, v))
    monkeypatch.setattr(fast, "AMX", True)
    fused = fast.attention(q, k, v)
    assert torch.equal(fused, F.scaled_dot_product_attention(q, k, v))
    assert relative_error(fused.double(), exact) < 0.01


@pytest.mark.parametrize("tokens", [77, 256, 257])
def test_attention_in_training_in_bf16(monkeypatch, tokens):
    """Values and gradients against float64; the plain products up to 256 tokens."""
    q, k, v = (torch.randn(2, n, 3, 40).bfloat16().transpose(1, 2).requires_grad_()
               for n in (60, tokens, tokens))
    called, products = [], fast.attention_by_products
    monkeypatch.setattr(fast, "attention_by_products",
                        lambda *given: called.append(1) or products(*given))
    h = fast.attention(q, k, v)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact)
    g = torch.randn(h.shape).bfloat16()
    h.backward(g)
    expected.backward(g.double())
    assert len(called) == (tokens <= 256) and h.dtype == torch.bfloat16
    assert relative_error(h.detach().double(), expected.detach()) < 0.01
    for x, y in zip((q, k, v), exact):
        assert relative_error(x.grad.double(), y.grad) < 0.01


@pytest.mark.parametrize("tokens", [2047, 2048])
def test_attention_of_many_tokens(tokens):
    q, k, v = (torch.randn(1, tokens, 2 * 8).unflatten(-1, (2, 8)).transpose(1, 2)
               for _ in range(3))
    assert relative_error(fast.attention(q, k, v), model.attention_probs(q, k) @ v) < 1e-5


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("rows, by_convolution", [(500, True), (5, False)])
def test_linear_by_way_of_a_convolution(monkeypatch, amx, rows, by_convolution):
    """The same product and gradients; small products go the plain way."""
    seen, convolution = [], F.conv2d
    monkeypatch.setattr(fast, "AMX", amx)
    monkeypatch.setattr(F, "conv2d", lambda *args: seen.append(1) or convolution(*args))
    layer, x = fast.FastLinear(96, 120), torch.randn(2, rows, 96, requires_grad=True)
    out = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert len(seen) == (torch.backends.mkl.is_available() and not amx and by_convolution)
    assert out.is_contiguous()
    assert relative_error(out.detach(), exact.detach().float()) < 1e-6
    gradients = [torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
                 for y in (out, exact)]
    for mine, theirs in zip(*gradients):
        assert relative_error(mine, theirs.float()) < 1e-6


@pytest.mark.parametrize("kind", [model, vae], ids=["unet", "vae"])
@pytest.mark.parametrize("size, transposed", [
    ((64, 64), True), ((66, 62), False), ((64, 71), False)], ids=str)
def test_upsample_matches_reference(monkeypatch, size, transposed, kind):
    """From 1,024 positions on, where the size doubles exactly; elsewhere as it is written. In
    half precision the error is compared with that of the plain convolution: how large it is
    depends on the CPU."""
    if kind is vae and size[1] % 2:
        pytest.skip("the VAE's always doubles")
    seen, convolution = [], F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d",
                        lambda *args, **kw: seen.append(1) or convolution(*args, **kw))
    layer = kind.Upsample(3).double()
    quick = copy.deepcopy(layer)
    quick.__class__ = fast.FastUpsample if kind is model else fast.FastVAEUpsample
    more = [torch.Size(size)] if kind is model else []
    x = torch.randn(2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=torch.float64,
                    requires_grad=True)
    out, exact = quick(x, *more), layer(x, *more)
    assert len(seen) == transposed
    assert relative_error(out.detach(), exact.detach()) < 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), (x, *module.parameters()))
                 for y, module in ((out, quick), (exact, layer))]
    for mine, theirs in zip(*gradients):
        assert relative_error(mine, theirs) < 1e-12
    x, exact = x.detach(), exact.detach()
    for module in (layer, quick):
        module.requires_grad_(False)
    assert relative_error(quick.float()(x.float(), *more).double(), exact) < 1e-6
    for dtype in (torch.float16, torch.bfloat16):
        quick_error, plain_error = (
            relative_error(module.to(dtype)(x.to(dtype), *more).double(), exact)
            for module in (quick, layer))
        print(f"{dtype}: {quick_error:.1e}, the plain convolution {plain_error:.1e}")
        # the sums of the weights are rounded once more
        assert quick_error < 3 * plain_error if transposed else quick_error == plain_error


def test_upsample_calls_hooks_and_other_convolutions(monkeypatch):
    layer = fast.FastUpsample(3).requires_grad_(False)
    x, size, seen = torch.randn(1, 3, 32, 32), torch.Size((64, 64)), []
    monkeypatch.setattr(F, "conv_transpose2d", lambda *_, **__: pytest.fail("not here"))
    hook = layer.conv.register_forward_hook(lambda *_: seen.append(1))
    plain = layer(x, size)
    assert seen == [1]
    hook.remove()
    for conv in (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
                 nn.Conv2d(3, 3, 5, padding=2), type("Mine", (nn.Conv2d,), {})(3, 3, 3, padding=1)):
        layer.conv = conv
        layer(x, size)
    assert plain.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("on_load", [False, True])
def test_convolutions_are_channels_last_but_the_unets_in_fp32_with_amx(monkeypatch, amx, dtype,
                                                                       device, on_load):
    """Whatever they were before, for weights that are loaded and for those that are there."""
    monkeypatch.setattr(memory, "AMX", amx)
    sd = random_model()
    sd.unet.to(memory_format=torch.channels_last)
    if on_load:
        tensors = {name: fast_lazy(tensor) for name, tensor in sd.state_dict().items()}
        sd.load_weights(tensors, device, dtype, fast.to)
    else:
        cast(sd, dtype)
        sd.device = torch.device(device)
    fast.optimize(sd)
    plain_unet = amx and device == "cpu" and dtype == torch.float32
    for network, plain in ((sd.unet, plain_unet), (sd.vae, False)):
        weight = next(weight for weight in network.parameters()
                      if weight.shape[2:] == (3, 3) and weight.shape[1] > 1)
        assert weight.is_contiguous() == plain
        assert weight.is_contiguous(memory_format=torch.channels_last) != plain


def fast_lazy(tensor: Tensor):
    from sd import LazyTensor
    return LazyTensor(tensor.shape, tensor.clone)


# --- loading ---

@pytest.mark.parametrize("source", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1001, 2100), (400, 333, 3, 3), (1280,), (1, 1)], ids=str)
def test_weights_become_bf16_as_pytorch_converts_them(shape, source):
    """The first two are of more than one piece, the last of which is shorter."""
    tensor = torch.randn(shape).to(source)
    found = fast.to(tensor, "cpu", torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, tensor.to(torch.bfloat16))
    wanted = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    assert found.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loaded_fast_is_loaded_equal(dtype):
    """The same weights as PyTorch converts them, and the garbage collector is on again."""
    plain, quick = (StableDiffusion.load(None, "cpu", dtype, fast=on) for on in (False, True))
    assert gc.isenabled()
    for (name, a), (other, b) in zip(plain.state_dict().items(), quick.state_dict().items(),
                                     strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)


needs_linux_5_14 = pytest.mark.skipif(
    sys.platform != "linux"
    or tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14),
    reason="needs Linux 5.14")


@needs_linux_5_14
def test_memory_that_was_claimed_is_what_tensors_then_get():
    """Page faults of writing 64 MB for the first time: 16,384 pages."""
    code = """if True:
        import resource, torch
        from contextlib import nullcontext
        from extras.memory import prefault_heap
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for context in nullcontext(), prefault_heap(2**27):
            with context:
                pass
            before, x = faults(), torch.empty(2**26, dtype=torch.uint8).fill_(1)
            print(faults() - before)
    """
    first, then = map(int, run_command("-c", code).stdout.split())
    assert then < first / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_kept_until_it_is_given_back():
    code = """if True:
        import torch
        from extras.memory import give_back_freed_memory, keep_freed_memory
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        keep_freed_memory()
        tensors = [torch.empty(2**20, dtype=torch.uint8).fill_(1) for _ in range(200)]
        full = resident()
        del tensors[::2]
        kept = resident()
        give_back_freed_memory()
        print(full - kept, full - resident())
    """
    kept, given = map(int, run_command("-c", code).stdout.split())
    assert kept < 10 and given > 90


@torch.no_grad()
def test_memory_is_given_back_between_unet_and_vae(monkeypatch):
    """Twice per run of the UNet: before decoding, and before the last Upsample. What was kept for
    the UNet goes too."""
    ran = []
    monkeypatch.setattr(fast, "give_back_freed_memory", lambda: ran.append("give back"))
    sd = fast_model()
    for name, module in sd.vae.decoder.named_modules():
        if isinstance(module, (vae.Upsample, vae.Middle)):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    fast.release()
    levels = [f"up.{i}.upsample" for i in reversed(range(1, len(sd.vae.decoder.up)))]
    sd.generate("a cat", steps=2, batch=3)
    first = ["give back", "mid", *levels[:-1], "give back", levels[-1]]
    assert ran == first + 2 * ["mid", *levels]
    assert not fast.KEYS_VALUES and not fast.USED and not fast.DECODING
    ran.clear()
    sd.decode_latents(torch.randn(2, 4, 8, 8))
    assert ran == 2 * ["mid", *levels]
    fast.restore(sd)
    assert not sd.vae.decoder._forward_pre_hooks
