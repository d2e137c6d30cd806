"""The UNet: a noisy latent, a time and a text in, the noise (or velocity) in that latent out.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3. Modules carry the
names of `ldm/modules/diffusionmodules/openaimodel.py` and `ldm/modules/attention.py`, which are those in official
checkpoints. One loop down and one loop up build SD 1.x, SD 2.x, SDXL and anything smaller from per-level tuples.

Shapes: B batch, C channels, H W latent size, T tokens (77 words, or H*W positions), D width of the words' vectors,
E width of the time embedding (4 * model_channels).

    x (B,4,H,W)                                                             (B,4,H,W)
        | conv                                                                  | conv
    [ResBlock + SpatialTransformer] x2 ------------ skips -----------> [cat + ResBlock + SpatialTransformer] x3
        | Downsample                                                            | Upsample
    ... one such row per entry of channel_mult ...                      ... and back up ...
        +-------------> ResBlock, SpatialTransformer, ResBlock (middle) --------+
"""
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)         # width of each level / model_channels
    num_res_blocks: int = 2                              # per level on the way down; one more on the way up
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)    # BasicTransformerBlocks after each ResBlock; 0: no attention
    transformer_depth_middle: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)            # per level; the middle has the last level's
    context_dim: int = 768                               # D
    adm_in_channels: int | None = None                   # width of a vector added to the time embedding; None: no such input
    time_cond_proj_dim: int | None = None                # width of the embedding of a guidance scale (LCM); None: no such input
    num_groups: int = 32                                 # of every GroupNorm
    upcast_attention: bool = False                       # scores in fp32 whatever the weights are: SD 2.x's overflow in fp16
    use_linear: bool = False                             # how files store proj_in/out: Linear (SD2, SDXL) or 1x1 convolution (SD1)


class UNetModel(nn.Module):
    """x (B, in, H, W), t (B,), context (B, T, D), y (B, adm_in_channels) or None, w (B,) or None -> (B, out, H, W).

    w is the scale of guidance, for models distilled to follow it in one pass (Luo et al. 2023, section 4.2). t counts 0...999 as in DDPM
    (fractions allowed). H and W may be any size: Upsample goes to the skip's size.
    """

    def __init__(self, cfg: UNetConfig = UNetConfig()):
        super().__init__()
        self.cfg = cfg
        c, emb_dim = cfg.model_channels, 4 * cfg.model_channels
        widths = [cfg.model_channels * m for m in cfg.channel_mult]

        def blocks(c_in: int, level: int) -> TimestepEmbedSequential:
            """A ResBlock to the level's width, with attention if the level has it."""
            layers = [ResBlock(c_in, widths[level], emb_dim, cfg.num_groups)]
            if cfg.transformer_depth[level]:
                layers.append(SpatialTransformer(widths[level], cfg.num_heads[level], cfg.transformer_depth[level], cfg))
            return TimestepEmbedSequential(*layers)

        self.time_embed = mlp(c, emb_dim)
        if cfg.adm_in_channels is not None:
            self.label_emb = nn.Sequential(mlp(cfg.adm_in_channels, emb_dim))
        if cfg.time_cond_proj_dim is not None:
            self.cond_proj = nn.Linear(cfg.time_cond_proj_dim, c, bias=False)

        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(cfg.in_channels, c, 3, padding=1))])
        skips = [c]
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(blocks(c, level))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(c)))
                skips.append(c)

        self.middle_block = TimestepEmbedSequential(
            ResBlock(c, c, emb_dim, cfg.num_groups),
            SpatialTransformer(c, cfg.num_heads[-1], cfg.transformer_depth_middle, cfg),
            ResBlock(c, c, emb_dim, cfg.num_groups))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(cfg.num_res_blocks + 1):
                self.output_blocks.append(blocks(c + skips.pop(), level))
                c = width
                if level > 0 and i == cfg.num_res_blocks:
                    self.output_blocks[-1].append(Upsample(c))

        self.out = nn.Sequential(nn.GroupNorm(cfg.num_groups, c), nn.SiLU(), zero(nn.Conv2d(c, cfg.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        dtype = self.out[2].weight.dtype
        if x.stride(0) == t.stride(0) == 0:  # one x expanded to B, as in guidance: until it meets words, or y or w, once is enough
            x, t = x[:1], t[:1]
        h, context = x.to(dtype), context.to(dtype)
        emb = timestep_embedding(t, self.cfg.model_channels).to(dtype)                   # (B, model_channels)
        if self.cfg.time_cond_proj_dim is not None:
            if w is None:
                raise ValueError("this UNet needs w (B,), the scale of guidance: StableDiffusion.told gives it")
            emb = emb + self.cond_proj(guidance_embedding(w, self.cfg.time_cond_proj_dim).to(dtype))
        emb = self.time_embed(emb)                                                       # (B, E)
        if self.cfg.adm_in_channels is not None:
            if y is None:
                raise ValueError(f"this UNet needs y (B, {self.cfg.adm_in_channels}) beside the context: StableDiffusion.condition gives both")
            emb = emb + self.label_emb(y.to(dtype))
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            if skip.shape[0] < h.shape[0]:
                skip = torch.cat([skip] * h.shape[0])  # not expand: the result would not be channels last
            h = torch.cat([h, skip], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[-2:] if skips else None)
        return self.out(h)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Times (B,) -> (B, dim): cosines, then sines, of t at dim/2 frequencies from 1 down to about 1/10000, in fp32.

    Vaswani et al. 2017, section 3.5, but with the cosines first, as the released weights expect.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Scales of guidance (B,) -> (B, dim): as above of 1000 (w - 1), but sines first and down to 1/10000 exactly, as LCM was trained."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=w.device) / (dim // 2 - 1))
    angles = 1000 * (w.float() - 1)[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row, each given what it takes: the time, the text, or the size to go to."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual; the time enters as one value per channel, the same at every position.

    x (B, C_in, H, W), emb (B, E) -> (B, C_out, H, W)
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int, num_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(num_groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(  # index 2 was a dropout of 0; it keeps the convolution's official name, out_layers.3
            nn.GroupNorm(num_groups, c_out), nn.SiLU(), nn.Identity(), zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SpatialTransformer(nn.Module):
    """Every position of the feature map becomes a token; transformer blocks let tokens look at each other and at the words.

    x (B, C, H, W), context (B, T, D) -> (B, C, H, W)
    """

    def __init__(self, c: int, heads: int, depth: int, cfg: UNetConfig):
        super().__init__()
        self.use_linear = cfg.use_linear
        self.norm = nn.GroupNorm(cfg.num_groups, c, eps=1e-6)  # 1e-5 in the ResBlocks, 1e-6 here
        self.proj_in = Linear(c, c)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(c, heads, cfg) for _ in range(depth))
        self.proj_out = zero(Linear(c, c))
        self.register_load_state_dict_pre_hook(squeeze_projections)
        self.register_state_dict_post_hook(unsqueeze_projections)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        _, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)       # 'b c h w -> b (h w) c'
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h)
        return x + h.transpose(1, 2).reshape(-1, C, H, W)  # 'b (h w) c -> b c h w'


def squeeze_projections(module, state_dict, prefix, *_):
    """SD1 files hold proj_in/out as 1x1 convolutions (C, C, 1, 1), the same map as a Linear (C, C): take either."""
    for key in (prefix + "proj_in.weight", prefix + "proj_out.weight"):
        if key in state_dict and state_dict[key].shape[2:] == (1, 1):
            state_dict[key] = state_dict[key][:, :, 0, 0]


def unsqueeze_projections(module, state_dict, prefix, _):
    """And save them as the family's official files do."""
    for key in (prefix + "proj_in.weight", prefix + "proj_out.weight"):
        if not module.use_linear:
            state_dict[key] = state_dict[key][:, :, None, None]


class BasicTransformerBlock(nn.Module):
    """x + self-attention, + cross-attention to the words, + feed-forward, each on a normalised x. (B, T, C) -> (B, T, C)"""

    def __init__(self, dim: int, heads: int, cfg: UNetConfig):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, cfg.upcast_attention)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, cfg.context_dim, heads, cfg.upcast_attention)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Multi-head attention from x to context; context=None means from x to itself. (B, T, C), (B, T', D) -> (B, T, C)"""

    def __init__(self, query_dim: int, context_dim: int, heads: int, upcast: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = Linear(query_dim, query_dim, bias=False)
        self.to_k = Linear(context_dim, query_dim, bias=False)
        self.to_v = Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(Linear(query_dim, query_dim))
        self.watch: Callable[[Tensor], None] | None = None            # set by `watching`
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None  # set by `words_kept`

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = self.split(self.to_q(x))
        k, v = self.keys_and_values(x if context is None else context)
        if q.shape[0] == 1:
            q = q.expand(k.shape[0], -1, -1, -1)
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        if self.watch is None:
            h = attention(q, k, v)
        else:
            h, a = attention(q, k, v, return_weights=True)
            self.watch(a)
        return self.to_out(h.to(x.dtype).transpose(1, 2).flatten(2))            # 'b h t d -> b t (h d)'

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)      # 'b t (h d) -> b h t d'

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is not None and id(context) in self.kept:
            return self.kept[id(context)][1:]
        k, v = self.split(self.to_k(context)), self.split(self.to_v(context))
        if self.kept is not None:
            self.kept[id(context)] = (context, k, v)  # holding the context, no other tensor can get its id
        return k, v


@contextmanager
def watching(unet: UNetModel, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, every cross-attention of the UNet calls watch(its name, its matrix a (B, heads, H*W, T)); rows of a sum to 1.
    On CUDA it must leave a there, and what it makes of it is made anew at every step, in the same place (see `replayed`)."""
    layers = cross_attentions(unet)
    for name, layer in layers.items():
        layer.watch = partial(watch, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.watch = None


@contextmanager
def words_kept(unet: UNetModel) -> Iterator[None]:
    """Within, keys and values of a context tensor are computed once and not at every step. Neither it nor the weights may change there."""
    layers = cross_attentions(unet)
    for layer in layers.values():
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers.values():
            layer.kept = None


@contextmanager
def deep_kept(unet: UNetModel, every: int) -> Iterator[None]:
    """Within, only every `every`-th call with the same context tensor (in the UNet's dtype) computes the whole UNet. In those between, all blocks but the
    first and the last give what they last gave: deep features change slowly from step to step. Ma, Fang & Wang 2024 (DeepCache), section 3.2."""
    deep = [*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks[:-1]]
    calls, kept = Counter(), {}

    def forward(compute: Callable[..., Tensor], x: Tensor, emb: Tensor, context: Tensor, **size: torch.Size) -> Tensor:
        if calls[compute, context] % every == 0:
            kept[compute, context] = compute(x, emb, context, **size)
        calls[compute, context] += 1
        return kept[compute, context]

    for block in deep:
        block.forward = partial(forward, block.forward)
    try:
        yield
    finally:
        for block in deep:
            del block.forward


recording_stream = cache(torch.cuda.Stream)  # one for each GPU: libraries keep memory for every stream they meet


@contextmanager
def replayed(unet: UNetModel) -> Iterator[Callable[..., Tensor]]:
    """The UNet on CUDA, for a t that is the same for all: what it has the GPU do is recorded at the second call with the same condition tensors, and
    replayed from then on, to the same numbers. A fast GPU else waits for Python (a guided step of SD 1.x at 512x512 on an H100: 24 ms, replayed 10).
    What Python does on the way is not done again, and neither the weights nor the conditions may change within."""
    recorded = {}

    def call(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        key = (x.shape, x.stride(0) == 0, *map(id, condition.values()))
        if key not in recorded:  # the first call makes what is kept from call to call, such as the words' keys and values
            recorded[key] = None, condition  # which is held, so that no other tensor can get its id
            return unet(x, t, **condition)
        if recorded[key][0] is None:
            graph, x_seen, t_seen = torch.cuda.CUDAGraph(), (x[:1] if x.stride(0) == 0 else x).clone(), t[:1].clone()
            with torch.cuda.device(x.device), torch.cuda.graph(graph, stream=recording_stream(x.device), capture_error_mode="thread_local"):
                out = unet(x_seen.expand(x.shape), t_seen.expand(t.shape), **condition)  # other threads, such as NCCL's, may go on meanwhile
            recorded[key] = graph, condition, x_seen, t_seen, out
        graph, _, x_seen, t_seen, out = recorded[key]
        x_seen.copy_(x[:len(x_seen)])
        t_seen.copy_(t[:1])
        graph.replay()
        return out.clone()
    try:
        yield call
    finally:
        recorded.clear()  # a graph holds the memory it was recorded in


def cross_attentions(unet: UNetModel) -> dict[str, CrossAttention]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn2")}


AMX = torch.cpu.get_capabilities().get("amx_bf16", False)  # Intel's unit for products of bf16


def attention(q: Tensor, k: Tensor, v: Tensor, return_weights: bool = False):
    """softmax(q k^T / sqrt(d)) v: a soft dictionary. Vaswani et al. 2017, equation 1.

    A dictionary returns the value whose key equals the query; attention returns all values mixed, each by how well
    its key matches. q (B, h, T, d), k and v (B, h, T', d) -> (B, h, T, d); with `return_weights` also the matrix
    a (B, h, T, T'), whose rows sum to 1: the fused kernel never forms it, so it is computed openly, in fp32.
    """
    if return_weights:
        a = (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return a.to(v.dtype) @ v, a
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not AMX and k.shape[2] >= 256 and not torch.is_grad_enabled():
        return attention_in_blocks(q, k, v)
    if q.device.type == "cpu" and q.dtype == torch.float32 and k.shape[2] >= 2048:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # a head's rows side by side: 4 to 8% faster with the copying (Intel Xeon with AMX)
    return F.scaled_dot_product_attention(q, k, v)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, rows: int = 512) -> Tensor:
    """The same by plain products, of one head and so many queries at a time that their scores stay in the cache: for bf16 on CPUs whose products are
    several times as fast as those within PyTorch's fused kernel (16 heads of 4096 tokens of 40, 2 cores of an AMD EPYC: 0.12 s, fused 0.28 s). Not
    where that kernel has AMX at its service (an Intel Xeon: 0.17 s, fused 0.085 s, and nearer to fp32)."""
    h, none = torch.empty_like(q), q.new_zeros(1)
    for i in product(range(q.shape[0]), range(q.shape[1])):
        for some_q, some_h in zip(q[i].split(rows), h[i].split(rows)):
            scores = torch.addmm(none, some_q, k[i].T, beta=0, alpha=q.shape[-1] ** -0.5)  # scaled before they are rounded
            torch.mm(scores.softmax(-1), v[i], out=some_h)
    return h


class Linear(nn.Linear):
    """The usual one, on x86 CPUs without AMX in fp32 by way of a 1x1 convolution: the same product, by oneDNN instead of MKL, which is slow on AMD's
    (2 cores with AVX-512: 260 to 480 GFLOP/s, by MKL 170 to 210; an Intel Xeon with AMX: 140 to 400, by MKL 270 to 390). (..., C) -> (..., C_out)"""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or AMX or not torch.backends.mkl.is_available():
            return super().forward(x)
        rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, rows), channels last as they lie
        return F.conv2d(rows, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class GEGLU(nn.Module):
    """Linear to twice the width; the first half is gated by the gelu of the second. Shazeer 2020. (..., C) -> (..., C_out)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, 4C) -> (B, T, C)"""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))  # index 1 was a dropout of 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)), by a stride-2 convolution padded on all sides (unlike the VAE's)."""

    def __init__(self, c: int):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, *size): nearest neighbour, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return upsample(x, self.conv, size)


def upsample(x: Tensor, conv: nn.Conv2d, size: torch.Size) -> Tensor:
    """conv(x at the new size by nearest neighbour): (B, C, H, W) -> (B, C, *size).

    Where the size doubles, the nine weights of a 3x3 convolution always meet four pixels of x. Those that meet the same one can be added up beforehand, to
    a transposed convolution that gives the same numbers with 4 products for 9 (and calls none of conv's hooks). Where x has 32x32 pixels or more that
    is up to twice as fast, the adding included (Intel Xeon with AMX); below, adding takes what it saves. Not measured on a GPU.
    """
    H, W = x.shape[2:]
    if x.device.type != "cpu" or H * W < 1024 or size != (2 * H, 2 * W):
        return conv(F.interpolate(x, size=size, mode="nearest"))
    weight = conv.weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
    weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # the sum of each 2x2: (C, C, 4, 4)
    return F.conv_transpose2d(x, weight, conv.bias, stride=2, padding=1)


def mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


def zero(module: nn.Module) -> nn.Module:
    """Start a residual branch at zero, so that a fresh network is the identity plus its skips."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
