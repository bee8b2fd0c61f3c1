"""Checkpoints: read without running code, under our names or the released ones, loaded strictly.

    print(load(model, "FastVim_tiny.ckpt"))     # .safetensors, or what torch.save wrote for us,
                                                # Lightning, MMEngine, Vim or MAE
    export(model, "fastvim.safetensors")        # under the released names
"""
import math
import os
import pickle
import re
import types
import zipfile

import torch
from torch import Tensor, nn

# A mixer's parameters hold both directions, k = 2, on their first axis; released files hold two.
PAIRS = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),        # (k e w)       (e 1 w)
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),              # (k e)         (e)
    "x_proj": ("x_proj.weight", "x_proj_b.weight"),             # (k r+2n e)    (r+2n e)
    "dt_proj": ("dt_proj.weight", "dt_proj_b.weight"),          # (k e r)       (e r)
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),              # (k e)         (e)
    "A_log": ("A_log", "A_b_log"),                              # (k e n)       (e n)
    "D": ("D", "D_b"),                                          # (k e)         (e)
    "score_weight": ("pool_proj.weight", "pool_proj_b.weight"),     # (k e)     (1 e)
    "score_bias": ("pool_proj.bias", "pool_proj_b.bias"),           # (k)       (1)
}
DROPPED_AXIS = {"conv_weight": 2, "score_weight": 1, "score_bias": 1}       # the 1, after stacking


def _pairs(weights):
    """(our name, the two released ones, DROPPED_AXIS) of what each mixer in weights may have."""
    found = (re.match(r"(.*\.)?mixer\.", name) for name in weights)
    for prefix in dict.fromkeys(match[0] for match in found if match):
        for own, (first, second) in PAIRS.items():
            yield prefix + own, prefix + first, prefix + second, DROPPED_AXIS.get(own)


def from_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the released names, after any prefix, -> under ours; those under ours stay.

    So do halves without the other or of another shape, which loading strictly then names."""
    weights = dict(weights)
    for own, first, second, axis in _pairs(weights):
        halves = [weights[name] for name in (first, second) if name in weights]
        if len(halves) == 2 and halves[0].shape == halves[1].shape:
            del weights[first], weights[second]
            weights[own] = torch.stack(halves)
            if axis is not None:
                weights[own] = weights[own].squeeze(axis)
    return weights


def to_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: weights under our names -> under the released ones; those under these stay."""
    weights = dict(weights)
    for own, first, second, axis in _pairs(weights):
        if own in weights and second not in weights:
            both = weights.pop(own)
            if axis is not None:
                both = both.unsqueeze(axis)
            weights[first], weights[second] = both
    return weights


def export(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the weights under the released names and shapes: as .safetensors, or by torch."""
    weights = {name: value.detach().cpu().clone().contiguous()
               for name, value in to_released(model.state_dict()).items()}
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import save_file
        save_file(weights, path)
    else:
        torch.save(weights, path)


# ---- Reading -------------------------------------------------------------------------------------

class _Inert:
    """Stands for whatever a file holds beside tensors and plain values, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = __init__


class _TensorsOnly(pickle.Unpickler):
    """Released files hold objects of NumPy, Lightning and MMEngine, for which weights_only=True
    refuses the whole file. Here nothing of them is imported, let alone run."""

    allowed = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
               "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter")

    def find_class(self, module, name):
        if f"{module}.{name}" in self.allowed:
            return super().find_class(module, name)
        return _Inert


def read(path: str | os.PathLike) -> dict:
    """The dictionary in a .safetensors, .pt, .pth or .ckpt file, read without running its code.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        content = _read_pickle(path)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary of weights")
    except Exception as error:                          # a damaged file can fail in any way
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})"
                         ) from error
    return content


def _read_pickle(path):
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise ValueError("it is a TorchScript program, not a dictionary of weights")
    reader = types.SimpleNamespace(
        __name__="tensors_only", Unpickler=_TensorsOnly,
        load=lambda file, **options: _TensorsOnly(file, **options).load())
    return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)


def stored_weights(content: dict) -> tuple[dict[str, Tensor], str]:
    """What `read` returned -> (weights as stored, under which key), the EMA's if there are."""
    source = ""
    for key in ("model", "state_dict", "ema", "state_dict_ema"):    # the last one there is wins
        if isinstance(content.get(key), dict) and content[key]:
            source = key
    stored = content.get(source, content)
    return {name: v for name, v in stored.items() if isinstance(v, Tensor)}, source


def _unwrapped(content):
    """stored_weights, without the prefixes of what the encoder or autoencoder was a part of."""
    weights, source = stored_weights(content)
    for prefix in ("ema.module.", "module.", "backbone."):
        inside = {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}
        if inside:
            weights = inside
            source = f"{source} {prefix[:-1]}".strip()
    if not weights:
        raise ValueError("the checkpoint holds no weights")
    return weights, source or "the weights"


def model_weights(content: dict) -> tuple[dict[str, Tensor], str]:
    """What `read` returned -> (weights of the encoder or autoencoder under our names, where in the
    file they lay). Raises ValueError if there are none."""
    weights, source = _unwrapped(content)
    return from_released(weights), source


# ---- Loading -------------------------------------------------------------------------------------

def load(model: nn.Module, content: str | os.PathLike | dict, encoder_only: bool = False,
         released_pos_rows: bool = False) -> str:
    """Loads weights strictly into a model; returns one line that says what was taken.

    content: a file, or what `read` made of it. Positions of another, square grid are resized.
    encoder_only: the file's head, or its autoencoder's decoder, is dropped, and the model keeps its
        own head.
    released_pos_rows: hand over an autoencoder's pos_embed, whose first row is the class token's,
        as it is, as the released code did: half of a Vim's patches get their neighbour's row.
    Raises ValueError, listing the keys that differ, if the file belongs to another model, which is
    then left as it was; FileNotFoundError or ValueError as `read`."""
    if not isinstance(content, dict):
        content = read(content)
    weights, source = _unwrapped(content)
    own = model.state_dict()
    if weights.keys() != from_released(weights).keys():
        own = to_released(own)                          # differences bear the names of the file
    note = f"loaded {source}"
    if hasattr(model, "resize_positions"):              # a FastVim
        if not any(name.startswith("layers.") for name in weights):
            raise ValueError("the checkpoint holds no encoder: no weight is called layers.*, the "
                             f"first of {len(weights)} are {', '.join(sorted(weights)[:4])}")
        note += _fit_positions(model, weights, released_pos_rows)
    if encoder_only:
        head = {name: value for name, value in own.items() if name.startswith("head.")}
        dropped = [name for name in weights
                   if name.startswith(("head.", "decoder_", "mask_token"))]
        parts = dict.fromkeys(name.partition(".")[0] for name in dropped)
        note += (f"; {len(weights) - len(dropped)} weights of the encoder taken, {len(dropped)} "
                 f"dropped ({', '.join(parts) or 'none'}), {len(head)} of the head as initialised")
        weights = {name: value for name, value in weights.items() if name not in dropped} | head
    _refuse_differences(own, weights)
    model.load_state_dict(from_released(weights), strict=True)
    return note


def _refuse_differences(own, weights):
    shapes = [f"{name} {tuple(weights[name].shape)}, in the model {tuple(value.shape)}"
              for name, value in own.items()
              if name in weights and weights[name].shape != value.shape]
    differences = {"missing in the file": sorted(own.keys() - weights.keys()),
                   "unknown to the model": sorted(weights.keys() - own.keys()),
                   "of another shape": shapes}
    lines = [f"\n  {len(names)} {what}: {'; '.join(names[:6])}"
             for what, names in differences.items() if names]
    if lines:
        raise ValueError(f"the checkpoint belongs to another model:{''.join(lines)}")


def _fit_positions(model, weights, released_pos_rows):
    """Moves and resizes weights["pos_embed"] to where the model expects it; says what was done."""
    pos = weights.get("pos_embed", torch.empty(0))
    new = model.grid_size
    grid = " x ".join(map(str, new))
    same = pos.shape == model.pos_embed.shape
    if hasattr(model, "mask_token"):                    # it has sines and cosines for its own grid
        if same:
            return ""
        weights.update(pos_embed=model.pos_embed, decoder_pos_embed=model.decoder_pos_embed)
        return f", position embeddings those of {grid} patches"

    d = model.cfg.embed_dim
    row = model._class_row()                            # the class token's in the model, or None
    has_class = row is not None
    side = max(1, math.isqrt(max(0, pos.numel() // d - has_class)))
    old = new if same else (side, side)
    if pos.shape != (1, math.prod(old) + has_class, d):
        return ""                                       # no square grid: listed as of another shape
    note = ""
    old_row = None
    if has_class:
        old_row = model._class_slot(*old)
        if "mask_token" in weights and not released_pos_rows:
            old_row = 0                                 # of an autoencoder
            note += f", position row of the class token moved from 0 to {row}"
    if not same:
        note += f", position embeddings resized from {side} x {side} to {grid}"
    pos, class_pos = model.resize_positions(pos, old, new, old_row)
    if has_class:
        pos = torch.cat([pos[:, :row], class_pos, pos[:, row:]], 1)
    weights["pos_embed"] = pos
    return note
