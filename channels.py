"""
The channels of microscopy images and of the models that see them, by name; accuracy by channels.

Plates are stained and recorded in different ways: files may lack channels of the training or hold
them in another order. So a model keeps the names of its channels, their means and deviations, and
takes from each file what it knows.

Symbols: b images, c channels of the model, n channels that are shown, h w pixels.
"""
import argparse
import functools
import itertools
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import runs

# ---- Options -----------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """An argparse type: 'a,b' -> ['a', 'b']"""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be different names or numbers, with "
                                         "commas between them")
    return parts


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def subset(text: str) -> tuple[str, list[str]]:
    name, _, channels = text.partition("=")
    return name, names(channels)


def add_arguments(parser: runs.Parser) -> None:
    """The options of match_channels and of Channels.subsets."""
    add = parser.groups["channels"].add_argument
    add("--channel-names", type=names, metavar="A,B", help="of the files' channels (default: their "
        "numbers; JUMP-CP's 8: fluorescence1 to 5, brightfield1 to 3)")
    add("--channels", type=names, metavar="A,B", help="take these names or numbers, in this order")
    add("--mask-channels", type=names, metavar="A,B", help="set these to zero, which is their mean")
    add("--mean", type=numbers, metavar="X,Y", help="of the files' channels, --mean=-1,2 if the "
        "first is negative (default: of 1,000 images; of JUMP-CP)")
    add("--std", type=numbers, metavar="X,Y", help="their standard deviations")
    add("--subsets", type=subset, nargs="+", metavar="NAME=A,B", help="channels to evaluate "
        "together (default: JUMP-CP's fluorescence and brightfield)")
    add("--subset-samples", type=runs.number(int, 0), metavar="N",
        help="how many subsets of each number of channels to evaluate")


# ---- Channels by name --------------------------------------------------------------------------

class Channels(NamedTuple):
    """The channels of files and of a model."""
    files: list[str]    # names of the files' channels, in their order; by default their numbers
    model: list[str]    # names of the model's, in its order
    mean: list[float]   # of the model's channels, in the units of the files
    std: list[float]
    taken: list[int]    # where in the file each of the model's lies, -1 for one that is not shown
    masked: list[str]   # those of the model's that are set to zero, which is their mean

    @property
    def shown(self) -> list[int]:
        """Ids of the model's channels that the files have and the user has chosen."""
        return [i for i, place in enumerate(self.taken) if place >= 0]

    def normalized(self, raw: data.Files, img_size: int, augment: bool = False) -> data.Files:
        """Raw images -> the model's: (c img_size img_size) float32. `raw` itself is changed."""
        zero = [i for i, name in enumerate(self.model) if self.taken[i] < 0 or name in self.masked]
        raw.load = functools.partial(data.take_channels, raw.load, len(self.files), self.taken)
        raw.transform = data.CellTransform(img_size, self.mean, self.std, augment, zero)
        return raw

    def subsets(self, args) -> list[tuple[str, list[int]]]:
        """What to evaluate: (name or "", ids of the model's channels).

        --subsets, by default JUMP-CP's two kinds; each channel by itself, up to --subset-samples
        subsets of each number of channels, all channels. ValueError: one of them is not shown."""
        named = args.subsets or []
        benchmark = {self.model[i] for i in self.shown} == set(data.JUMP_CHANNELS)
        if args.subsets is None and benchmark:
            named = [("fluorescence", data.JUMP_CHANNELS[:5]),
                     ("brightfield", data.JUMP_CHANNELS[5:])]
        found = [(name, indices(wanted, self.model, self.files)) for name, wanted in named]
        if hidden := [self.model[i] for _, ids in found for i in ids if i not in self.shown]:
            raise ValueError(f"--subsets: the images do not show {', '.join(hidden)}")
        rng = np.random.RandomState(args.seed)
        for size in range(1, len(self.shown) + 1):
            drawn = {tuple(np.sort(rng.permutation(self.shown)[:size]).tolist())
                     for _ in range(args.subset_samples)}
            if size in (1, len(self.shown)):
                drawn = itertools.combinations(self.shown, size)
            found += [("", list(ids)) for ids in sorted(drawn)]
        return found


def indices(wanted: Sequence[str], among: Sequence[str], files: Sequence[str]) -> list[int]:
    """Names of channels, or numbers of those in the files -> where they stand in `among`."""
    by_number = {str(i): name for i, name in enumerate(files)}
    known = [name if name in among else by_number.get(name) for name in wanted]
    if missing := [name for name, meant in zip(wanted, known) if meant not in among]:
        raise ValueError(f"no channel {', '.join(missing)}: there are {', '.join(among)}")
    if len(set(known)) < len(known):
        raise ValueError(f"{', '.join(wanted)} names a channel twice")
    return [among.index(name) for name in known]


def match_channels(args, ctx, raw: data.Files | None, saved: dict) -> Channels:
    """The channels of images and of the model that is to see them.

    raw: the images; None for single files, which are like those that the model was trained on.
    saved: of saved_channels. A trained model has its channels by name: files may lack some of them,
        --channels may leave some out. {}: a model to be trained."""
    count = count_channels(args, raw) if raw else len(saved["files"])
    benchmark = bool(args.index) and count == len(data.JUMP_CHANNELS)
    default = list(data.JUMP_CHANNELS) if benchmark else [str(i) for i in range(count)]
    by_file = getattr(raw, "channels", [])          # of a file for each channel
    files = args.channel_names or by_file or saved.get("files", default)
    if raw and len(files) != count:
        raise ValueError(f"the images in {raw.where} have {count} channels, not {len(files)} "
                         f"({', '.join(files)}): name theirs with --channel-names")
    picked = indices(args.channels or files, files, files)
    place = {files[i]: i for i in picked}
    model = saved.get("model", list(place))
    taken = [place.get(name, -1) for name in model]
    if max(taken) < 0:
        raise ValueError(f"the model knows the channels {', '.join(model)}, it is to see "
                         f"{', '.join(place)}: none in common")
    hidden = indices(args.mask_channels or saved.get("masked", []), model, files)
    masked = [model[i] for i in hidden]
    if saved:
        return Channels(files, model, saved["mean"], saved["std"], taken, masked)
    mean, std = statistics_of(args, ctx, raw, count, benchmark)[:, taken].tolist()
    constant = [name for name, deviation in zip(model, std)
                if deviation <= 0 and name not in masked]
    if not np.isfinite([*mean, *std]).all() or (args.std and constant):
        raise ValueError("--mean and --std need one number for each channel that is used, and no "
                         f"deviation of 0: they are {mean} and {std}")
    if constant:
        others = [name for name in model if name not in constant]
        raise ValueError(f"{raw.where}: channel {', '.join(constant)} is constant, so that it "
                         f"cannot be normalised: leave it out by --channels {','.join(others)}")
    std = [deviation or 1.0 for deviation in std]                           # 0: a masked one's
    return Channels(files, model, mean, std, taken, masked)


def statistics_of(args, ctx, raw: data.Files, count: int, benchmark: bool) -> np.ndarray:
    """(2 count) means and deviations of the files' channels: given, the benchmark's, measured."""
    if args.mean:
        if not len(args.mean) == len(args.std) == count:
            raise ValueError(f"--mean and --std need one number for each of the {count} channels "
                             f"of the files: they are {args.mean} and {args.std}")
        return np.array([args.mean, args.std])
    if benchmark:
        return np.array([data.JUMP_MEAN, data.JUMP_STD])
    own = torch.tensor(data.channel_statistics(raw, count, 1000), device=ctx.device)
    return (ctx.sum(own) / ctx.world_size).cpu().double().numpy()       # the same everywhere


def count_channels(args, raw: data.Files) -> int:
    """data.channel_count. ValueError: files of one channel each that seem to be parts of images."""
    count = data.channel_count(raw)
    single = count == 1 and not args.channel_names and not getattr(raw, "channels", [])
    if single and data.named_by_channel([path for path, _ in raw.samples]):
        raise ValueError(
            f"{raw.where}: files of one channel each, with the channels numbered in their names. "
            "--pattern 'REGEX' with the groups (?P<well>...), (?P<site>...) and (?P<channel>...) "
            "reads those of a site as one image; --channel-names NAME if an image has one channel")
    return count


def saved_channels(saved: runs.Saved) -> dict:
    """The Channels that a checkpoint keeps, as a dictionary; {} of a released one."""
    old = saved.options
    if "file_channels" in old:              # before version 0.2
        return {"files": old["file_channels"], "model": old["model_channels"],
                "mean": old["mean"], "std": old["std"], "masked": old["mask_channels"]}
    return saved.content.get("channels", {})


def take_embeddings(model: nn.Module, weights: dict, start: runs.Saved, names: list[str]) -> str:
    """Puts into `weights`, of `start`, the channel embeddings for a model of channels `names`: its
    own where they have none -> which were taken, in words. ValueError: nobody says whose they are.
    """
    own = model.state_dict()
    for key in own.keys() & weights.keys():
        if not key.endswith("channel_embed.weight"):
            continue
        theirs = saved_channels(start).get("model", data.JUMP_CHANNELS)
        if len(theirs) != len(weights[key]):
            raise ValueError(f"{start.path}: {len(weights[key])} channel embeddings without names")
        common = [name for name in names if name in theirs]
        for name in common:
            own[key][names.index(name)] = weights[key][theirs.index(name)]
        weights[key] = own[key]
        return f"; of channels {', '.join(common) or 'none'}, the others as initialised"
    return ""


# ---- Accuracy by channels ----------------------------------------------------------------------

def classify(args, model: nn.Module, images: Tensor, channels: Tensor) -> Tensor:
    """Logits (b classes) of images (b c h w) of which only `channels` (n) int64 are to be seen.

    FastChannelVim, ChannelVim and ChannelViT have a token for each channel of a patch. A model that
    mixes them gets zeros for the others; what it sees is scaled up, as in dropout, so that its
    patch embedding keeps its size."""
    if "channel" in args.model:
        return model(images[:, channels], channels=channels)
    shown = torch.zeros_like(images)
    shown[:, channels] = images[:, channels] * (images.shape[1] / len(channels))
    return model(shown)


def accuracy(args, ctx, model: nn.Module, loader, subsets: list[tuple[str, list[int]]]
             ) -> tuple[list[float], int]:
    """-> (top-1 in percent for each of Channels.subsets, number of images), of all processes."""
    hits = torch.zeros(len(subsets) + 1, dtype=torch.float64, device=ctx.device)    # last: images
    hidden = None if ctx.is_main else True                  # None: a bar only on a terminal
    with torch.inference_mode(), torch.autocast(ctx.device.type, torch.bfloat16, enabled=args.amp):
        for batch in filter(None, tqdm(loader, "subsets", disable=hidden)):
            images, labels = (x.to(ctx.device) for x in batch)
            for i, (_, ids) in enumerate(subsets):
                logits = classify(args, model, images, torch.tensor(ids))
                hits[i] += (logits.argmax(1) == labels).sum()
            hits[-1] += len(labels)
    *hits, count = ctx.sum(hits).tolist()
    runs.require_images(count)
    return [100 * hit / count for hit in hits], int(count)


def print_table(rows: list[dict]) -> None:
    """A line for each name and each number of channels.

    rows: [{"name", "channels": names, "top1": percent, perhaps "best": the best possible}]."""
    groups = {}
    for row in rows:
        label = str(len(row["channels"]))
        if row["name"]:
            label = f"{row['name']} ({label})"
        groups.setdefault(label, []).append(row)
    header = f"{'channels':24}{'subsets':>8}{'mean':>8}{'least':>8}{'most':>8}"
    if "best" in rows[0]:
        header += f"{'best possible':>16}"
    print(header)
    for label, group in groups.items():
        top1 = [row["top1"] for row in group]
        line = f"{label:24}{len(group):8}{np.mean(top1):8.1f}{min(top1):8.1f}{max(top1):8.1f}"
        if "best" in group[0]:
            line += f"{np.mean([row['best'] for row in group]):16.1f}"
        print(line)


def draw_accuracy(rows: list[dict], title: str, file: BinaryIO) -> None:
    """A PNG: each subset's top-1 against its number of channels, as a dot or, with a name, a mark.

    ImportError: matplotlib is not installed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        size = len(row["channels"])
        mark = "D" if row["name"] else "C0."
        axes.plot(size, row["top1"], mark, label=row["name"])   # "": not in the legend
        if "best" in row:
            axes.plot(size, row["best"], "C7_", markersize=12)
    axes.set(xlabel="channels", ylabel="top-1, % (gray: best possible)", title=title)
    if any(row["name"] for row in rows):
        axes.legend()
    figure.savefig(file, format="png", dpi=150)
