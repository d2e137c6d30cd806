"""Make a model fast: `optimize(sd)`. The numbers stay the same but for the last digits.

`optimize` changes the class of modules to a subclass from this file. Names, values and state_dict
stay. It also stores convolutions as memory.py says, and hooks the VAE's decoder to free memory.
`restore(sd)` undoes this. It only takes modules whose class is exactly the one known here. A fork's
own class is left alone, and so is a class of the core that was edited (see fingerprints.py).

What becomes faster:
    Linear            as a 1x1 convolution, on CPUs where that is faster
    attention         in blocks (bf16) or after a copy (fp32), on CPUs
    CrossAttention    keys and values of a text are computed once, not at every step
    Upsample          a transposed convolution with 4 products instead of 9
    UNetModel         what comes before the text is computed once for the two halves of guidance
                      (of one picture, without y and w); on CUDA, steps are recorded and replayed;
                      in bf16 on CPUs, its weights are kept in the order of oneDNN (packed.py)
Results that are kept depend on tensors, so they are only used while these are the same tensors,
unchanged. They are kept outside of the modules: copies and files of modules know nothing of them.
With gradients nothing is kept. Hooks are always called, with the whole batch.
"""
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

import model
import vae
from extras import packed
from extras.deepcache import DeepCachedBlock
from extras.fingerprints import is_current
from extras.memory import AMX, give_back_freed_memory, keep_freed_memory, layout, loading, to

__all__ = ["optimize", "restore", "release", "loading", "to"]


def optimize(sd: object) -> None:
    """Attach everything to a StableDiffusion. A second call takes modules that are new."""
    if sd.device.type == "cpu":
        keep_freed_memory()
    swap_classes(sd.unet, sd.device)
    swap_classes(sd.vae, sd.device)
    for network in (sd.unet, sd.vae, *sd.text_encoders):
        lay_out(network, layout(sd.device, dtype_of(network), network is sd.unet))
    for module, hook in memory_hooks(sd.vae):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def restore(sd: object) -> None:
    """Undo `optimize`."""
    for network in (sd.unet, sd.vae, *sd.text_encoders):
        packed.unpack(network)
        for module in network.modules():
            if type(module) in STANDS_IN_FOR:
                module.__class__ = STANDS_IN_FOR[type(module)]
        lay_out(network, torch.contiguous_format)
    for module, hook in memory_hooks(sd.vae):
        for key in [key for key, one in module._forward_pre_hooks.items() if one is hook]:
            del module._forward_pre_hooks[key]
    release()


def swap_classes(network: nn.Module, device: torch.device) -> None:
    """Give the modules of a network their fast classes. Warns of classes that were edited."""
    edited = []
    for name, module in network.named_modules():
        fast = fast_class(name, module, device)
        if fast is None:
            continue
        changed = [part for part in REPEATS.get(fast, []) if not is_current(part)]
        if changed:
            edited += changed
        else:
            module.__class__ = fast
    for part in dict.fromkeys(edited):
        warnings.warn(f"{part} was edited: it runs as it is written, without its fast version from"
                      " extras/fast.py")


def fast_class(name: str, module: nn.Module, device: torch.device) -> type | None:
    """The class that stands in for the module's, if there is one."""
    if type(module) is nn.Linear:
        return FastLinear if device.type == "cpu" else None
    if type(module) is model.CrossAttention:  # both kinds are; attn2 is given a text
        return FastCrossAttention if name.endswith("attn2") else FastSelfAttention
    return {model.UNetModel: FastUNetModel, model.Upsample: FastUpsample,
            vae.Upsample: FastVAEUpsample, vae.AttnBlock: FastAttnBlock}.get(type(module))


def lay_out(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the weights of convolutions in this order. `memory.to` did it while loading."""
    for p in network.parameters():
        if p.ndim == 4 and not p.is_contiguous(memory_format=memory_format):
            p.data = p.data.contiguous(memory_format=memory_format)


def dtype_of(network: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in network.parameters()), None)


# --- linear layers, attention, upsampling ---

CORE_ATTENTION = model.attention


class FastLinear(nn.Linear):
    """nn.Linear by a 1x1 convolution, in fp32 on x86 CPUs without AMX.

    It is the same product, computed by oneDNN instead of MKL, which is slow on CPUs of AMD (2
    cores with AVX-512: 260 to 480 GFLOP/s, MKL 170 to 210; on an Intel Xeon with AVX-512 the two
    are equal; on an Intel Xeon with AMX: 140 to 400, MKL 270 to 390).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not faster_by_convolution(x, self.weight):
            return super().forward(x)
        rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, rows)
        out = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def faster_by_convolution(x: Tensor, weight: Tensor) -> bool:
    """Not for small products: the convolution takes 0.03 ms to start."""
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not AMX
            and torch.backends.mkl.is_available() and is_plain(x) and is_plain(weight)
            and x.numel() * len(weight) >= 2**23)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """model.attention by what is fastest here. q (B, h, T, d), k and v (B, h, T', d)."""
    on_cpu, tokens = q.device.type == "cpu", k.shape[2]
    if on_cpu and q.dtype == torch.bfloat16:
        if torch.is_grad_enabled() and tokens <= 256:
            return attention_by_products(q, k, v)
        if not torch.is_grad_enabled() and not AMX and tokens >= 256:
            return attention_in_blocks(q, k, v)
    if on_cpu and q.dtype == torch.float32 and tokens >= 2048:
        # the rows of a head side by side: 4 to 8% faster with the copy (Intel Xeon with AMX)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by plain products: in bf16 on CPUs the fused kernel's backward pass is slow.

    Forward and backward of 64 rows of 3 heads of 64 tokens of 32, on 2 cores of an Intel Xeon with
    AMX: 4.7 ms, by the fused kernel 20 ms, by PyTorch's MATH kernel 10 ms. In fp32 4.7, 3.7, 6.4.
    """
    heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))  # 'b h t d -> (b h) t d'
    return ((q @ k.mT).softmax(-1).to(v.dtype) @ v).unflatten(0, heads)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, rows: int = 512) -> Tensor:
    """The same by plain products, for one head and `rows` queries at a time.

    The scores of a block stay in the cache. For bf16 on CPUs where products are several times as
    fast as inside PyTorch's fused kernel (16 heads of 4096 tokens of 40, 2 cores of an AMD EPYC:
    0.12 s, fused 0.28 s). Not with AMX (Intel Xeon: 0.17 s, fused 0.085 s, and nearer to fp32).
    """
    h, zero = torch.empty_like(q), q.new_zeros(1)
    for i in product(range(q.shape[0]), range(q.shape[1])):
        for q_rows, h_rows in zip(q[i].split(rows), h[i].split(rows)):
            # scaled before the scores are rounded to bf16
            scores = torch.addmm(zero, q_rows, k[i].T, beta=0, alpha=q.shape[-1] ** -0.5)
            torch.mm(scores.softmax(-1), v[i], out=h_rows)
    return h


class FastSelfAttention(model.CrossAttention):
    """CrossAttention with the fast `attention`. One row of queries serves all rows of keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) == 1:
            q = q.expand(len(k), -1, -1, -1)
        if model.attention is not CORE_ATTENTION:  # somebody's own, put there meanwhile
            return super().attend(q, k, v)
        if self.config.upcast_attention:
            return attention(q.float(), k.float(), v.float()).to(q.dtype)
        return attention(q, k, v)


class FastCrossAttention(FastSelfAttention):
    """It also keeps keys and values of a context: a text is the same at every step."""

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        compute = partial(super().keys_values, context)
        if computes_anew(context) or not is_linear(self.to_k) or not is_linear(self.to_v):
            return compute()
        weights = [self.to_k.weight, self.to_v.weight]
        return keep(KEYS_VALUES, self, context, weights, compute)


class FastAttnBlock(vae.AttnBlock):
    """The VAE's attention with the fast `attention`."""

    def forward(self, x: Tensor) -> Tensor:
        if vae.attention is not CORE_ATTENTION:
            return super().forward(x)
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None]      # 'b c h w -> b 1 (h w) c'
                   for conv in (self.q, self.k, self.v))
        h = attention(q, k, v)
        h = h[:, 0].transpose(1, 2).reshape(x.shape)                # 'b 1 (h w) c -> b c h w'
        return x + self.proj_out(h)


class FastUpsample(model.Upsample):
    """The UNet's, with `upsample_transposed` where the size doubles."""

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        doubles = tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
        if doubles and faster_transposed(x, self.conv):
            return upsample_transposed(x, self.conv)
        return super().forward(x, size)


class FastVAEUpsample(vae.Upsample):
    """The VAE's, with `upsample_transposed`."""

    def forward(self, x: Tensor) -> Tensor:
        if faster_transposed(x, self.conv):
            return upsample_transposed(x, self.conv)
        return super().forward(x)


def upsample_transposed(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x at twice the size by nearest neighbour): (B, C, H, W) -> (B, C, 2H, 2W).

    The nine weights of a 3x3 convolution then always meet four pixels of x. The weights that meet
    the same pixel are added first. This gives a transposed convolution with a 4x4 kernel, of which
    each output meets 4 weights: the same numbers with 4 products instead of 9.
    """
    weight = conv.weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
    # the sum of each 2x2: (C, C, 4, 4)
    weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, weight, conv.bias, stride=2, padding=1)


def faster_transposed(x: Tensor, conv: nn.Module) -> bool:
    """On CPUs, from 32x32 pixels on: up to twice as fast, with the sums (Intel Xeon with AMX).

    For fewer pixels the sums cost what is saved. Not measured on a GPU. The convolution must be
    the usual one and have no hooks, since they would not be called.
    """
    return (x.device.type == "cpu" and x.shape[2] * x.shape[3] >= 1024
            and type(conv) is nn.Conv2d and not has_hooks(conv)
            and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
            and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros"))


# --- the UNet ---

class FastUNetModel(model.UNetModel):
    """UNetModel that computes less, and on CUDA replays what it has recorded."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        given = [tensor for tensor in (x, context, y, w) if tensor is not None]
        if any(map(computes_anew, given)):
            return super().forward(x, t, context, y, w)
        dtype = self.out[2].weight.dtype
        if context.dtype != dtype:  # else the cast would be a new tensor at every step
            context = keep(CASTS, self, context, [], partial(context.to, dtype))
        if dtype == torch.bfloat16 and x.device.type == "cpu" and packed.cpu_multiplies_bf16():
            packed.pack(self, {nn.Linear, FastLinear, nn.Conv2d}, read_at_each_call(self))
        USED.add(self)
        shared = y is None and w is None and self.can_share(x, t, context)
        if x.device.type == GRAPH_DEVICE and type(self) is FastUNetModel:
            return self.replay(x, t, {"context": context, "y": y, "w": w}, shared)
        return self.compute(x, t, {"context": context, "y": y, "w": w}, shared)

    def compute(self, x: Tensor, t: Tensor, cond: dict[str, Tensor | None],
                shared: bool) -> Tensor:
        if shared:
            return self.forward_shared(x, t, cond["context"])
        return super().forward(x, t, **cond)

    def can_share(self, x: Tensor, t: Tensor, context: Tensor) -> bool:
        """Whether all rows are the same up to the first text, and no hook or fork sees them."""
        if not 1 < len(x) == len(t) == len(context) or self.training:
            return False
        first = [self.time_embed]
        for block in self.input_blocks:
            first.append(block)
            if any(isinstance(layer, model.SpatialTransformer) for layer in block):
                break
        if not all(is_known(module) for part in first for module in part.modules()):
            return False
        same = (x == x[:1]).all() & (t == t[:1]).all()
        return bool(same)

    def forward_shared(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """UNetModel.forward for equal rows of x and t: one row, until it meets the text."""
        dtype = self.out[2].weight.dtype
        h, context = x[:1].to(dtype), context.to(dtype)
        emb = self.embed(t[:1])                                     # (1, E)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)                              # (1 or B, C, H, W)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            if len(skip) < len(h):
                skip = torch.cat([skip] * len(h))  # not expand: the next line would lose the layout
            h = torch.cat([h, skip], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[2:] if skips else None)
        return self.out(h)

    def replay(self, x: Tensor, t: Tensor, cond: dict[str, Tensor | None],
               shared: bool) -> Tensor:
        """The first call with these conditions is computed, the second recorded, others replayed.

        A fast GPU waits for Python otherwise (a guided step of SD 1.x at 512x512 on an H100: 24 ms,
        replayed 10 ms).
        """
        kept = GRAPHS.setdefault(self, WeakTensorKeyDictionary())
        kept = kept.setdefault(cond["context"], {})
        key = (x.shape, t.shape, x.dtype, t.dtype, x.device, shared)
        given = list(cond.values())
        if key not in kept or not kept[key].given.hold(given):
            # the first call makes what is kept from call to call, such as keys and values
            kept[key] = Graph(Unchanged(given))
            return self.compute(x, t, cond, shared)
        graph = kept[key]
        if graph.out is None:
            if any_python(self):
                return self.compute(x, t, cond, shared)
            graph.record(self, x, t, cond, shared)
        out = graph.run(x, t)
        if graph.holds(self):  # checked while the GPU works
            return out.clone()
        del kept[key]
        return self.compute(x, t, cond, shared)


def read_at_each_call(unet: nn.Module) -> set[nn.Module]:
    """Layers whose weights the code here looks at, which would unpack them."""
    found = {unet.out[2]}
    for module in unet.modules():
        if type(module) is FastCrossAttention:
            found |= {module.to_k, module.to_v}
        elif isinstance(module, model.Upsample):
            found.add(module.conv)
    return found


class Graph:
    """A recorded call of the UNet, and what it depends on."""

    def __init__(self, given: "Unchanged"):
        self.given, self.out = given, None

    def record(self, unet: FastUNetModel, x: Tensor, t: Tensor, cond: dict[str, Tensor | None],
               shared: bool) -> None:
        self.types, self.config = types_of(unet), replace(unet.config)
        self.weights = Unchanged(list(unet.parameters()))
        rows = 1 if shared else len(x)
        self.x, self.t, self.graph = x[:rows].clone(), t[:rows].clone(), torch.cuda.CUDAGraph()
        RECORDING.on = True
        try:
            # other threads, such as NCCL's, may go on meanwhile
            with (torch.cuda.device(x.device),
                  torch.cuda.graph(self.graph, stream=recording_stream(x.device),
                                   capture_error_mode="thread_local")):
                self.out = unet.compute(self.x.expand(x.shape), self.t.expand(t.shape), cond,
                                        shared)
        finally:
            RECORDING.on = False
        # the graph reads them where they lie
        self.keys_values = [kept[cond["context"]] for module, kept in KEYS_VALUES.items()
                            if cond["context"] in kept]

    def run(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.copy_(x[:len(self.x)])
        self.t.copy_(t[:len(self.t)])
        self.graph.replay()
        return self.out

    def holds(self, unet: FastUNetModel) -> bool:
        return (not any_python(unet) and types_of(unet) == self.types and unet.config == self.config
                and self.weights.hold(list(unet.parameters())))


def types_of(unet: nn.Module) -> list[type]:
    return [type(module) for module in unet.modules()]


def any_python(unet: nn.Module) -> bool:
    """Whether code may run inside the UNet that a replayed graph would leave out."""
    inside = list(unet.modules())[1:]
    return unet.training or not all(map(is_known, inside)) or any(
        module.capture is not None for module in inside if type(module) is FastCrossAttention)


GRAPH_DEVICE = "cuda"
recording_stream = cache(torch.cuda.Stream)  # one per GPU: libraries keep memory for each stream


# --- what is kept, and how long ---

KEYS_VALUES, CASTS, GRAPHS = WeakKeyDictionary(), WeakKeyDictionary(), WeakKeyDictionary()
USED = WeakSet()               # the UNets that ran since the last `release`
DECODING = WeakSet()           # last Upsamples that have not run since the UNet did
MOST_KEPT = 16                 # contexts per module
RECORDING = threading.local()  # .on: this thread records a graph


def keep(table: WeakKeyDictionary, module: nn.Module, tensor: Tensor, weights: list[Tensor],
         compute: Callable[[], object]) -> object:
    """compute(), or what it returned last time, if tensor and weights are the same as then.

    It is kept as long as the tensor lives.
    """
    kept = table.setdefault(module, WeakTensorKeyDictionary())
    if tensor in kept and kept[tensor][0].hold([tensor, *weights]):
        return kept[tensor][1]
    if len(kept) >= MOST_KEPT:
        kept.clear()
    result = compute()
    kept[tensor] = Unchanged([tensor, *weights]), result
    return result


class Unchanged:
    """Remembers tensors, and tells whether others are the same ones and still hold the same.

    It keeps their memory alive, so that no other tensor can have the same address, but not the
    tensors themselves. It sees what PyTorch counts: not changes through `.data` or numpy.
    """

    def __init__(self, tensors: list[Tensor | None]):
        self.aliases = [None if tensor is None else tensor.detach() for tensor in tensors]
        self.versions = [None if tensor is None else tensor._version for tensor in tensors]

    def hold(self, tensors: list[Tensor | None]) -> bool:
        return (len(tensors) == len(self.aliases)
                and all(map(is_unchanged, tensors, self.aliases, self.versions)))


def is_unchanged(tensor: Tensor | None, alias: Tensor | None, version: int | None) -> bool:
    if tensor is None or alias is None:
        return tensor is alias
    return (tensor._version == version and tensor.data_ptr() == alias.data_ptr()
            and tensor.dtype == alias.dtype and tensor.shape == alias.shape
            and tensor.stride() == alias.stride())


def release() -> None:
    """Drop all that is kept."""
    for table in (KEYS_VALUES, CASTS, GRAPHS, USED, DECODING):
        table.clear()


def memory_hooks(network: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The hooks of a VAE that free memory, with the modules that they belong to."""
    decoder = getattr(network, "decoder", None)
    if not isinstance(decoder, nn.Module):
        return []
    return [(decoder, release_before_decoding),
            *((one, release_while_decoding) for one in last_upsample(decoder))]


def last_upsample(decoder: nn.Module) -> list[nn.Module]:
    """The one that runs last: levels are counted from full resolution. Empty if there is none."""
    return [module for module in decoder.modules() if isinstance(module, vae.Upsample)][:1]


def release_before_decoding(decoder: nn.Module, args: tuple) -> None:
    """A hook of the VAE's decoder. The UNet has done its work: its memory is the VAE's now."""
    if USED and not torch.is_grad_enabled():
        release()
        give_back_freed_memory()
        DECODING.update(last_upsample(decoder))


def release_while_decoding(upsample: nn.Module, args: tuple) -> None:
    """A hook of the decoder's last Upsample, for the first picture after the UNet's work.

    What was freed so far does not fit the largest tensors: SD 1.x at 512x512 saves 0.25 GB.
    """
    if upsample in DECODING:
        DECODING.discard(upsample)
        give_back_freed_memory()


# --- where nothing may be kept, and what must run as it is ---

def computes_anew(x: Tensor) -> bool:
    """Whether results for x must not be kept: gradients, autocast, compilation, others' graphs."""
    return (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
            or not is_plain(x) or x.is_meta or x.is_inference() or torch.compiler.is_compiling()
            or (x.is_cuda and torch.cuda.is_current_stream_capturing()
                and not getattr(RECORDING, "on", False)))


def is_plain(tensor: object) -> bool:
    """A tensor and no subclass of it."""
    return type(tensor) in (Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Also a `forward` or `attend` of its own: some code attaches itself by one."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks or has_own_forward(module)
                or _has_any_global_hook())


def has_own_forward(module: nn.Module) -> bool:
    return bool({"forward", "attend"} & vars(module).keys())


def is_linear(module: nn.Module) -> bool:
    """nn.Linear without hooks, whose weight tells when it changes."""
    return (type(module) in (nn.Linear, FastLinear) and not has_hooks(module)
            and is_plain(module.weight) and not module.weight.is_inference())


def is_known(module: nn.Module) -> bool:
    """A module that treats all rows of a batch alike, and is watched by nobody.

    `capture` of cross-attention always gets the whole batch: its keys have all rows.
    """
    captured = type(module) is FastSelfAttention and module.capture is not None
    known = type(module) in known_classes() or type(module) in ALIKE
    return known and not has_hooks(module) and not captured


# further classes that treat all rows alike: int8.py adds its own
ALIKE: set[type] = {packed.PackedLinear, packed.PackedConv2d}


@cache
def known_classes() -> set[type]:
    core = [model.TimestepEmbedSequential, model.ResBlock, model.SpatialTransformer,
            model.BasicTransformerBlock, model.FeedForward, model.GEGLU, model.Downsample]
    return {cls for cls in core if is_current(f"model.{cls.__name__}")} | {
        nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.SiLU, nn.Identity, nn.Sequential,
        nn.ModuleList, FastLinear, FastSelfAttention, FastCrossAttention, FastUpsample,
        DeepCachedBlock}


# --- which classes are those that the fast ones stand in for ---

STANDS_IN_FOR = {
    FastLinear: nn.Linear, FastSelfAttention: model.CrossAttention,
    FastCrossAttention: model.CrossAttention, FastUpsample: model.Upsample,
    FastUNetModel: model.UNetModel, FastAttnBlock: vae.AttnBlock, FastVAEUpsample: vae.Upsample}

# The parts of the core that a fast class repeats. An edit of one of them must not be lost.
REPEATS = {
    FastSelfAttention: ["model.CrossAttention", "model.attention"],
    FastCrossAttention: ["model.CrossAttention", "model.attention"],
    FastUpsample: ["model.Upsample"], FastUNetModel: ["model.UNetModel"],
    FastAttnBlock: ["vae.AttnBlock", "model.attention"], FastVAEUpsample: ["vae.Upsample"]}
