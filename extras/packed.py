"""Keep weights in the order in which oneDNN multiplies them: `pack(unet)`. For bf16 on CPUs.

oneDNN brings a plain weight into an order of its own at every call. If that is done once, a guided
step of SD 1.x at 512x512 takes 0.9 of its time (2 cores of an Intel Xeon with AMX; on an AMD EPYC
with AVX-512-bf16 a prototype took 0.94). Packing takes about a second. It pays after five steps.

A packed layer does not hold its weight twice. Whoever looks at its weight or its parameters (to
save them, to add a LoRA, to move them) gets them as they were, to the bit, and the layer is plain
again. The next call of the UNet packs it.
"""
import threading
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from extras.memory import cpu_has, give_back_freed_memory

OPS = torch.ops.mkldnn
LEAST = 2**16    # numbers in a weight: smaller layers take little of a step
AT_ONCE = 2**26  # numbers in the weights that are packed before memory is given back
MOST_TIMES = 5   # a layer whose weight is looked at again and again stays plain
TIMES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how often it was packed
LOCK = threading.RLock()


@cache
def cpu_multiplies_bf16() -> bool:
    """Otherwise packing does not pay."""
    return cpu_has("avx512_bf16", "amx_bf16")


def pack(network: nn.Module, kinds: set[type], kept: set[nn.Module]) -> None:
    """Pack the layers of these classes but for `kept`."""
    freed = 0
    for layer in network.modules():
        with LOCK:  # else two threads could pack one layer
            if type(layer) in kinds and layer not in kept and can_pack(layer):
                freed += vars(layer)["_parameters"]["weight"].numel()
                pack_layer(layer)
        if freed >= AT_ONCE:
            give_back_freed_memory()  # packed weights seldom fit where the plain ones were
            freed = 0


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


@torch.no_grad()
def pack_layer(layer: nn.Module) -> None:
    weight, cls = vars(layer)["_parameters"]["weight"], type(layer)
    if isinstance(layer, nn.Conv2d):
        packed = OPS._reorder_convolution_weight(weight, layer.padding, layer.stride,
                                                 layer.dilation, layer.groups)
        layer.__class__ = PackedConv2d
    else:
        packed = OPS._reorder_linear_weight(weight)
        layer.__class__ = PackedLinear
    vars(layer)["packed"] = packed, weight.stride(), cls
    # another dict, without the weight: a thread may be reading this one
    vars(layer)["_parameters"] = {name: value for name, value in vars(layer)["_parameters"].items()
                                  if name != "weight"}
    TIMES[layer] = TIMES.get(layer, 0) + 1


def unpack_layer(layer: nn.Module) -> None:
    """Nothing if another thread was first."""
    with LOCK:
        if not isinstance(layer, Packed):
            return
        packed, stride, cls = vars(layer).pop("packed")
        weight = torch.empty_strided(packed.shape, stride, dtype=packed.dtype)
        weight = nn.Parameter(weight.copy_(packed.to_dense()), requires_grad=False)
        # another dict, with the weight first again
        vars(layer)["_parameters"] = {"weight": weight, **vars(layer)["_parameters"]}
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


def fits(x: Tensor) -> bool:
    """Whether the packed product knows such an input."""
    return (type(x) is Tensor and x.dtype == torch.bfloat16 and x.device.type == "cpu"
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    unpack_layer(layer)
    return type(layer).forward(layer, x)
