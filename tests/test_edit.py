"""Pictures from pictures: img2img, inpainting, InstructPix2Pix, against diffusers' pipelines."""
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from extras import edit
from sampler import SAMPLERS
from sd import StableDiffusion, UserError
from tests.common import (
    PROMPTS,
    assert_agree,
    disc_mask,
    levels_apart,
    make_scheduler,
    our_picture,
    pair,
    photograph,
    psnr,
    random_model,
    small,
    small_pair,
    their_picture,
)

pytestmark = pytest.mark.filterwarnings(     # diffusers with numpy 2
    "ignore:__array__ implementation:DeprecationWarning")
NEGATIVE = PROMPTS["negative_prompt"]
INPUTS = {"sd2": {}, "sdxl": {}, "sd1-inpaint": dict(image=photograph(), mask=disc_mask()),
          "instruct-pix2pix": dict(image=photograph())}


def redrawn(mask: Image.Image) -> np.ndarray:
    """Where the mask is more white than black."""
    return np.asarray(mask) >= 128


MASK_LATENTS = torch.from_numpy(redrawn(disc_mask())[::8, ::8]).float()


# --- img2img ---

@pytest.mark.parametrize("strength", [0.5, 0.8])
@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "linspace")])
def test_picture_from_picture_matches_diffusers(name, spacing, strength):
    """They sample the VAE, then draw the noise, and so do we."""
    sd, pipe = small_pair("eps", diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = make_scheduler(name, spacing)
    theirs = their_picture(pipe, negative_prompt=NEGATIVE, num_inference_steps=30,
                           guidance_scale=7.5, image=photograph(), strength=strength)
    ours = our_picture(sd, draw=edit.draw, negative_prompt=NEGATIVE, steps=30, guidance=7.5,
                       sampler=name, timestep_spacing=spacing, image=photograph(),
                       strength=strength)
    assert_agree(ours, theirs, 100)


def test_full_strength_leaves_nothing_of_the_picture():
    sd, _ = small_pair("eps")
    red = Image.new("RGB", (64, 64), "red")
    whole = edit.draw(sd, "a cat", image=red, strength=1, steps=4)[0]
    assert levels_apart(whole, sd.generate("a cat", steps=4)[0]) == 0


# --- inpainting ---

@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("row, name, spacing", [
    ("sd1-inpaint", "ddim", "leading"), ("sd1-inpaint", "ddpm", "leading"),
    ("sd1-inpaint", "euler", "leading"), ("sd1", "ddim", "leading"),
    ("sd1", "dpmpp_2m", "trailing"), ("sd1", "euler", "leading")])
def test_inpainting_matches_diffusers(row, name, spacing, strength, monkeypatch):
    """With a UNet that takes the mask, and with an ordinary one.

    Around the pictures of the latter diffusers puts the noised original after each step. Three
    things differ. What was not to be redrawn is as it was in our pictures, so diffusers' are pasted
    likewise, and the latents inside are compared. At full strength diffusers puts the original in
    after the first step, we before it too: that is undone, then latents agree to rounding. And
    samplers that draw noise draw it anew there too in ours, where diffusers' is the first again:
    that is not compared.
    """
    sd, pipe = pair(row, diffusers.StableDiffusionInpaintPipeline)
    pipe.scheduler = make_scheduler(name, spacing)
    image, mask = photograph(), disc_mask()

    def compare(steps: int, at_least: float = 0) -> None:
        ours, latents = our_picture(
            sd, draw=edit.draw, negative_prompt=NEGATIVE, steps=steps, guidance=7.5, sampler=name,
            timestep_spacing=spacing, image=image, mask=mask, strength=strength)
        theirs, their_latents = their_picture(
            pipe, negative_prompt=NEGATIVE, num_inference_steps=steps, guidance_scale=7.5,
            width=64, height=64, image=image, mask_image=mask, strength=strength)
        pasted = np.where(redrawn(mask)[..., None], theirs, image)
        assert_agree((ours, latents * MASK_LATENTS), (pasted, their_latents * MASK_LATENTS),
                     at_least)

    def prepare_latents(*args, prepare=pipe.prepare_latents, **kw):
        latents, noise, known = prepare(*args, **kw)
        noised = pipe.scheduler.add_noise(known, noise, kw["timestep"])
        return torch.lerp(noised, latents, MASK_LATENTS), noise, known

    if row == "sd1" and strength == 1:
        compare(20)
        monkeypatch.setattr(pipe, "prepare_latents", prepare_latents)
    compare(5, 100)


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("row", ["sd1-inpaint", "sd1"])
def test_what_is_not_masked_stays_as_it_was(row, strength):
    """To the level, with all samplers, in a batch, not square; what is masked changes."""
    sd, _ = pair(row, diffusers.StableDiffusionInpaintPipeline)
    image, mask = photograph(72, 40), disc_mask(72, 40)
    here = redrawn(mask)
    for name in SAMPLERS:
        drawn = edit.draw(sd, "a cat", image, mask, strength, steps=2, sampler=name, width=72,
                          height=40, batch=2)
        for one in drawn:
            assert np.array_equal(np.asarray(one)[~here], np.asarray(image)[~here])
            assert np.mean(np.asarray(one)[here] != np.asarray(image)[here]) > 0.9
        assert not np.array_equal(*map(np.asarray, drawn))


# --- InstructPix2Pix ---

@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "leading")])
@pytest.mark.parametrize("guidance, image_guidance", [(7.5, 1.5), (7.5, 1.0), (3.0, 3.0)])
def test_instructions_match_diffusers(guidance, image_guidance, name, spacing):
    sd, pipe = pair("instruct-pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline)
    pipe.scheduler = make_scheduler(name, spacing)
    ours = our_picture(sd, draw=edit.draw, negative_prompt=NEGATIVE, steps=5, guidance=guidance,
                       image_guidance=image_guidance, sampler=name, timestep_spacing=spacing,
                       image=photograph())
    theirs = their_picture(pipe, negative_prompt=NEGATIVE, num_inference_steps=5,
                           guidance_scale=guidance, image_guidance_scale=image_guidance,
                           image=photograph())
    assert_agree(ours, theirs, 100)


def test_conditions_of_weight_zero_are_not_computed():
    """With both scales alike the guess with the picture alone does not count."""
    sd, rows = random_model(small("instruct-pix2pix")), []
    sd.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    for image_guidance, expected in (1.5, 3), (3.0, 2), (1.0, 2):
        rows.clear()
        edit.draw(sd, "a cat", photograph(), image_guidance=image_guidance, guidance=3.0, steps=1)
        assert rows == [expected]


# --- all of them ---

@pytest.mark.parametrize("row, settings", [
    ("sd1", dict(mask=disc_mask())), ("sd1", dict(image=photograph(), mask=disc_mask(72, 40))),
    ("sd1-inpaint", {}), ("sd1-inpaint", dict(image=photograph())),
    ("sd1-inpaint", dict(mask=disc_mask())),
    ("sd1-inpaint", dict(image=photograph(72, 40), mask=disc_mask())),
    ("instruct-pix2pix", {}), ("instruct-pix2pix", dict(image=photograph(), mask=disc_mask()))])
def test_pictures_and_masks_that_do_not_go_together_are_refused(row, settings):
    sd, steps = StableDiffusion(small(row)), []
    with pytest.raises(UserError) as error:
        edit.draw(sd, "a cat", steps=2, callback=steps.append, **settings)
    said = str(error.value)
    assert "\n" not in said and ("mask" in said or "picture" in said) and not steps


@pytest.mark.parametrize("row, settings, said", [
    ("sd1", dict(image_guidance=2.0), "image guidance is for models"),
    ("instruct-pix2pix", dict(image_guidance=float("nan")), "must be a number"),
    ("sd1", dict(cfg_end=1.5), "between 0 and 1"), ("sd1", dict(cfg_end=-0.1), "between 0 and 1"),
    ("sd1", dict(strength=0.1), "0.1 of 3 steps"), ("sd1", dict(strength=1.5), "strength"),
    ("sd1", dict(seed=-1), "seed"), ("sd1", dict(batch=0), "batch")])
def test_settings_out_of_range_are_refused(row, settings, said):
    with pytest.raises(UserError, match=said):
        edit.draw(StableDiffusion(small(row)), "a cat", image=photograph(), steps=3, **settings)


@pytest.mark.parametrize("row", ["sd1-inpaint", "instruct-pix2pix", "sd1"])
def test_a_batch_equals_its_pictures_one_by_one(row):
    sd = random_model(small(row))
    settings = dict(steps=3, negative_prompt="a dog", sampler="euler_a")
    settings |= INPUTS.get(row, dict(image=photograph(), mask=disc_mask()))
    together = edit.draw(sd, "a cat", seed=7, batch=2, **settings)
    alone = [edit.draw(sd, "a cat", seed=7 + i, **settings)[0] for i in range(2)]
    assert max(map(levels_apart, together, alone)) <= 1
    assert levels_apart(*together) > 10


@pytest.mark.parametrize("row, dtype", [("sd1-inpaint", torch.bfloat16),
                                        ("instruct-pix2pix", torch.float16)])
def test_half_precision_draws_much_the_same(row, dtype):
    sd = random_model(small(row))
    settings = dict(steps=3, guidance=2.0) | INPUTS[row]
    exact = edit.draw(sd, "a cat", **settings)[0]
    for network in sd.components.values():
        kept = network is sd.vae and dtype == torch.float16
        network.to(torch.float32 if kept else dtype)
    found = psnr(edit.draw(sd, "a cat", **settings)[0], exact)
    print(f"{found:.1f} dB")
    assert found > (35 if dtype == torch.bfloat16 else 50)


@pytest.mark.parametrize("row", ["sd1", "instruct-pix2pix", "sd1-inpaint"])
def test_guidance_for_a_part_of_the_steps(row):
    """Within the share, one pass of all conditions; after it, the prompt's condition alone."""
    sd, rows = random_model(small(row)), []
    sd.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    settings = dict(steps=4, negative_prompt="a dog") | INPUTS.get(row, {})
    drawn = {share: edit.draw(sd, "a cat", cfg_end=share, **settings)[0] for share in (0, 0.5, 1)}
    all_of = 3 if row == "instruct-pix2pix" else 2
    assert rows == [1] * 4 + [all_of, all_of, 1, 1] + [all_of] * 4
    assert levels_apart(drawn[1], edit.draw(sd, "a cat", **settings)[0]) == 0
    assert levels_apart(drawn[0.5], drawn[1]) > 0 and levels_apart(drawn[0.5], drawn[0]) > 0
    if row == "sd1":
        assert levels_apart(drawn[0], sd.generate("a cat", guidance=1.0, steps=4)[0]) == 0
