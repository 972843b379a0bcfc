"""Strip-MLP as its equations, transcribed as directly as possible.

This file is the oracle of the tests: `forward` takes the weights under the names and in the layout of the
released checkpoints and returns every intermediate result that the reference numbers describe, and autograd
gives the gradients. It shares no code with `models/strip_mlp.py` and favours the reading over the speed: each
function is one equation (or one block) of the paper, in the paper's order from small to large, and nothing is
fused, cached or laid out for a device. Stochastic depth is left out, running statistics are read, never updated.

Letters: N images, C channels of a stage, C' = C / 2 channels of one half, H x W the map, q channels per patch,
P = C' / q patches, m the strip width.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """What the shapes of a Strip-MLP depend on."""

    embed_dim: int
    depths: tuple[int, int, int, int]
    patch_channels: int
    img_size: int | tuple[int, int] = 224
    num_classes: int = 1000
    alpha: int = 3
    strip_width: int = 3
    patch_size: int = 4
    in_chans: int = 3
    cgsmm_structure: str = "cascade"
    branches: str = "both"
    position_tables: bool = True
    multi_scale_shortcuts: bool = True
    grn: bool = True

    @property
    def widths(self) -> list[int]:
        """C of each stage."""
        return [self.embed_dim * 2**i for i in range(4)]

    @property
    def maps(self) -> list[tuple[int, int]]:
        """(H, W) of each stage."""
        height, width = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        return [(height // (self.patch_size * 2**i), width // (self.patch_size * 2**i)) for i in range(4)]


VARIANTS = {
    "tiny_light": {"embed_dim": 80, "depths": (2, 2, 6, 2), "patch_channels": 2},
    "tiny": {"embed_dim": 80, "depths": (2, 2, 12, 2), "patch_channels": 2},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "patch_channels": 4},
    "base": {"embed_dim": 112, "depths": (2, 2, 18, 2), "patch_channels": 4},
}


# Layers


def conv(p: Params, name: str, x: Tensor, **kwargs) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), **kwargs)


def depthwise(p: Params, name: str, x: Tensor, **kwargs) -> Tensor:
    return conv(p, name, x, groups=x.shape[1], **kwargs)


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def batch_norm(p: Params, name: str, x: Tensor, training: bool) -> Tensor:
    """BN with the statistics of the batch when training, else with the stored ones."""
    mean, var = (None, None) if training else (p[f"{name}.running_mean"], p[f"{name}.running_var"])
    return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], training=training)


def layer_norm(p: Params, name: str, x: Tensor) -> Tensor:
    """LN over the last axis."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def grn(p: Params, name: str, x: Tensor) -> Tensor:
    """Global response normalisation of x: (N, H, W, C)."""
    gx = x.norm(p=2, dim=(1, 2), keepdim=True)  # (N, 1, 1, C)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
    return p[f"{name}.gamma"] * (x * nx) + p[f"{name}.beta"] + x


# Strip mixing block


def relative_position(table: Tensor, height: int, width: int) -> Tensor:
    """pos[c, i, j] = E[(j - i) + R, c] for a table E of 2R + 1 rows, j - i clipped to -R..R."""
    reach = (table.shape[0] - 1) // 2
    i = torch.arange(height, device=table.device)[:, None]
    j = torch.arange(width, device=table.device)[None, :]
    index = (j - i).clamp(-reach, reach) + reach  # (H, W)
    return table[index].permute(2, 0, 1)  # (H, W, C') -> (C', H, W)


def strip_mlp_rows(p: Params, name: str, x: Tensor, q: int) -> Tensor:
    """Strip MLP layer along rows: whole rows, with the (m - 1) / 2 rows above and below, to whole rows."""
    (n, c, h, w), patches = x.shape, x.shape[1] // q
    m = p[f"{name}.weight"].shape[-1]
    # Channel j * P + p: patch p holds the q interleaved channels {p, P + p, 2P + p, ...}.
    x = x.reshape(n, q, patches, h, w).permute(0, 2, 4, 1, 3)  # (N, C', H, W) -> (N, P, W, q, H)
    x = x.reshape(n, patches * w, q, h)  # one group per patch, the columns as its channels
    x = conv(p, name, x, padding=(0, m // 2), groups=patches)  # kernel (1, m) slides over (q, H)
    x = x.reshape(n, patches, w, q, h).permute(0, 3, 1, 4, 2)  # (N, P, W, q, H) -> (N, q, P, H, W)
    return x.reshape(n, c, h, w)


def strip_mlp_columns(p: Params, name: str, x: Tensor, q: int) -> Tensor:
    """Strip MLP layer along columns: whole columns, with the (m - 1) / 2 columns on each side, to whole columns."""
    (n, c, h, w), patches = x.shape, x.shape[1] // q
    m = p[f"{name}.weight"].shape[-1]
    x = x.reshape(n, q, patches, h, w).permute(0, 2, 3, 1, 4)  # (N, C', H, W) -> (N, P, H, q, W)
    x = x.reshape(n, patches * h, q, w)  # one group per patch, the rows as its channels
    x = conv(p, name, x, padding=(0, m // 2), groups=patches)  # kernel (1, m) slides over (q, W)
    x = x.reshape(n, patches, h, q, w).permute(0, 3, 1, 2, 4)  # (N, P, H, q, W) -> (N, q, P, H, W)
    return x.reshape(n, c, h, w)


def cgsmm(p: Params, name: str, u: Tensor, spec: Spec, training: bool) -> Tensor:
    """Cascade group strip mixing module: rows first, then columns on the result; or both on u."""
    h, w = u.shape[2:]
    q = u.shape[1] if spec.patch_channels == -1 else spec.patch_channels
    pos_h = pos_w = 0
    if spec.position_tables:
        pos_h = relative_position(p[f"{name}.relate_pos_h.embeddings_table"], h, w)
        pos_w = relative_position(p[f"{name}.relate_pos_w.embeddings_table"], h, w)
    rows = strip_mlp_rows(p, f"{name}.proj_h", u + pos_h, q)
    z = conv(p, f"{name}.fuse_h", torch.cat([rows, u], dim=1))  # 2C' -> C'
    z = F.gelu(batch_norm(p, f"{name}.BN", z, training))
    first, second = (u, z) if spec.cgsmm_structure == "cascade" else (z, u)
    columns = strip_mlp_columns(p, f"{name}.proj_w", second + pos_w, q)
    return conv(p, f"{name}.fuse_w", torch.cat([first, columns], dim=1))  # 2C' -> C'


def lsmm(p: Params, name: str, v: Tensor) -> Tensor:
    """Local strip mixing module: two depthwise strips and the input, weighted per image and channel."""
    n, c = v.shape[:2]
    a = depthwise(p, f"{name}.fc_h", v, padding=(1, 3))
    b = depthwise(p, f"{name}.fc_w", v, padding=(3, 1))
    g = (a + b + v).mean(dim=(2, 3), keepdim=True)  # (N, C', 1, 1)
    t = conv(p, f"{name}.reweight.fc2", F.gelu(conv(p, f"{name}.reweight.fc1", g)))  # (N, 3C', 1, 1)
    weights = t.reshape(n, c, 3).softmax(dim=-1)[:, :, None, None, :]  # (N, C', 1, 1, 3)
    return weights[..., 0] * b + weights[..., 1] * a + weights[..., 2] * v


def strip_mixing_block(p: Params, name: str, x: Tensor, spec: Spec, training: bool) -> Tensor:
    y = F.gelu(batch_norm(p, f"{name}.dwsc.conv_merge.BN", x, training))
    y = depthwise(p, f"{name}.dwsc.conv_merge.Conv", y, padding=1)
    y = conv(p, f"{name}.smlp_block.mlp.0", y)
    y = F.gelu(batch_norm(p, f"{name}.smlp_block.mlp.1", y, training))
    u, v = y.chunk(2, dim=1)  # (N, C, H, W) -> twice (N, C', H, W)
    if spec.branches != "lsmm":
        u = cgsmm(p, f"{name}.smlp_block", u, spec, training)
    if spec.branches != "cgsmm":
        v = lsmm(p, f"{name}.smlp_block", v)
    return conv(p, f"{name}.smlp_block.fuse", torch.cat([u, v], dim=1))


# Channel mixing block


def channel_mixing_block(p: Params, name: str, x: Tensor, spec: Spec) -> Tensor:
    y = depthwise(p, f"{name}.conv_77", x, padding=3)
    y = y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    y = layer_norm(p, f"{name}.layer_norm", y)
    y = F.gelu(linear(p, f"{name}.fc1", y))  # C -> alpha C
    if spec.grn:
        y = grn(p, f"{name}.grn", y)
    y = linear(p, f"{name}.fc2", y)  # alpha C -> C
    return y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


# Network


def blocks(p: Params, stage: int, x: Tensor, spec: Spec, training: bool) -> Tensor:
    """The blocks of stage 1, 2, 3 or 4."""
    for i in range(spec.depths[stage - 1]):
        name = f"blocks{stage}.{i}"
        x = x + strip_mixing_block(p, f"{name}.token_mixing", x, spec, training)
        x = x + channel_mixing_block(p, f"{name}.channel_mixing", x, spec)
    return x


def forward(params: Params, images: Tensor, spec: Spec, training: bool = False) -> dict[str, Tensor]:
    """Every stage's output, the pooled features and the logits of `images`: (N, in_chans, height, width)."""
    p = params
    x = conv(p, "patch_embed", images, stride=spec.patch_size)  # (N, C, H, W), H and W of stage 1
    y1 = blocks(p, 1, x, spec, training)

    m2 = conv(p, "merging1", y1, stride=2)  # (N, 2C, H/2, W/2)
    a = b = c = 0
    if spec.multi_scale_shortcuts:
        a = depthwise(p, "conv_s1_28", m2, stride=2)  # (N, 4C, H/4, W/4), two outputs per channel
        b = depthwise(p, "conv_s1_14", a, stride=2)  # (N, 8C, H/8, W/8)
    y2 = blocks(p, 2, m2, spec, training)

    m3 = conv(p, "merging2", y2, stride=2)  # (N, 4C, H/4, W/4)
    if spec.multi_scale_shortcuts:
        c = depthwise(p, "conv_s2_14", m3, stride=2)  # (N, 8C, H/8, W/8)
    y3 = blocks(p, 3, m3 + a, spec, training)

    m4 = conv(p, "merging3", y3, stride=2)  # (N, 8C, H/8, W/8)
    y4 = blocks(p, 4, m4 + b + c, spec, training)

    pooled = batch_norm(p, "norm", y4, training).mean(dim=(2, 3))  # (N, 8C)
    logits = linear(p, "head", pooled)
    return {
        "patch_embed": x,
        "stage1": y1,
        "stage2": y2,
        "stage3": y3,
        "stage4": y4,
        "pooled": pooled,
        "logits": logits,
    }


# The released checkpoint


def norm_shapes(name: str, width: int, running: bool = True) -> list[tuple[str, tuple[int, ...]]]:
    shapes = [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]
    if running:
        shapes += [(f"{name}.running_mean", (width,)), (f"{name}.running_var", (width,))]
        shapes += [(f"{name}.num_batches_tracked", ())]
    return shapes


def block_shapes(name: str, c: int, h: int, w: int, spec: Spec) -> list[tuple[str, tuple[int, ...]]]:
    half, hidden, m = c // 2, spec.alpha * c, spec.strip_width
    patches = 1 if spec.patch_channels == -1 else half // spec.patch_channels
    strip, dwsc, channel = f"{name}.token_mixing.smlp_block", f"{name}.token_mixing.dwsc", f"{name}.channel_mixing"
    return [
        *norm_shapes(f"{strip}.BN", half),
        (f"{strip}.proj_h.weight", (patches * w, w, 1, m)),
        (f"{strip}.proj_h.bias", (patches * w,)),
        (f"{strip}.proj_w.weight", (patches * h, h, 1, m)),
        (f"{strip}.proj_w.bias", (patches * h,)),
        (f"{strip}.fuse_h.weight", (half, 2 * half, 1, 1)),
        (f"{strip}.fuse_w.weight", (half, 2 * half, 1, 1)),
        (f"{strip}.mlp.0.weight", (c, c, 1, 1)),
        (f"{strip}.mlp.0.bias", (c,)),
        *norm_shapes(f"{strip}.mlp.1", c),
        (f"{strip}.fc_h.weight", (half, 1, 3, 7)),
        (f"{strip}.fc_w.weight", (half, 1, 7, 3)),
        (f"{strip}.reweight.fc1.weight", (half // 2, half, 1, 1)),
        (f"{strip}.reweight.fc1.bias", (half // 2,)),
        (f"{strip}.reweight.fc2.weight", (3 * half, half // 2, 1, 1)),
        (f"{strip}.reweight.fc2.bias", (3 * half,)),
        (f"{strip}.fuse.weight", (c, c, 1, 1)),
        (f"{strip}.relate_pos_h.embeddings_table", (2 * h + 1, half)),
        (f"{strip}.relate_pos_w.embeddings_table", (2 * w + 1, half)),
        *norm_shapes(f"{dwsc}.conv_merge.BN", c),
        (f"{dwsc}.conv_merge.Conv.weight", (c, 1, 3, 3)),
        (f"{channel}.conv_77.weight", (c, 1, 7, 7)),
        *norm_shapes(f"{channel}.layer_norm", c, running=False),
        (f"{channel}.fc1.weight", (hidden, c)),
        (f"{channel}.fc1.bias", (hidden,)),
        (f"{channel}.fc2.weight", (c, hidden)),
        (f"{channel}.fc2.bias", (c,)),
        (f"{channel}.grn.gamma", (1, 1, 1, hidden)),
        (f"{channel}.grn.beta", (1, 1, 1, hidden)),
    ]


def state_dict_shapes(spec: Spec) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a released checkpoint's entries, in its order, without those of what the spec leaves out."""
    cgsmm = r"token_mixing\.smlp_block\.(BN|proj_[hw]|fuse_[hw]|relate_pos_[hw])\."
    left_out = [
        *([r"^conv_s"] if not spec.multi_scale_shortcuts else []),
        *([r"\.grn\."] if not spec.grn else []),
        *([r"\.relate_pos_"] if not spec.position_tables else []),
        *([cgsmm] if spec.branches == "lsmm" else []),
        *([r"token_mixing\.smlp_block\.(fc_[hw]|reweight)\."] if spec.branches == "cgsmm" else []),
    ]
    return [entry for entry in all_shapes(spec) if not any(re.search(pattern, entry[0]) for pattern in left_out)]


def all_shapes(spec: Spec) -> list[tuple[str, tuple[int, ...]]]:
    c1, c2, c3, c4 = spec.widths
    shapes = [("patch_embed.weight", (c1, spec.in_chans, spec.patch_size, spec.patch_size))]
    for stage, (depth, width, (h, w)) in enumerate(zip(spec.depths, spec.widths, spec.maps, strict=True), start=1):
        for i in range(depth):
            shapes += block_shapes(f"blocks{stage}.{i}", width, h, w, spec)
    return [
        *shapes,
        ("merging1.weight", (c2, c1, 2, 2)),
        ("merging2.weight", (c3, c2, 2, 2)),
        ("merging3.weight", (c4, c3, 2, 2)),
        ("conv_s1_28.weight", (c3, 1, 2, 2)),
        ("conv_s1_14.weight", (c4, 1, 2, 2)),
        ("conv_s2_14.weight", (c4, 1, 2, 2)),
        ("head.weight", (spec.num_classes, c4)),
        ("head.bias", (spec.num_classes,)),
        *norm_shapes("norm", c4),
    ]
