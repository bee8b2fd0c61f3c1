"""
Models of other people that the experiments compare FastVim with.

    PooledAttention    FastVim's pooling in the attention of a ViT (Table 7: with pooling, conv1d)
    ChannelViT         a token for each patch of each channel, under attention (section 4.4)
    DenseViT           a ViT of timm as the backbone of a segmenter or detector (sections 4.5, 4.6)

All are built from the ViT of timm, whose parameters keep its names. timm is imported where a model
is built, so that whoever builds none needs none.

Symbols: b batch, l tokens, d width, c channels, h w rows and columns of patches, H W pixels.
"""
import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PooledAttention(nn.Module):
    """Attention between the means of a ViT's rows (even blocks) or columns (odd), then repeated.

    Queries, keys and values are pooled alike; the first `prefix` tokens, the class token, stay as
    they are. The paper does not say where its convolution goes: here, like Mamba's, a causal one of
    width 4 and SiLU on queries, keys and values.

    attn: the attention of a timm block, whose projections are used. grid_size: (h, w). odd: pool
    columns. conv: with the convolution. Tokens (b l d) -> (b l d), their dtype; l = prefix + h w.
    """

    def __init__(self, attn: nn.Module, prefix: int, grid_size: tuple[int, int], odd: bool,
                 conv: bool):
        super().__init__()
        self.attn = attn
        self.prefix = prefix
        self.grid_size = grid_size
        self.odd = odd
        self.conv = None
        if conv:
            channels = attn.qkv.out_features
            self.conv = nn.Conv1d(channels, channels, 4, padding=3, groups=channels)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The other arguments are timm's, a mask for example: there is nothing to mask."""
        h, w = self.grid_size
        qkv = self.attn.qkv(x)                                              # (b l 3d)
        if self.conv is not None:
            causal = self.conv(qkv.mT)[..., :x.shape[1]]                    # (b 3d l)
            qkv = F.silu(causal).mT
        grid = rearrange(qkv[:, self.prefix:], "b (h w) d -> b h w d", h=h)
        pooled = grid.mean(1 if self.odd else 2)                            # (b w 3d) or (b h 3d)
        qkv = torch.cat([qkv[:, :self.prefix], pooled], 1)                  # (b p 3d)
        q, k, v = rearrange(qkv, "b p (three heads d) -> three b heads p d", three=3,
                            heads=self.attn.num_heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads p d -> b p (heads d)")
        pooled = y[:, self.prefix:]
        if self.odd:
            grid = repeat(pooled, "b w d -> b (h w) d", h=h)
        else:
            grid = repeat(pooled, "b h d -> b (h w) d", w=w)
        return self.attn.proj(torch.cat([y[:, :self.prefix], grid], 1))


class ChannelViT(nn.Module):
    """A ViT on a token for each patch of each channel: one patch filter, an embedding a channel.

    in_chans: how many channels there are. options: of timm's VisionTransformer. Images (b c H W)
    and the ids (c) int64 of the channels that they show, by default all -> logits (b num_classes).
    """

    def __init__(self, in_chans: int, **options):
        super().__init__()
        from timm.models import VisionTransformer
        vit = VisionTransformer(in_chans=1, **options)
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.patch_embed = vit.patch_embed
        self.blocks = vit.blocks
        self.norm = vit.norm
        self.head = vit.head
        self.channel_embed = nn.Embedding(in_chans, vit.embed_dim)
        nn.init.trunc_normal_(self.channel_embed.weight, std=0.02)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        b, c = x.shape[:2]
        if channels is None:
            channels = torch.arange(c)
        x = self.patch_embed(rearrange(x, "b c H W -> (b c) 1 H W"))        # (b*c l d)
        x = rearrange(x, "(b c) l d -> b c l d", b=b) + self.pos_embed[:, None, 1:]
        x = x + self.channel_embed(channels.to(x.device))[:, None]          # (b c l d)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1)  # (b 1 d)
        x = torch.cat([token, rearrange(x, "b c l d -> b (c l) d")], 1)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x)[:, 0])


VIT_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}         # width, heads
CELL_VITS = [f"{family}_{size}" for family in ("vit", "channelvit") for size in VIT_SIZES]


def create_vit(name: str, **options) -> nn.Module:
    """One of CELL_VITS. options: of timm's VisionTransformer, in_chans among them."""
    from timm.models import VisionTransformer
    family, size = name.split("_")
    width, heads = VIT_SIZES[size]
    kind = ChannelViT if family == "channelvit" else VisionTransformer
    return kind(embed_dim=width, num_heads=heads, **options)


class DenseViT(nn.Module):
    """A ViT of timm as a backbone, with a LayerNorm for each tap as FastVim has it.

    name: as timm knows it. taps: the blocks, from 0, whose outputs the heads see. options: those of
    timm's create_model. Images (b 3 H W), padded to whole patches -> a map (b d h w) for each tap.
    """

    def __init__(self, name: str, taps: Sequence[int], **options):
        super().__init__()
        import timm
        self.taps = taps
        self.vit = timm.create_model(name, num_classes=0, dynamic_img_size=True,
                                     dynamic_img_pad=True, **options)
        self.vit.norm = nn.Identity()                                       # that of the classifier
        self.cfg = types.SimpleNamespace(embed_dim=self.vit.embed_dim,
                                         patch_size=self.vit.patch_embed.patch_size[0])
        self.outnorm = nn.ModuleList(nn.LayerNorm(self.vit.embed_dim) for _ in taps)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        maps = self.vit.forward_intermediates(x, indices=self.taps, intermediates_only=True)
        normed = [norm(rearrange(x, "b d h w -> b h w d")) for norm, x in zip(self.outnorm, maps)]
        return [rearrange(x, "b h w d -> b d h w") for x in normed]
