"""Draw with the UNet's layers in 8 bits, on CPUs: `attach(sd)`.

A layer computes W x + b. Here W and x are whole numbers of 8 bits with a scale:

    W = s_W Q_W,  Q_W in -127...127,  one s_W for each output channel, made once
    x = s_x (Q_x - z),  Q_x in 0...255,  one s_x and z for the tensor, made at every call
    W x = s_W s_x Q_W (Q_x - z)

(Jacob et al. 2018, sections 2.1 and 2.2; "dynamic", since s_x comes from the least and greatest
value of this very x, so that nothing must be calibrated.) CPUs with VNNI multiply such numbers
four times as fast as fp32, and weights take a quarter of the memory.

`attach` changes the class of layers, as fast.py does, and frees their weights. It goes last: LoRAs
must be merged before. What it leaves as it is: see `KEPT`, `layers` and `linear_pays`.
"""
import math
import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import model
from extras import fast, packed
from extras.memory import AMX, PIECE, cpu_has, give_back_freed_memory
from sd import UserError

OPS = torch.ops.onednn

# Layers that stay as they are, by name. The first and the last convolution, the embeddings, the
# 1x1 convolutions around a ResBlock and what follows GEGLU cost quality and save little. (Of the
# built-in model, all of the error but a fifth comes from one of these convolutions, whose input no
# norm evens out, and half of the rest from what follows GEGLU.) The keys and values of a text are
# computed once for a picture by fast.py.
KEPT = re.compile(r"(input_blocks\.0|out|time_embed|label_emb|cond_proj)(\.|$)"
                  r"|.*\.(emb_layers|skip_connection|attn2\.to_[kv]|ff\.net\.2)(\.|$)")


def attach(sd: object) -> None:
    """Round the UNet's weights to 8 bits. A second call finds nothing more to do.

    Raises UserError where this cannot be done: on GPUs, in fp16, for networks of other kinds.
    """
    check(sd.device, sd.dtype)
    if any(isinstance(layer, Int8) for layer in sd.unet.modules()):
        return
    packed.unpack(sd.unet)
    found = list(layers(sd.unet))
    if not linear_pays(found, sd.dtype):
        found = [layer for layer in found if isinstance(layer, nn.Conv2d)]
    if not found:
        raise UserError(f"--int8 knows the layers of UNetModel, and finds none in this"
                        f" {type(sd.unet).__name__}: leave it out")
    with warnings.catch_warnings():  # once in a process PyTorch says that this function will go
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # oneDNN packs with one thread
        list(pool.map(pack, found))
    give_back_freed_memory()


def check(device: str | torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if `attach` would; warns if it would be slow."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        raise UserError(f"--int8 is for CPUs of Intel and AMD, not for {device}: leave it out")
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError("--int8 goes with --dtype fp32 or bf16")
    if not has_vnni():
        warnings.warn("this CPU has no VNNI: --int8 saves memory here, but no time")


def has_vnni() -> bool:
    """Whether the CPU multiplies whole numbers of 8 bits and adds the products in 32 bits."""
    return cpu_has("avx512_vnni", "avx_vnni", "amx_int8")


def linear_pays(found: list[nn.Module], dtype: torch.dtype) -> bool:
    """Whether to round linear layers too.

    With AMX, in bf16, rounding their inputs costs more time than 8 bits save: a guided step of
    SD 1.x takes 1.53 s with convolutions alone and 1.61 s with both. They are rounded all the same
    where they hold most of the weights, as in SDXL, for the memory.
    """
    linear = sum(layer.weight.numel() for layer in found if isinstance(layer, nn.Linear))
    return not (AMX and dtype == torch.bfloat16
                and 2 * linear < sum(layer.weight.numel() for layer in found))


def layers(module: nn.Module, name: str = "") -> Iterator[nn.Module]:
    """The layers to round: those without hooks whose classes, and those of all around them, are
    known here. A fork's own class may do anything with the weights of its layers.
    """
    if KEPT.match(name) or is_foreign(module):
        return
    if type(module) in INT8_OF and is_usual(module):
        yield module
    for child, layer in module.named_children():
        yield from layers(layer, f"{name}.{child}".removeprefix("."))


def is_foreign(module: nn.Module) -> bool:
    """Whether its class is not one of the core, unedited, or it has a `forward` of its own."""
    cls = fast.STANDS_IN_FOR.get(type(module), type(module))
    if fast.has_own_forward(module):
        return True
    if cls in (model.UNetModel, model.CrossAttention, model.Upsample):
        return not fast.is_current(f"model.{cls.__name__}")
    return not (cls in fast.known_classes() or cls in fast.ALIKE)


def is_usual(layer: nn.Module) -> bool:
    """Without hooks, with a weight of its own, and there is a product in 8 bits for it."""
    return (not fast.has_hooks(layer) and fast.is_plain(layer.weight)
            and getattr(layer, "padding_mode", "zeros") == "zeros")


# --- layers ---

class Int8:
    """What the layers share. The weight is gone; who asks for it is told so."""
    packed: Tensor              # Q_W in the order that oneDNN likes
    scale: Tensor               # s_W (C_out,)
    zero: Tensor                # zeros (C_out,): Q_W has no zero point

    @property
    def weight(self) -> Tensor:
        raise UserError("int8: the UNet's weights are rounded, and gone: load the model again to"
                        " save it, to train it or to add a LoRA, and round it last")

    def _save_to_state_dict(self, *_) -> None:
        self.weight

    def _load_from_state_dict(self, *_) -> None:
        self.weight

    def arguments(self, x: Tensor) -> tuple:
        """What both products take, and the error for those who need gradients."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError("int8: rounded layers have no gradient: load the model without it")
        return self.packed, self.scale, self.zero, self.bias


class Int8Linear(Int8, nn.Linear):
    """nn.Linear in 8 bits: (..., C_in) -> (..., C_out)"""

    def forward(self, x: Tensor) -> Tensor:
        weights, (q, s, z) = self.arguments(x), rounded_once(x)
        out = OPS.qlinear_pointwise(q, s, z, *weights, 1.0, 0, x.dtype, "none", [], "")
        return out.view(*x.shape[:-1], -1)


class Int8Conv2d(Int8, nn.Conv2d):
    """nn.Conv2d in 8 bits: (B, C_in, H, W) -> (B, C_out, H', W')"""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.arguments(x)
        q, s, z = rounded(x.permute(0, 2, 3, 1))                    # 'b c h w -> b h w c'
        return OPS.qconv2d_pointwise(
            q.permute(0, 3, 1, 2), s, z, *weights, self.stride, self.padding, self.dilation,
            self.groups, 1.0, 0, x.dtype, "none", [], "")


INT8_OF = {nn.Linear: Int8Linear, fast.FastLinear: Int8Linear, nn.Conv2d: Int8Conv2d}
fast.ALIKE |= {Int8Linear, Int8Conv2d}


@torch.no_grad()
def pack(layer: nn.Module) -> None:
    """Give a layer its class of 8 bits, and free its weight.

    Without VNNI the sum of two products is kept in 16 bits, which holds them if one of the factors
    has 7 bits (oneDNN's guide, "Nuances of int8 computations").
    """
    q, scale = rounded_weight(layer.weight, 127 if has_vnni() else 63)
    if isinstance(layer, nn.Linear):
        packed = OPS.qlinear_prepack(q, None)
    else:
        packed = OPS.qconv_prepack(q, scale, 1.0, 128, layer.stride, layer.padding, layer.dilation,
                                   layer.groups)
    del layer._parameters["weight"]
    layer.__class__ = INT8_OF[type(layer)]
    layer.packed, layer.scale, layer.zero = packed, scale, torch.zeros(len(q), dtype=torch.int32)


def rounded_weight(weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """W (C_out, ...) -> Q_W in -most...most, s_W (C_out,). In pieces that fit the cache."""
    q, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    rows = max(1, PIECE * len(weight) // weight.numel())
    for w, whole, s in zip(weight.split(rows), q.split(rows), scale.split(rows)):
        w = w.flatten(1).float()
        s.copy_(w.abs().amax(1).clamp(min=1e-12) / most)
        whole.copy_((w / s[:, None]).round_().view(whole.shape))
    return q, scale


# --- inputs ---

def rounded(x: Tensor) -> tuple[Tensor, float, int]:
    """x -> Q_x in 0...255, s_x, z; 0 lies in the range, since convolutions pad with it.

    A z of 0 would have other packed weights in oneDNN, so it is 1 or more.
    """
    x = x.contiguous()  # aminmax of other layouts takes ten times as long
    low, high = (value.item() for value in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 254, 1e-12)
    if not math.isfinite(scale):  # then so is the answer
        return torch.zeros(x.shape, dtype=torch.uint8), math.nan, 1
    zero = 1 + round(-low / scale)
    q = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
    # its bytes, without a copy
    return torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape), scale, zero


LAST = threading.local()  # .x, .version, .found: the last tensor of a linear layer, and its bytes


def rounded_once(x: Tensor) -> tuple[Tensor, float, int]:
    """`rounded` of the rows of x (..., C): queries, keys and values have the same x."""
    if x.is_inference():
        return rounded(x.reshape(-1, x.shape[-1]))
    if getattr(LAST, "x", lambda: None)() is not x or LAST.version != x._version:
        LAST.found = rounded(x.reshape(-1, x.shape[-1]))
        LAST.x, LAST.version = weakref.ref(x), x._version
    return LAST.found
