"""Which network NaN came from, and what helps."""
import torch

from extras.renames import UNET, VAE
from sd import StableDiffusion, UserError


def explain_nan(sd: StableDiffusion, error: UserError, prompts: list[str]) -> UserError:
    """The error of a picture with NaN, with the network's name and what to do about it.

    Other errors are returned as they are.
    """
    if not str(error).startswith("NaN "):
        return error
    kinds = {UNET: "UNet", VAE: "VAE"}
    for prefix, network in sd.components.items():
        kind = kinds.get(prefix, "text encoder")
        for name, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                return UserError(f"NaN from the {kind}: its weights hold NaN or infinity ({prefix}"
                                 f"{name}): the file is damaged, or too large for {tensor.dtype}; "
                                 "get it again")
    kind = "VAE" if "decoded" in str(error) else "UNet"
    with torch.no_grad():
        cond = sd.encode_prompt(prompts)
    if not all(value.isfinite().all() for value in cond.values()):
        kind = "text encoder"
    dtype = torch.float32 if kind == "VAE" and sd.dtype == torch.float16 else sd.dtype
    advice = "try --dtype fp32" if dtype != torch.float32 else (
        "its weights are finite and in fp32, so this is the model's: try another prompt, a lower "
        "--guidance or no LoRA")
    return UserError(f"{error} (from the {kind}): {advice}")
