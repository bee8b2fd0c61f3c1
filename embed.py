"""
Features of images, for whoever clusters, compares or classifies them by other means: --embed.

    python train_imagenet.py --embed OUT.parquet --data DIR --eval CKPT
    python train_jump.py --embed OUT.parquet --data DIR --eval CKPT --per well
    np.stack(pandas.read_parquet("OUT.parquet")["features"])        # (n d) float32

A row for each image: its path, what is known of it, and what the model gives its head. A run may be
killed at any moment: it writes parts, whole or not at all, into OUT.parquet.parts, and a later one
computes those that are missing. Where a part begins does not depend on who computes it, so one
process, several, or one run after another end in the same bits.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

import checkpoints
import classification
import data
import fastvim
import runs
import safety
import training

PART = 1024     # images, about

# ---- Parts ---------------------------------------------------------------------------------------


def new_file(text: str) -> str:
    """An argparse type: a file that is not there yet."""
    if os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text} exists: delete it, or choose another name")
    return text


def write(args: runs.Options, ctx: training.Context, files: data.Files, listing: dict[str, list],
          model: nn.Module, encode: Callable[[Tensor], Tensor], about: dict) -> None:
    """Writes args.embed: the listing's rows with encode(images (b c h w)) -> features (b d).

    files: the images, each labelled by its number in the listing. about: what the features depend
    on beside the model's weights. ValueError: the parts that are there are of something else."""
    folder = Path(f"{args.embed}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, PART // args.batch_size) * args.batch_size
    about = {**about, "version": fastvim.__version__, "model": args.model,
             **runs.model_fields(args), "amp": args.amp, "batch_size": args.batch_size,
             "part": size, "weights": digest_of(model.state_dict()), "images": digest_of(listing)}
    refuse_other_parts(folder, about)
    parts = {folder / f"{start:09}.parquet": range(start, min(start + size, len(files)))
             for start in range(0, len(files), size)}
    missing = ctx.gather([path for path in parts if not path.exists()])[0]
    ctx.print(f"embedding {len(files):,} images; {len(parts) - len(missing)} of {len(parts)} parts "
              "are there already")
    mine = missing[ctx.rank::ctx.world_size]
    todo = Subset(files, np.array([i for path in mine for i in parts[path]], int))
    loader = data.make_loader(todo, args.batch_size, train=False, workers=args.workers)
    batches = iter(tqdm(loader, "embedding", disable=None if ctx.is_main else True))
    for path in mine:
        count = math.ceil(len(parts[path]) / args.batch_size)
        numbers = []
        features = []
        for images, labels in filter(None, itertools.islice(batches, count)):
            with torch.inference_mode(), torch.autocast(ctx.device.type, torch.bfloat16,
                                                        enabled=args.amp):
                features.append(encode(images.to(ctx.device)).flatten(1).float().cpu())
            numbers += labels.tolist()
        if features:                                        # else no image of it could be read
            table = table_of(data.pick(listing, numbers), torch.cat(features).numpy())
            write_table(path, table, about)
    ctx.gather(None)                                        # all parts are there
    if ctx.is_main:
        merge(args, [path for path in parts if path.exists()], listing, about)
        for path in folder.glob("*.parquet*"):
            path.unlink()
        folder.rmdir()


def digest_of(columns: dict) -> str:
    """A short name for the values of tensors or lists of text."""
    digest = hashlib.blake2b(digest_size=8)
    for name, values in columns.items():
        digest.update(name.encode())
        if isinstance(values, Tensor):
            digest.update(values.cpu().numpy().tobytes())
        else:
            digest.update(repr(values).encode())
    return digest.hexdigest()


def refuse_other_parts(folder: Path, about: dict) -> None:
    """ValueError: a part in the folder is damaged, or of another embedding than `about` says."""
    parquet = data.extra("pyarrow.parquet")
    about = json.loads(json.dumps(about))                   # a tuple becomes a list
    for path in sorted(folder.glob("*.parquet")):
        try:
            old = json.loads(parquet.read_schema(str(path)).metadata[b"fastvim"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no part of an embedding: delete it") from error
        changed = [name for name in about if name != "checkpoint" and about[name] != old.get(name)]
        if changed:
            raise ValueError(f"{folder} was begun with other {', '.join(changed)}: go on as it was "
                             "begun, delete it, or choose another name")


# ---- Tables --------------------------------------------------------------------------------------
#
# Parquet is read by a file's name: a Python object that pyarrow still holds at the exit aborts it.

def table_of(listing: dict[str, list], features: np.ndarray):
    """Columns of text, and features (n d) float32 as a column of lists of d numbers."""
    pyarrow = data.extra("pyarrow")

    def text(value):            # a name that is no text of this system's is escaped
        return None if value is None else os.fsencode(value).decode(errors="backslashreplace")

    columns = {name: pyarrow.array(map(text, values), pyarrow.string())
               for name, values in listing.items()}
    values = pyarrow.array(features.reshape(-1))
    columns["features"] = pyarrow.FixedSizeListArray.from_arrays(values, features.shape[1])
    return pyarrow.table(columns)


def write_table(path: Path, table, about: dict) -> None:
    parquet = data.extra("pyarrow.parquet")
    table = table.replace_schema_metadata({"fastvim": json.dumps(about)})
    safety.write_whole(
        path, lambda file: parquet.write_table(table, str(file.name), use_dictionary=False))


def merge(args: runs.Options, parts: list[Path], listing: dict[str, list], about: dict) -> None:
    """The parts, one after the other or as means of wells -> args.embed."""
    parquet = data.extra("pyarrow.parquet")
    runs.require_images(len(parts))
    table = data.extra("pyarrow").concat_tables(
        parquet.ParquetFile(str(path)).read(use_threads=False) for path in parts)
    total = len(listing["path"])
    read = len(table)
    what = f"{read:,} images"
    if vars(args).get("per") == "well":
        table = well_means(table, listing)
        what = f"{len(table):,} wells of {what}"
    write_table(Path(args.embed), table, about)
    print(f"{args.embed}: {what}; {total - read:,} of {total:,} cannot be read", flush=True)


def well_means(table, listing: dict[str, list]):
    """Rows of images -> a row for each well: what they agree in, `sites`, how many there are, and
    the mean of their features. A warning names the wells of the listing without any."""
    features = np.stack(table["features"].to_numpy())
    rows = table.drop_columns(["features"]).to_pydict()
    names = data.well_columns(listing)
    members = {}                                            # well -> its rows
    for i, well in enumerate(zip(*(rows[name] for name in names))):
        members.setdefault(well, []).append(i)
    wells = dict.fromkeys(zip(*(listing[name] for name in names)))
    if lost := ["/".join(map(str, well)) for well in wells if well not in members]:
        warnings.warn(f"{len(lost)} of {len(wells)} wells are left out, none of their images can "
                      f"be read: {data.first_few(lost)}")
    columns = {}
    for name, values in rows.items():
        if name not in ("path", "site"):
            found = [{values[i] for i in mine} for mine in members.values()]
            columns[name] = [same.pop() if len(same) == 1 else None for same in found]
    means = [features[mine].mean(0, dtype=np.float64) for mine in members.values()]
    table = table_of(columns, np.float32(means))
    sites = [len(mine) for mine in members.values()]
    return table.add_column(table.num_columns - 1, "sites", [sites])    # before the features


# ---- What is embedded: photographs, cells --------------------------------------------------------

def embed_images(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> None:
    """--embed of train_imagenet.py."""
    runs.require_data(args, saved)
    if not args.data:
        sets = {split: data.Digits(split == "train", args.img_size) for split in ("train", "val")}
        sets["train"].augment = False
        listing, load = data.list_built_in(sets, {name: sets[name].labels for name in sets})
        view = torch.as_tensor                              # they give what the model sees
    else:
        listing = data.list_folder(args.data, data.EXTENSIONS)
        load = data.load_rgb
        view = classification.view_of(args, saved)
    files = numbered(listing, load, view, args.data or "the digits")
    model = encoder(args, ctx, saved)
    about = {"checkpoint": saved.path, "channels": ["red", "green", "blue"],
             "crop_pct": args.crop_pct, "digits": runs.trained_on_built_in(saved)}
    write(args, ctx, files, listing, model, model, about)


def encoder(args: runs.Options, ctx: training.Context, saved: runs.Saved) -> nn.Module:
    """The checkpoint's model, whatever its head or decoder, without one: it returns features."""
    if not classification.is_ours(args.model):
        model = classification.restore(args, ctx, saved)
        model.reset_classifier(0)
        return model
    model = classification.build_model(args, 0)
    note = checkpoints.load(model, saved.content, encoder_only=True)
    ctx.print(f"{saved.path}: {note}; pool_scale {model.cfg.pool_scale:g}")
    return model.to(ctx.device).eval()


def numbered(listing: dict[str, list], load: Callable, view: Callable, where: str) -> data.Files:
    """The images of a listing, each labelled by its number in it."""
    samples = [(path, number) for number, path in enumerate(listing["path"])]
    return data.Files(samples, [], load, view, where)


def list_cells(args: runs.Options) -> tuple[dict[str, list], data.Files]:
    """For --embed of train_jump.py: what is to be embedded, and the raw images."""
    load = functools.partial(data.load_cells, planes=dict(args.planes or []))
    names = []
    if args.index:
        where = data.first_few(args.index)
        listing = data.list_index(args.index, args.platemap, args.metadata, args.images or "",
                                  args.split_by or "site")
    elif args.data:
        where = args.data
        listing, names = data.list_cells(args.data, args.pattern or "", args.split_by or "")
    else:
        where = "the drawn cells"
        cells = {split: data.Cells(split, np.asarray, args.img_size) for split in data.Cells.sizes}
        labels = {split: [label for _, label in cells[split].samples] for split in cells}
        listing, load = data.list_built_in(cells, labels)
    listing = choose_images(args, listing, where)
    raw = numbered(listing, load, np.asarray, where)
    raw.channels = names
    return listing, raw


def choose_images(args, listing: dict[str, list], where: str) -> dict[str, list]:
    """Those of --split, for --per well those in wells. ValueError: there are none."""
    chosen = [i for i, split in enumerate(listing["split"]) if args.split in (None, split)]
    if args.per == "well":
        if not data.well_columns(listing):
            raise ValueError("--per well: the wells are not known without --index, or a --pattern "
                             "that has a group (?P<well>...)")
        outside = [i for i in chosen if listing["well"][i] is None]
        if outside:
            warnings.warn(f"{where}: {len(outside)} of {len(chosen)} images are in no well and are "
                          "left out")
        chosen = [i for i in chosen if listing["well"][i] is not None]
    if not chosen:
        raise ValueError(f"{where}: none of {len(listing['path'])} images is to be embedded; "
                         f"--split {args.split}, --per {args.per or 'image'}")
    return data.pick(listing, chosen)
