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
import torch.nn.functional as F
from torch import Tensor, nn

# A mixer's parameters hold both directions, k = 2, on their first axis. Released files hold the two
# apart, and some with an axis of length 1: the number is its place when both are stacked, or 0.
PAIRS = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight", 2),             # (k e w)       (e 1 w)
    "conv_bias": ("conv1d.bias", "conv1d_b.bias", 0),                   # (k e)         (e)
    "x_proj": ("x_proj.weight", "x_proj_b.weight", 0),                  # (k r+2n e)    (r+2n e)
    "dt_proj": ("dt_proj.weight", "dt_proj_b.weight", 0),               # (k e r)       (e r)
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias", 0),                   # (k e)         (e)
    "A_log": ("A_log", "A_b_log", 0),                                   # (k e n)       (e n)
    "D": ("D", "D_b", 0),                                               # (k e)         (e)
    "score_weight": ("pool_proj.weight", "pool_proj_b.weight", 1),      # (k e)         (1 e)
    "score_bias": ("pool_proj.bias", "pool_proj_b.bias", 1),            # (k)           (1)
}


def _pairs(weights):
    """A row of PAIRS, in full names, for each parameter that the mixers in weights may have."""
    found = (re.match(r"(.*\.)?mixer\.", name) for name in weights)
    for prefix in dict.fromkeys(match[0] for match in found if match):
        for own, (first, second, axis) in PAIRS.items():
            yield prefix + own, prefix + first, prefix + second, axis


def from_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the released names, after any prefix, -> under ours; those under ours stay.

    So do halves without the other or of another shape, which loading strictly then names."""
    weights = dict(weights)
    for own, first, second, axis in _pairs(weights):
        halves = [weights[name] for name in (first, second) if name in weights]
        if len(halves) == 2 and halves[0].shape == halves[1].shape and halves[0].ndim >= axis:
            del weights[first], weights[second]
            weights[own] = torch.stack(halves)
            if axis:
                weights[own] = weights[own].squeeze(axis)
    return weights


def to_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: weights under our names -> under the released ones; those under these stay."""
    weights = dict(weights)
    for own, first, second, axis in _pairs(weights):
        if own in weights and second not in weights:
            both = weights.pop(own)
            if axis:
                both = both.unsqueeze(axis)
            weights[first], weights[second] = both
    return weights


def export(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the weights under the released names and shapes: as .safetensors, or by torch."""
    weights = {name: value.detach().cpu().clone().contiguous()
               for name, value in to_released(model.state_dict()).items()}
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import save
        with open(path, "wb") as file:      # save_file's are readable by their owner alone
            file.write(save(weights))
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
        return type(name, (_Inert,), {})


READER = types.SimpleNamespace(
    __name__="tensors_only", Unpickler=_TensorsOnly,
    load=lambda file, **options: _TensorsOnly(file, **options).load())

OTHER_FILES = {                             # how they begin, and what they are
    rb"\Z": "empty",
    rb"version https://git-lfs": "a Git LFS pointer to the file: run `git lfs pull`",
    rb"(\xef\xbb\xbf)?\s*<": "a web page (HTML): download the file itself",
    rb"\x1f\x8b": "packed by gzip: unpack it",
    rb".{257}ustar": "a tar archive: unpack it and name the file within",
    rb"[ -~]{4,60}(?=[ -~]*([\r\n]|\Z))": "text that begins with {!r}",
}


def read(path: str | os.PathLike) -> dict:
    """The dictionary in a .safetensors, .pt, .pth or .ckpt file, read without running its code.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path} is a folder: name the checkpoint in it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        start = file.read(512)
    wrong = _what_else(path, start)
    try:
        if wrong is None and start[8:10] == b'{"':
            from safetensors.torch import load_file
            return load_file(path)
        if wrong is None:
            content = torch.load(path, map_location="cpu", pickle_module=READER, weights_only=False)
            if isinstance(content, dict):
                return content
            wrong = f"a {type(content).__name__}, not a dictionary: save the model's state_dict()"
    except Exception as error:                          # a damaged file can fail in any way
        wrong = f"damaged or cut short ({type(error).__name__}: {error}): copy it again"
    raise ValueError(f"{path} is not a readable checkpoint: it is {wrong}")


def _what_else(path, start):
    """What a file that starts so is, instead of a checkpoint; or None."""
    for begins, kind in OTHER_FILES.items():
        if match := re.match(begins, start, re.DOTALL):
            return kind.format(match[0].decode("latin1"))
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript program: save the model's state_dict()"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of other files ({', '.join(names[:3])}): unpack it"
    return None


# ---- Finding the model ---------------------------------------------------------------------------
#
# An encoder is where these names are, in whichever dictionary and after whichever prefix: trainers
# and wrappers have many. A moving average goes before what it is of; else there must be only one.

ENCODER = re.compile(r"(.*[./]|)(?:patch_embed\.proj\.weight|layers\.0\.mixer\.in_proj\.weight)")
AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
WRAPPED_BLOCK = re.compile(r"\b(?:_orig_mod|_checkpoint_wrapped_module)\.")


def _flat(content, path=""):
    """A dictionary, and those in it -> {path: tensor}, as "ema/layers.0.norm.weight"."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[f"{path}{key}"] = value
        if isinstance(value, dict) and path.count("/") < 4:     # a dictionary may hold itself
            flat |= _flat(value, f"{path}{key}/")
    return flat


def _find(content, flat):
    """-> how the encoder's paths begin in _flat(content), and where that is, in words."""
    beginnings = {match[1] for match in map(ENCODER.fullmatch, flat) if match}
    if "message_hub" in content:            # MMEngine's state_dict is the average, and this not
        beginnings = {path for path in beginnings if not path.startswith("ema_state_dict/")}
    if not beginnings and "args" in content:    # a run's file, of a baseline without these names
        beginnings = {f"{key}/" for key in ("ema", "model") if isinstance(content.get(key), dict)}
    found = {path.replace("/", ".").strip("."): path for path in sorted(beginnings)}
    averages = [where for where in found if AVERAGE.search(where)]
    outermost = min((where.count(".") for where in averages), default=0)
    chosen = [where for where in averages if where.count(".") == outermost] or [*found]
    if not chosen:
        parts = []
        for key, value in content.items():
            names = [*value][:4] if isinstance(value, dict) else [type(value).__name__]
            parts.append(f"{key} ({', '.join(map(str, names))})")
        raise ValueError("the checkpoint holds no encoder, no weights called layers.*, but "
                         f"{', '.join(parts[:8]) or 'nothing'}; of a whole module, save the "
                         "state_dict()")
    if len(chosen) > 1:
        raise ValueError("the checkpoint holds several encoders "
                         f"({', '.join(where or 'its own names' for where in chosen)}): hand over "
                         "the dictionary with the weights of one")
    [where] = chosen
    if averages:
        return found[where], f"{where}, the moving average"
    return found[where], where or "the weights"


def stored_weights(content: dict, encoder_only: bool = False) -> tuple[dict[str, Tensor], str]:
    """What `read` returned -> (weights of the encoder or autoencoder, or else of what has it as its
    backbone, as stored; where in the file they lay). Raises ValueError if there is none, or
    several."""
    flat = _flat(content)
    beginning, where = _find(content, flat)
    if not encoder_only:
        beginning = re.split(r"\bbackbone\.", beginning)[0]
    weights = {}
    for path, weight in flat.items():
        name = path[len(beginning):]
        if path.startswith(beginning) and "/" not in name:      # of the same dictionary
            weights[WRAPPED_BLOCK.sub("", name)] = weight
    return weights, where


def model_weights(content: dict) -> tuple[dict[str, Tensor], str]:
    """stored_weights of the encoder or autoencoder alone, under our names."""
    weights, where = stored_weights(content, encoder_only=True)
    return from_released(weights), where


# ---- Loading -------------------------------------------------------------------------------------

def load(model: nn.Module, content: str | os.PathLike | dict, encoder_only: bool = False,
         released_pos_rows: bool = False, pos_grid: tuple[int, int] | None = None) -> str:
    """Loads weights strictly into a model; returns one line that says what was taken.

    model: or what torch.compile, DataParallel or DDP made of it. Its parameters keep their dtypes;
        those on the meta device come to where the file's weights are.
    content: a file, or what `read` made of it.
    encoder_only: the file's head, or its autoencoder's decoder, is dropped, and the model keeps its
        own head.
    released_pos_rows: hand over an autoencoder's pos_embed, whose first row is the class token's,
        as it is, as the released code did: half of a Vim's patches get their neighbour's row.
    pos_grid: rows and columns of the file's positions, which are resized to the model's. Default:
        as the file's "built" says, else those of the model, else as many of both.
    Raises ValueError, listing the keys that differ, if the file belongs to another model, which is
    then left as it was; FileNotFoundError or ValueError as `read`."""
    if not isinstance(content, dict):
        content = read(content)
    weights, where = stored_weights(content, encoder_only=True)
    model = _innermost(model)
    state = model.state_dict()
    own = {WRAPPED_BLOCK.sub("", name): value for name, value in state.items()}
    if weights.keys() != from_released(weights).keys():
        own = to_released(own)                          # differences bear the names of the file
    note = f"loaded {where}"
    is_autoencoder = hasattr(model, "mask_token")
    is_encoder = hasattr(model, "resize_pos_embed") and not is_autoencoder
    if pos_grid is not None and not is_encoder:
        raise ValueError(f"pos_grid={pos_grid} is for a FastVim, not a {type(model).__name__}")
    if is_encoder:
        note += _fit_positions(model, weights, released_pos_rows, pos_grid, content)
        note += _fit_time(own, weights)
    for name in ("pos_embed", "decoder_pos_embed"):         # of an autoencoder: sines and cosines
        if is_autoencoder and name in weights and weights[name].shape != own[name].shape:
            weights[name] = own[name]
            note += f", {name} that of the model's grid"
    if encoder_only:
        head = {name: value for name, value in own.items() if name.startswith("head.")}
        dropped = [name for name in weights
                   if name.startswith(("head.", "decoder_", "mask_token"))]
        parts = dict.fromkeys(name.partition(".")[0] for name in dropped)
        note += (f"; {len(weights) - len(dropped)} weights of the encoder taken, {len(dropped)} "
                 f"dropped ({', '.join(parts) or 'none'}), {len(head)} of the head as initialised")
        weights = {name: value for name, value in weights.items() if name not in dropped} | head
    _refuse_differences(own, weights)
    weights = from_released(weights)
    weights = {name: weights[WRAPPED_BLOCK.sub("", name)] for name in state}
    room = {name: torch.empty_like(value, device=weights[name].device)
            for name, value in state.items() if value.is_meta}
    model.load_state_dict(room, strict=False, assign=True)
    model.load_state_dict(weights, strict=True)
    return note


def _innermost(model):
    """The model that torch.compile, DataParallel or DDP wraps."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _innermost(inner)
    return model


def _refuse_differences(own, weights):
    shapes = [f"{name} {tuple(weights[name].shape)}, in the model {tuple(value.shape)}"
              for name, value in own.items()
              if name in weights and weights[name].shape != value.shape]
    differences = {"missing in the file": sorted(own.keys() - weights.keys()),
                   "unknown to the model": sorted(weights.keys() - own.keys()),
                   "of another shape": shapes}
    lines = [f"\n  {len(names)} {what}: {'; '.join(names[:6])}"
             for what, names in differences.items() if names]
    if any(shape.startswith("pos_embed ") for shape in shapes):
        lines.append("\n  pos_grid=(rows, columns) says which grid pos_embed is of, if not square")
    if lines:
        raise ValueError(f"the checkpoint belongs to another model:{''.join(lines)}")
    empty = [name for name, value in weights.items() if value.is_meta]
    if empty:
        raise ValueError(f"neither the file nor the model, which is on the meta device, has values "
                         f"for {', '.join(empty[:6])}: create the model on a real device")


def _fit_positions(model, weights, released_pos_rows, pos_grid, content):
    """Moves and resizes weights["pos_embed"] to where the model expects it; says what was done."""
    pos = weights.get("pos_embed", torch.empty(0))
    new = model.grid_size
    row = model.class_row                               # the class token's in the model, or None
    if pos.ndim != 3 or pos.shape[::2] != (1, model.cfg.embed_dim):
        return ""                                       # listed as of another shape
    cells = pos.shape[1] - (row is not None)
    old, note = _stored_grid(model, cells, pos_grid, content)
    if math.prod(old) != cells:
        return ""
    old_row = None
    if row is not None:
        old_row = model._class_slot(*old)
        if "mask_token" in weights and not released_pos_rows:
            old_row = 0                                 # of an autoencoder
            note += f", position row of the class token moved from 0 to {row}"
    if old != new:
        note += f", position embeddings resized from {old[0]} x {old[1]} to {new[0]} x {new[1]}"
    pos, class_pos = model.resize_pos_embed(pos, old, new, old_row)
    if row is not None:
        pos = torch.cat([pos[:, :row], class_pos, pos[:, row:]], 1)
    weights["pos_embed"] = pos
    return note


def _fit_time(own, weights):
    """Resizes what the weights have for time to the steps of the model's clips; says so."""
    name = "patch_embed.time_embed"                         # (1 d t)
    if name not in own or name not in weights:
        return ""
    old = weights[name].shape
    new = own[name].shape
    if len(old) != 3 or old[:2] != new[:2] or old == new:   # others: listed as of another shape
        return ""
    weights[name] = F.interpolate(weights[name], new[2], mode="linear")
    return f", time embeddings resized from {old[2]} to {new[2]}"


def _stored_grid(model, cells, pos_grid, content):
    """-> (rows, columns) of the grid that the file's `cells` positions are of, if any; a note."""
    h, w = model.grid_size
    if pos_grid is not None:
        said = tuple(torch.as_tensor(pos_grid).flatten().tolist())
        if len(said) != 2 or min(said) < 1 or math.prod(said) != cells:
            raise ValueError(f"pos_grid={pos_grid} must be two whole numbers, rows and columns, "
                             f"of {cells} patches, as the file's pos_embed is")
        return said, ""
    try:
        size = torch.tensor(content["built"]["fields"]["img_size"]).expand(2).tolist()
        said = tuple(math.ceil(pixels / model.cfg.patch_size) for pixels in size)
        if min(said) > 0 and math.prod(said) == cells:
            return said, ""
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        pass                                            # the file does not say it, or not rightly
    side = math.isqrt(max(cells, 0))
    if side == 0 or side * side != cells:
        return (h, w), ""
    if h != w and h * w == cells:
        return (h, w), f", the {cells} positions taken for a grid of {h} x {w}"
    rows = math.isqrt(cells * h // w)                   # of a grid like the model's
    if h != w and rows * rows * w == cells * h:
        raise ValueError(f"pos_embed may be of {side} x {side} patches or, like the model's, of "
                         f"{rows} x {cells // rows}: say which by pos_grid=(rows, columns)")
    return (side, side), ""
