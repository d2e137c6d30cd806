"""The UNet: it takes a noisy latent, a time and a text, and predicts the noise (or velocity).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3.
Modules have the names of `ldm/modules/diffusionmodules/openaimodel.py` and
`ldm/modules/attention.py`, which are the names in official checkpoints. One loop down and one
loop up build SD 1.x, SD 2.x, SDXL and smaller models from a few numbers per level.

Shapes: B batch, C channels, H W latent size, T tokens (77 for a text, H*W for a picture),
D width of a text token, E width of the time embedding (4 * model_channels), d width of a head.
In (B, h, T, d) and 'b h t d', h is the number of heads.

    x (B,4,H,W)                                                        (B,4,H,W)
        | conv                                                             | conv
    [ResBlock, SpatialTransformer] x2 --------- skips -----> [cat, ResBlock, SpatialTransformer] x3
        | Downsample                                                       | Upsample
    ... one such row for each level of channel_mult ...             ... and back up ...
        +-----------> ResBlock, SpatialTransformer, ResBlock (middle) -----+
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)       # width of each level / model_channels
    num_res_blocks: int = 2                            # per level going down; one more going up
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)  # blocks after each ResBlock; 0: no attention
    transformer_depth_middle: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)          # per level; the middle has the last level's
    context_dim: int = 768                             # D
    adm_in_channels: int | None = None                 # width of the vector y (SDXL); None: no y
    time_cond_proj_dim: int | None = None              # width of w's embedding (LCM); None: no w
    num_groups: int = 32                               # of every GroupNorm
    upcast_attention: bool = False                     # attention in fp32: SD 2.x overflows in fp16
    use_linear: bool = False                           # files store proj_in/out as Linear, not conv


class UNetModel(nn.Module):
    """The network of diffusion: unet(x, t, **cond).

    x (B, in_channels, H, W): latents of any size, and further channels behind them.
    t (B,): times 0...999, fractions allowed.
    context (B, T, D): the text, a vector per token.
    y (B, adm_in_channels): one vector for the whole text and the picture's size (SDXL).
    w (B,): the guidance scale, for models that guide themselves (Luo et al. 2023, section 4.2).
    Returns (B, out_channels, H, W). Raises ValueError if y or w is needed and missing.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        c = config.model_channels
        widths = [config.model_channels * m for m in config.channel_mult]

        self.time_embed = mlp(c, 4 * c)
        if config.adm_in_channels is not None:
            self.label_emb = nn.Sequential(mlp(config.adm_in_channels, 4 * c))
        if config.time_cond_proj_dim is not None:
            self.cond_proj = nn.Linear(config.time_cond_proj_dim, c, bias=False)

        conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_in)])
        skips = [c]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(make_block(c, level, config))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(c)))
                skips.append(c)

        self.middle_block = TimestepEmbedSequential(
            ResBlock(c, c, config),
            SpatialTransformer(c, config.num_heads[-1], config.transformer_depth_middle, config),
            ResBlock(c, c, config))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                self.output_blocks.append(make_block(c + skips.pop(), level, config))
                c = width
                if level > 0 and i == config.num_res_blocks:
                    self.output_blocks[-1].append(Upsample(c))

        self.out = nn.Sequential(nn.GroupNorm(config.num_groups, c), nn.SiLU(),
                                 zero_module(nn.Conv2d(c, config.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        dtype = self.out[2].weight.dtype
        h, context = x.to(dtype), context.to(dtype)
        emb = self.embed(t, y, w)                                   # (B, E)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[2:] if skips else None)
        return self.out(h)

    def embed(self, t: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The time, and with it y and w: (B,), (B, adm_in_channels), (B,) -> (B, E)."""
        config, dtype = self.config, self.out[2].weight.dtype
        emb = timestep_embedding(t, config.model_channels).to(dtype)   # (B, model_channels)
        if config.time_cond_proj_dim is not None:
            if w is None:
                raise ValueError("this UNet needs w (B,), the guidance scale")
            emb = emb + self.cond_proj(guidance_embedding(w, config.time_cond_proj_dim).to(dtype))
        emb = self.time_embed(emb)                                  # (B, E)
        if config.adm_in_channels is not None:
            if y is None:
                raise ValueError(f"this UNet needs y (B, {config.adm_in_channels})")
            emb = emb + self.label_emb(y.to(dtype))
        return emb


def make_block(c_in: int, level: int, config: UNetConfig) -> "TimestepEmbedSequential":
    """A ResBlock to the level's width, and attention if the level has it."""
    width = config.model_channels * config.channel_mult[level]
    depth = config.transformer_depth[level]
    layers = [ResBlock(c_in, width, config)]
    if depth > 0:
        layers.append(SpatialTransformer(width, config.num_heads[level], depth, config))
    return TimestepEmbedSequential(*layers)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Times (B,) -> (B, dim): cosines and sines of t at dim/2 frequencies from 1 to about 1/10000.

    Vaswani et al. 2017, section 3.5, but cosines first, as the released weights expect. In fp32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Guidance scales (B,) -> (B, dim), as LCM was trained: sines first, 1/10000 is reached.

    w - 1 is the scale of Luo et al. 2023.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=w.device) / (half - 1)
    angles = 1000 * (w.float() - 1)[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row. Each is given what it takes: the time, the text, or the size to reach."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor,
                size: torch.Size | None = None) -> Tensor:
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
    """x + two 3x3 convolutions of x. The time adds one value per channel, everywhere.

    x (B, C_in, H, W), emb (B, E) -> (B, C_out, H, W)
    """

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.num_groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.model_channels, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.num_groups, c_out), nn.SiLU(),
            nn.Identity(),  # stands for the original's dropout: the next layer is out_layers.3
            zero_module(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SpatialTransformer(nn.Module):
    """Each position becomes a token. The tokens attend to each other and to the text.

    x (B, C, H, W), context (B, T, D) -> (B, C, H, W)
    """

    def __init__(self, channels: int, heads: int, depth: int, config: UNetConfig):
        super().__init__()
        self.config = config
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=1e-6)  # 1e-5 in the ResBlocks
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, config) for _ in range(depth))
        self.proj_out = zero_module(nn.Linear(channels, channels))
        self.register_load_state_dict_pre_hook(squeeze_projections)
        self.register_state_dict_post_hook(unsqueeze_projections)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[2:]
        h = self.norm(x).flatten(2).transpose(1, 2)                 # 'b c h w -> b (h w) c'
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, size)
        h = self.proj_out(h)
        return x + h.transpose(1, 2).unflatten(2, size)             # 'b (h w) c -> b c h w'


def squeeze_projections(module: SpatialTransformer, state_dict: dict, prefix: str, *_) -> None:
    """SD 1.x files store these as 1x1 convolutions (C, C, 1, 1): the same map as Linear (C, C)."""
    for key in (prefix + "proj_in.weight", prefix + "proj_out.weight"):
        if key in state_dict and state_dict[key].shape[2:] == (1, 1):
            state_dict[key] = state_dict[key][:, :, 0, 0]


def unsqueeze_projections(module: SpatialTransformer, state_dict: dict, prefix: str, _) -> None:
    """`state_dict()` has the shapes of official files again."""
    for key in (prefix + "proj_in.weight", prefix + "proj_out.weight"):
        if not module.config.use_linear:
            state_dict[key] = state_dict[key][:, :, None, None]


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each on a normalised x and added.

    x (B, H*W, C), context (B, T, D), size (H, W) -> (B, H*W, C)
    """

    def __init__(self, dim: int, heads: int, config: UNetConfig):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, config)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, config.context_dim, heads, config)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, size: torch.Size) -> Tensor:
        x = x + self.attn1(self.norm1(x), size=size)
        x = x + self.attn2(self.norm2(x), context, size)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Multi-head attention from x to the context; without a context, from x to itself.

    x (B, H*W, C), context (B, T, D) -> (B, H*W, C). `size` is (H, W). Attention ignores it;
    a fork with positions needs it (examples/forks, rope). `capture`, if set, is called with the
    matrix (B, heads, H*W, T).
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, config: UNetConfig):
        super().__init__()
        self.heads, self.config = heads, config
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))
        self.capture: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor, context: Tensor | None = None,
                size: torch.Size | None = None) -> Tensor:
        q = self.split_heads(self.to_q(x))
        k, v = self.keys_values(x if context is None else context)
        if self.capture is not None:
            self.capture(attention_probs(q, k))
        h = self.attend(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))            # 'b h t d -> b t (h d)'

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # 'b t (h d) -> b h t d'

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.config.upcast_attention:
            return attention(q.float(), k.float(), v.float()).to(q.dtype)
        return attention(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: a soft dictionary. Vaswani et al. 2017, equation 1.

    A dictionary returns the value whose key equals the query. Attention returns the mean of all
    values, each weighted by how well its key matches. q (B, h, T, d), k and v (B, h, T', d)
    -> (B, h, T, d). PyTorch's fused kernel never stores the (T, T') matrix.
    """
    return F.scaled_dot_product_attention(q, k, v)


def attention_probs(q: Tensor, k: Tensor) -> Tensor:
    """The matrix softmax(q k^T / sqrt(d)) (B, h, T, T') in fp32. Each row sums to 1."""
    return (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, 4C) -> (B, T, C)"""

    def __init__(self, dim: int):
        super().__init__()
        # index 1 is a dropout of 0 in the original
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other. Shazeer 2020, equation 5.

    (..., C) -> (..., C_out)
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Downsample(nn.Module):
    """A stride-2 convolution, padded on all sides (unlike the VAE's).

    (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))
    """

    def __init__(self, c: int):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour to the size of the next skip, then a convolution.

    (B, C, H, W) -> (B, C, *size)
    """

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


def zero_module(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero: a fresh residual branch then changes nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
