"""Keep weights in the order in which oneDNN multiplies them: `pack(unet)`. For bf16 on CPUs.

oneDNN brings a plain weight into an order of its own at every call. Done once, linear layers and
convolutions of SD 1.x take 0.82 of their time (512x512, 2 cores of an Intel Xeon with AMX; on an
AMD EPYC with AVX-512-bf16 0.96). It takes 0.8 s, so less than five steps.

A packed layer does not hold its weight twice. Whoever looks at its weight or its parameters (to
save them, to add a LoRA, to move them) gets them as they were, to the bit, and the layer is plain
again. The next call of the UNet packs it.
"""
import threading
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

OPS = torch.ops.mkldnn
LEAST = 2**16    # numbers in a weight: below, a call takes no less time
MOST_TIMES = 5   # a layer whose weight is looked at again and again stays plain
TIMES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how often it was packed
LOCK = threading.RLock()


@cache
def pays() -> bool:
    """Whether the CPU multiplies bf16 itself."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_tile"))


def pack(network: nn.Module, kinds: set[type], kept: set[nn.Module]) -> None:
    """Pack the layers of these classes but for `kept`, where that pays."""
    for layer in network.modules() if pays() else ():
        if type(layer) in kinds and layer not in kept and can_pack(layer):
            pack_layer(layer)


def unpack(network: nn.Module) -> None:
    """Make all layers plain again."""
    for layer in list(network.modules()):
        unpack_layer(layer)


def can_pack(layer: nn.Module) -> bool:
    """A frozen weight in bf16 on a CPU, that nothing watches."""
    weight = vars(layer)["_parameters"].get("weight")
    return (type(weight) is nn.Parameter and weight.dtype == torch.bfloat16
            and weight.device.type == "cpu" and not weight.requires_grad
            and not weight.is_inference() and weight.numel() >= LEAST
            and getattr(layer, "padding_mode", "zeros") == "zeros"
            and not {"weight", "forward"} & vars(layer).keys()
            and TIMES.get(layer, 0) < MOST_TIMES)


def pack_layer(layer: nn.Module) -> None:
    with LOCK, torch.no_grad():
        weight = vars(layer)["_parameters"]["weight"]
        if isinstance(layer, nn.Conv2d):
            packed = OPS._reorder_convolution_weight(weight, layer.padding, layer.stride,
                                                     layer.dilation, layer.groups)
        else:
            packed = OPS._reorder_linear_weight(weight)
        vars(layer)["packed"] = packed, weight.stride(), type(layer)
        layer.__class__ = PACKED[nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear]
        del vars(layer)["_parameters"]["weight"]
        TIMES[layer] = TIMES.get(layer, 0) + 1


def unpack_layer(layer: nn.Module) -> None:
    """Nothing if another thread was first."""
    with LOCK:
        if not isinstance(layer, Packed):
            return
        packed, stride, cls = vars(layer).pop("packed")
        weight = torch.empty_strided(packed.shape, stride, dtype=packed.dtype)
        parameters = vars(layer)["_parameters"]
        others = dict(parameters)
        parameters.clear()  # the weight comes first again
        parameters["weight"] = nn.Parameter(weight.copy_(packed.to_dense()), requires_grad=False)
        parameters.update(others)
        layer.__class__ = cls


class Packed:
    """What packed layers share.

    Python asks a class for a property before it asks the instance, so no look at the parameters is
    missed.
    """

    @property
    def _parameters(self) -> dict:
        unpack_layer(self)
        return vars(self)["_parameters"]

    @_parameters.setter
    def _parameters(self, value: dict) -> None:
        unpack_layer(self)
        vars(self)["_parameters"] = value

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"]

    def __reduce_ex__(self, protocol: int) -> object:
        unpack_layer(self)   # for copies and pickles; it has another class now
        return self.__reduce_ex__(protocol)


class PackedLinear(Packed, nn.Linear):
    """nn.Linear: (..., C_in) -> (..., C_out)"""

    def forward(self, x: Tensor) -> Tensor:
        found = vars(self).get("packed")
        if found is None or not fits(x):
            return plain(self, x)
        return OPS._linear_pointwise(x, found[0], self.bias, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):
    """nn.Conv2d: (B, C_in, H, W) -> (B, C_out, H', W')"""

    def forward(self, x: Tensor) -> Tensor:
        found = vars(self).get("packed")
        if found is None or not fits(x):
            return plain(self, x)
        return OPS._convolution_pointwise(x, found[0], self.bias, self.padding, self.stride,
                                          self.dilation, self.groups, "none", [], "")


PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def fits(x: Tensor) -> bool:
    """Whether the packed product knows such an input."""
    return (type(x) is Tensor and x.dtype == torch.bfloat16 and x.device.type == "cpu"
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    unpack_layer(layer)
    return type(layer).forward(layer, x)
