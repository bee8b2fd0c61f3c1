# ruff: noqa: F401  what the experiments use of the modules below
"""
The data of the experiments: readers of data sets, built-in data without downloads, the loader.

    policy = "rand-m9-mstd0.5-inc1"
    transform = data.image_transform(224, True, auto_augment=policy)
    train = data.ImageFolder("/data/imagenet", "train", transform)
    val = data.ImageFolder("/data/imagenet", "val", data.image_transform(224, False), train.classes)
    loader = data.make_loader(train, 128, train=True, seed=0, workers=8)
    loader.batch_sampler.set_epoch(3, skip=1000)        # epoch 3, from its batch 1000 on
    for images, labels in loader: ...                   # (b 3 224 224) float32, (b) int64

loading.py has the loader, and how a run goes on with a bad file; survey.py a look at the whole
before training; images.py ImageNet, also as layouts.py finds it in tar shards and Parquet; cells.py
and tiff.py microscopy, in folders by sites.py, of JUMP-CP by plates.py; dense.py transforms and
ADE20K; coco.py COCO; builtin.py digits, drawn cells, scenes and pairs.
"""

from .builtin import DIGITS_MEAN, DIGITS_STD, Cells, Digits, Pairs, Scenes, digit_transform
from .cells import (
    CELL_EXTENSIONS,
    CellTransform,
    channel_count,
    channel_statistics,
    load_cells,
    take_channels,
)
from .coco import Coco
from .dense import (
    ADE20K,
    IGNORE_INDEX,
    DetectionTransform,
    SegmentationTransform,
    merge_detections,
    numbers,
    to_pixels,
)
from .images import (
    EXTENSIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolder,
    each_file,
    each_readable,
    image_transform,
    load_rgb,
)
from .layouts import class_order, has_split, open_split
from .loading import BadDataError, Files, Seeded, extra, first_few, make_loader
from .plates import JUMP_CHANNELS, JUMP_MEAN, JUMP_STD, JumpCP, list_index, read_table
from .sites import (
    cell_folder,
    group_sites,
    list_built_in,
    list_cells,
    list_folder,
    named_by_channel,
    pick,
    well_columns,
)
from .survey import require_classes
