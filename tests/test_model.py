"""The UNet and its parts. Full-size networks against diffusers: test_sd.py and test_family.py."""
import math

import pytest
import torch

from model import (
    CrossAttention,
    ResBlock,
    UNetConfig,
    UNetModel,
    attention,
    attention_probs,
    timestep_embedding,
)
from tests.common import SMALL, random_model, randomize, reference_unet, relative_error, with_prefix

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_one_x_with_several_contexts():
    """As in guidance: one x in three rows that share their memory, or do not; other times too."""
    unet = randomize(UNetModel(SMALL.unet))
    state = with_prefix("model.diffusion_model.", unet.state_dict())
    reference = reference_unet(SMALL.unet, state)
    x = torch.randn(1, 4, 16, 24).expand(3, -1, -1, -1)
    contexts, same_time = torch.randn(3, 77, 32), torch.tensor([500]).expand(3)
    for given, t in ((x, same_time), (x.contiguous(), same_time), (x, torch.tensor([1, 500, 999]))):
        assert relative_error(unet(given, t, contexts), reference(x, t, contexts).sample) < 1e-5


# --- half precision ---

@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.035), (torch.float16, 0.0035)])
def test_half_precision_weights_work_on_the_cpu(dtype, bound):
    sd = random_model()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 10.5])
    context = sd.encode_prompt(["a cat", ""])["context"]
    exact = sd.unet(x, t, context)
    assert relative_error(sd.unet.to(dtype)(x, t, context).float(), exact) < bound
    assert len(sd.generate("a cat", steps=2)) == 1


# --- attention ---

def test_attention_and_its_matrix_agree():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    probs = attention_probs(q, k)
    assert probs.shape == (2, 3, 5, 7) and probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(probs @ v, attention(q, k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / 8**0.5
    torch.testing.assert_close(probs, scores.softmax(-1))


@pytest.mark.parametrize("tokens", [2047, 2048])
def test_attention_of_many_tokens(tokens):
    q, k, v = (torch.randn(1, tokens, 2 * 8).unflatten(-1, (2, 8)).transpose(1, 2)
               for _ in range(3))
    assert relative_error(attention(q, k, v), attention_probs(q, k) @ v) < 1e-5


def test_attention_is_a_dictionary():
    """Keys that match a query perfectly, and the others not at all, return their row."""
    v, wanted = torch.randn(1, 1, 4, 4), [2, 0, 3]
    q, k = 1e4 * torch.eye(4)[wanted][None, None], torch.eye(4)[None, None]
    probs = attention_probs(q, k)
    assert torch.equal(probs[0, 0], torch.eye(4)[wanted])
    assert torch.equal(probs @ v, v[:, :, wanted])
    assert torch.equal(attention(q, k, v), v[:, :, wanted])


def test_self_attention_is_cross_attention_to_itself():
    layer, x = randomize(CrossAttention(16, 16, 4, UNetConfig())), torch.randn(2, 5, 16)
    assert torch.equal(layer(x), layer(x, x))


def test_capture_is_given_the_matrix_and_changes_nothing():
    layer = randomize(CrossAttention(16, 12, 4, UNetConfig()))
    x, context, seen = torch.randn(2, 6, 16), torch.randn(2, 5, 12), []
    before = layer(x, context, (2, 3))
    layer.capture = seen.append
    assert torch.equal(layer(x, context, (2, 3)), before)
    q, (k, _) = layer.split_heads(layer.to_q(x)), layer.keys_values(context)
    assert len(seen) == 1 and seen[0].shape == (2, 4, 6, 5)
    assert torch.equal(seen[0], attention_probs(q, k))


# --- the other parts ---

def test_time_enters_a_resblock_as_one_value_per_channel():
    block, seen = randomize(ResBlock(8, 16, UNetConfig(model_channels=8, num_groups=4))), []
    block.out_layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, emb = torch.randn(1, 8, 5, 5), torch.randn(2, 1, 32)
    assert not torch.allclose(block(x, emb[0]), block(x, emb[1]))
    effect = seen[1] - seen[0]
    everywhere = effect[:, :, :1, :1].expand_as(effect)
    torch.testing.assert_close(effect, everywhere, atol=1e-5, rtol=1e-5)


def test_timestep_embedding_has_the_cosines_first():
    e = timestep_embedding(torch.tensor([1.0, 500.5]), 320)
    wanted = [math.cos(1), math.sin(1), 1.0593e-4]
    assert e[0, [0, 160, 319]].tolist() == pytest.approx(wanted, rel=1e-4)
    wanted = [math.cos(500.5), math.sin(500.5)]
    assert e[1, [0, 160]].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("missing", ["w", "y"])
def test_a_missing_input_is_an_error(missing):
    settings = {"w": dict(time_cond_proj_dim=8), "y": dict(adm_in_channels=8)}[missing]
    unet = UNetModel(UNetConfig(model_channels=8, channel_mult=(1,), num_res_blocks=1, num_groups=4,
                                transformer_depth=(1,), num_heads=(2,), context_dim=8, **settings))
    with pytest.raises(ValueError, match=f"needs {missing} "):
        unet(torch.randn(1, 4, 2, 2), torch.tensor([1]), torch.randn(1, 3, 8))
