"""A TIFF as (channels h w): the numbers as they are stored, or a sentence on why not."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .loading import extra

MAX_PIXELS = 178_956_970        # of a plane, as Pillow's: more is taken for an attack
MAX_BYTES = 2**31               # of all planes, where the file is not as large itself
PALETTE = 3                     # a photometric interpretation: numbers of colours, not intensities
# Ways in which programs describe their files' axes, as tifffile calls them; others have only pages.
DESCRIBED = ("shaped", "lsm", "mmstack", "ome", "imagej", "fluoview", "stk", "sis", "svs", "scn",
             "qpi", "ndpi", "bif", "avs", "eer", "philips", "scanimage", "nih", "mdgel")
# Coded images that say their own size, which is checked before they are decoded; the others
# (JPEG XL, JPEG XR) are refused.
CODED = (6, 7, 33003, 33004, 33005, 33007, 34712, 34892, 34933, 50001)
CODED_SIZES = {                 # how a segment begins: where the sides stand
    b"\xff\xd8": re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb]..[\x02-\x10](..)(..)", re.DOTALL),
    b"\x89PNG": re.compile(rb"IHDR(....)(....)", re.DOTALL),
    b"": re.compile(rb"\xff\x4f\xff\x51....(....)(....)", re.DOTALL),      # JPEG 2000
}
# Orientation tag -> swap rows and columns, then flip rows, flip columns.
TURNS = {2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1), 5: (True, 1, 1),
         6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1)}
CHOOSE = "save them apart, or choose with --planes"


def parse_tiff(content: bytes, name: str = "", planes: Mapping[str, int] | None = None
               ) -> np.ndarray:
    """The TIFF `content` -> (channels h w), of the type that is stored.

    Channels are the channels of an ImageJ or OME description, the samples of a pixel, or else the
    pages. planes: which slice, time point or series to take, as {"z": 2, "t": 0, "series": 1}.
    name: the file's, by which an OME description may speak of it.
    """
    extra("imagecodecs")
    tifffile = extra("tifffile")
    tifffile.logger().disabled = True       # what it says of a file is checked here
    chosen = dict(planes or {})
    with tifffile.TiffFile(io.BytesIO(content), name=name, _multifile=False) as tiff:
        tiff.filehandle.seek(tiff.pages.next_page_offset)
        if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
            raise ValueError(f"cut off or damaged: {len(tiff.pages)} pages, then the list breaks "
                             "off")
        series = take_series(all_series(tiff), chosen)
        pages = [page for page in series if page is not None]
        check_planes(tiff, series, pages)
        check_pages(pages, content, planes_of(series))
        image = series.asarray(maxworkers=1)    # loading processes are the parallelism here
        image = image.reshape(series.get_shape(squeeze=False))
        orientation = series.keyframe.tags.valueof(274)
    image = to_channels(image, series.get_axes(squeeze=False), chosen)
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    swap, rows, columns = TURNS.get(orientation, (False, 1, 1))
    if swap:
        image = image.swapaxes(1, 2)
    return image[:, ::rows, ::columns]


def all_series(tiff) -> Sequence:
    """What the description says; without one, pages of one shape and type are one image."""
    if any(getattr(tiff, f"is_{kind}") for kind in DESCRIBED):
        found = tiff.series
        if found[0].kind not in DESCRIBED:
            raise ValueError(f"its description ({', '.join(sorted(tiff.flags))}) does not fit its "
                             "pages, or speaks of other files: save it as .npy")
        return found
    series = extra("tifffile").TiffPageSeries
    groups = {}
    for page in tiff.pages:
        groups.setdefault((page.shape, page.dtype, page.is_reduced), []).append(page)
    return [series(pages, (len(pages), *shape), dtype, "I" + pages[0].axes)
            for (shape, dtype, _), pages in groups.items()]


def take_series(found: Sequence, chosen: dict[str, int]):
    """The one there is, but for previews, or the one that is chosen."""
    found = [series for series in found if not series.keyframe.is_reduced] or found
    if "series" not in chosen and len(found) > 1:
        shapes = ", ".join(f"{series.get_shape(True)} {series.dtype}" for series in found)
        raise ValueError(f"{len(found)} series of images ({shapes}): {CHOOSE} series=0")
    index = chosen.pop("series", 0)
    if not 0 <= index < len(found):
        raise ValueError(f"no series {index}: there are {len(found)}, numbered from 0")
    return found[index]


def check_planes(tiff, series, pages: Sequence) -> None:
    """ValueError: the description speaks of more planes than there are, or of less."""
    shape = series.get_shape(squeeze=False)
    stored = planes_of(series)
    in_one_piece = series.dataoffset is not None and len(pages) == 1
    if len(pages) < len(series) or (not in_one_piece and stored != len(pages)):
        raise ValueError(f"its description speaks of {stored} planes, it has {len(pages)}")
    images = (tiff.imagej_metadata or {}).get("images", 1)
    sizes = zip(shape, series.get_axes(squeeze=False))
    planes = math.prod(shape) // math.prod(n for n, axis in sizes if axis in "YX")
    if series.kind == "imagej" and images > planes:
        raise ValueError(f"its description says images={images}, {planes} can be read")
    if series.kind in ("ome", "imagej", "shaped"):
        used = sum(planes_of(each) for each in tiff.series)
        if len(tiff.pages) > used:
            raise ValueError(f"its description speaks of {used} of its {len(tiff.pages)} pages")


def planes_of(series) -> int:
    return math.prod(series.get_shape(squeeze=False)) // max(series.keyframe.size, 1)


def check_pages(pages: Sequence, content: bytes, planes: int) -> None:
    """ValueError: pixels that are too many, of a palette, missing, or of a wrong coded size."""
    first = pages[0].keyframe
    area = first.imagelength * first.imagewidth
    if first.is_tiled:
        area = max(area, first.tilelength * first.tilewidth * first.tiledepth)
    size = planes * max(first.nbytes, 0)
    if area > MAX_PIXELS or size > max(MAX_BYTES, len(content)):
        raise ValueError(f"{planes} planes of {first.imagelength} x {first.imagewidth} pixels, "
                         f"{size} bytes: too large")
    for page in pages:
        keyframe = page.keyframe
        if keyframe.photometric == PALETTE:
            raise ValueError("a palette: its pixels are numbers of colours, not intensities. Save "
                             "it as gray, or as .npy")
        wanted = math.prod(keyframe.chunked)
        segments = list(zip(page.dataoffsets, page.databytecounts))
        if keyframe.is_contiguous:              # then the strips are read as one
            wanted = 1
        if len(segments) < wanted or not all(map(math.prod, segments[:wanted])):
            raise ValueError(f"parts of the pixels are missing: {len(segments)} of {wanted} strips "
                             "or tiles are there")
        if keyframe.compression in extra("tifffile").TIFF.IMAGE_COMPRESSIONS:
            if keyframe.compression not in CODED:
                raise ValueError(f"compression {keyframe.compression} is not read: save it as .npy")
            for offset, count in segments:
                check_coded_size(content[offset:offset + count])


def check_coded_size(data: bytes) -> None:
    """ValueError: a JPEG, JPEG 2000 or PNG inside is larger than MAX_PIXELS."""
    pattern = next(pattern for start, pattern in CODED_SIZES.items() if data.startswith(start))
    if sides := pattern.search(data):
        pixels = math.prod(int.from_bytes(side, "big") for side in sides.groups())
        if pixels > MAX_PIXELS:
            raise ValueError(f"coded images of {pixels} pixels: too large")


def to_channels(image: np.ndarray, axes: str, chosen: dict[str, int]) -> np.ndarray:
    """Pixels with a letter for each axis -> (channels h w)."""
    for name, index in chosen.items():
        letter = name.upper()
        sizes = dict(zip(axes, image.shape))
        if not 0 <= index < sizes.get(letter, 1):
            raise ValueError(f"no {name}={index}: its axes are {axes}, of {image.shape}; numbers "
                             "begin at 0")
        if letter in axes:
            image = image.take([index], axes.index(letter))
    several = [axis for axis, size in zip(axes, image.shape) if size > 1 and axis not in "YX"]
    if not {"Y", "X"} <= set(axes) or len(axes) != image.ndim:
        raise ValueError(f"its axes are {axes}, of {image.shape}: without height or width")
    if len(several) > 1 or not set(several) <= set("CSIQ"):     # samples, pages of no description
        which = " ".join(f"{axis.lower()}=0" for axis in several if axis not in "CS")
        raise ValueError(f"its axes are {axes}, of {image.shape}: only channels, height and width "
                         f"are read. Slices or time points are not channels: {CHOOSE} {which}")
    image = np.moveaxis(image, (axes.index("Y"), axes.index("X")), (-2, -1))
    return image.reshape(-1, *image.shape[-2:])             # of the others at most one is no 1
