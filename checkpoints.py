"""Checkpoints: read without running code, under our names or the released ones, loaded strictly.

    print(load(model, "FastVim_tiny.ckpt"))     # .safetensors, or what torch.save wrote for us,
                                                # Lightning, MMEngine, Vim or MAE
    export(model, "fastvim.safetensors")        # under the released names
"""
import collections
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


def _mixers(weights, ours):
    """Prefixes, such as backbone.layers.3.mixer., of the mixers that have our names, or do not."""
    found = (re.match(r"(.*\.)?mixer\.", name) for name in weights)
    prefixes = dict.fromkeys(match[0] for match in found if match)
    return [prefix for prefix in prefixes if (prefix + "x_proj" in weights) == ours]


def from_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the released names, after any prefix, -> under ours; those under ours stay.

    Raises ValueError, naming them, for one without the other and for two of different shapes."""
    weights = dict(weights)
    for prefix in _mixers(weights, ours=False):
        for own, pair in PAIRS.items():
            names = [prefix + name for name in pair]
            halves = [weights.pop(name) for name in names if name in weights]
            if not halves:
                continue
            shapes = [tuple(half.shape) for half in halves]
            if len(set(shapes)) != 1 or len(halves) != 2:
                raise ValueError(f"{' and '.join(names)} belong together, one shape each; the "
                                 f"checkpoint has {len(halves)}: {' and '.join(map(str, shapes))}")
            weights[prefix + own] = torch.stack(halves)
            if own in DROPPED_AXIS:
                weights[prefix + own] = weights[prefix + own].squeeze(DROPPED_AXIS[own])
    return weights


def to_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: weights under our names -> under the released ones.

    Raises ValueError, naming it, for a parameter that does not hold two directions."""
    weights = dict(weights)
    for prefix in _mixers(weights, ours=True):
        for own, pair in PAIRS.items():
            if prefix + own not in weights:
                continue
            both = weights.pop(prefix + own)
            if both.shape[:1] != (2,):
                raise ValueError(f"{prefix}{own} {tuple(both.shape)} does not hold two directions")
            if own in DROPPED_AXIS:
                both = both.unsqueeze(DROPPED_AXIS[own])
            weights.update(zip([prefix + name for name in pair], both))
    return weights


def export(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the weights under the released names, as .safetensors or, of any other name, by torch.

    The names and shapes are those of the released checkpoints."""
    weights = {name: value.detach().cpu().clone().contiguous()
               for name, value in to_released(model.state_dict()).items()}
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import save_file
        save_file(weights, path)
    else:
        torch.save(weights, path)


class _Inert:
    """Stands for all objects of a file that are neither tensors nor plain values: does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _nothing


class _TensorsOnly(pickle.Unpickler):
    """Reads a checkpoint without running anything that it names. Released files hold NumPy arrays
    and objects of Lightning and MMEngine, which the user need not have, and for which
    weights_only=True refuses the whole file."""
    allowed = {("collections", "OrderedDict"): collections.OrderedDict} | {
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor")}

    def find_class(self, module, name):
        return self.allowed.get((module, name), _Inert)


def read(path: str | os.PathLike) -> dict:
    """The dictionary in a .safetensors, .pt, .pth or .ckpt file, read without running its code.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            content = _read_pickle(path)
    except ImportError:
        raise
    except Exception as error:                          # a damaged file can fail in any way
        problem = f"{path} is not a readable checkpoint ({type(error).__name__}: {error})"
        raise ValueError(problem) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of weights")
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
    """What `read` returned -> (weights as stored, under which key). EMA weights if there are some.

    They lie in state_dict_ema or state_dict of Lightning and MMEngine files, in ema or model of
    ours, Vim's and MAE's, or the dictionary is them."""
    source = ""
    for key in ("model", "state_dict", "ema", "state_dict_ema"):
        if isinstance(content.get(key), dict) and content[key]:
            source = key
    stored = content[source] if source else content
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
    file they lay). Raises ValueError if there are none, and as from_released."""
    weights, source = _unwrapped(content)
    return from_released(weights), source


def load(model: nn.Module, content: str | os.PathLike | dict, encoder_only: bool = False,
         released_pos_rows: bool = False) -> str:
    """Loads weights strictly into a model; returns one line that says what was taken.

    content: a file, or what `read` made of it. Positions of another, square grid are resized.
    encoder_only: the file's head, or its autoencoder's decoder, is dropped, and the model keeps its
        own head.
    released_pos_rows: an autoencoder's pos_embed has the class token's row first, a classifier's
        where the token lies. The released code hands the rows over as they are, so that half of a
        Vim's patches get their neighbour's.
    Raises ValueError, listing the keys that differ, if the file belongs to another model, which is
    then left as it was; FileNotFoundError or ValueError as `read`."""
    if not isinstance(content, dict):
        content = read(content)
    stored, source = _unwrapped(content)
    weights = from_released(stored)
    has_released_names = weights.keys() != stored.keys()
    note = f"loaded {source}"
    if hasattr(model, "resize_positions"):                                  # a FastVim
        if not any(name.startswith("layers.") for name in weights):
            raise ValueError(f"the checkpoint holds no encoder: of its {len(stored)} weights none "
                             f"is called layers.*; they are {_listed(sorted(stored), 4, ', ')}")
        note += _fit_positions(model, weights, released_pos_rows)
    own = dict(model.state_dict())
    if encoder_only:
        parts = collections.Counter(name.partition(".")[0] for name in weights
                                    if name.startswith(("head.", "decoder_", "mask_token")))
        weights = {k: v for k, v in weights.items() if k.partition(".")[0] not in parts}
        head = {k: v for k, v in own.items() if k.startswith("head.")}
        note += (f"; {len(weights)} weights of the encoder taken, {sum(parts.values())} dropped "
                 f"({', '.join(parts) or 'none'}), {len(head)} of the head as initialised")
        weights |= head
    if has_released_names:
        _refuse_differences(to_released(own), to_released(weights))
    _refuse_differences(own, weights)
    model.load_state_dict(weights, strict=True)
    return note


def _listed(names, most, separator):
    if len(names) > most:
        names = [*names[:most], "..."]
    return separator.join(names)


def _refuse_differences(own, weights):
    shapes = [f"{name} {tuple(weights[name].shape)}, in the model {tuple(value.shape)}"
              for name, value in own.items()
              if name in weights and weights[name].shape != value.shape]
    differ = {"missing in the file": sorted(own.keys() - weights.keys()),
              "unknown to the model": sorted(weights.keys() - own.keys()),
              "of another shape": shapes}
    lines = [f"\n  {len(names)} {what}: {_listed(names, 6, '; ')}"
             for what, names in differ.items() if names]
    if lines:
        raise ValueError(f"the checkpoint belongs to another model:{''.join(lines)}")


def _fit_positions(model, weights, released_pos_rows):
    """Moves and resizes weights["pos_embed"] to where the model expects it; says what was done."""
    pos = weights.get("pos_embed")
    if pos is None or pos.ndim != 3 or len(pos) != 1:
        return ""
    same = pos.shape == model.pos_embed.shape
    grid = " x ".join(map(str, model.grid_size))
    if hasattr(model, "mask_token"):                    # it has sines and cosines for its own grid
        if same:
            return ""
        weights.update(pos_embed=model.pos_embed, decoder_pos_embed=model.decoder_pos_embed)
        return f", position embeddings those of {grid} patches"

    row = model._class_row()                            # the class token's in the model, or None
    has_row = row is not None
    side = math.isqrt(max(0, pos.shape[1] - has_row))
    old = model.grid_size if same else (side, side)
    if 0 in old or math.prod(old) + has_row != pos.shape[1]:
        return ""                                       # no square grid: listed as of another shape
    first = "mask_token" in weights and not released_pos_rows               # in an autoencoder
    note = ""
    if first and row:
        note += f", position row of the class token moved from 0 to {row}"
    if not same:
        note += f", position embeddings resized from {side} x {side} to {grid}"
    if not has_row and not same:
        weights["pos_embed"], _ = model.resize_positions(pos, old, model.grid_size, None)
    elif note:
        was = 0 if first else model._class_slot(*old)
        pos, own = model.resize_positions(pos, old, model.grid_size, was)
        weights["pos_embed"] = torch.cat([pos[:, :row], own, pos[:, row:]], 1)
    return note
