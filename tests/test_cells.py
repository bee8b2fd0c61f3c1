"""Multi-channel images: files, object stores, JUMP-CP's tables, augmentation, the drawn cells."""
import functools
import gzip
import io
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")
pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
import fsspec
import pyarrow
import pyarrow.parquet
import tifffile
from PIL import Image, ImageOps

import data


def pixels(channels=3, height=6, width=5, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (channels, height, width)).astype(dtype)


def save_tiff(path, image, **options):
    first, *rest = [Image.fromarray(page) for page in image]
    first.save(path, save_all=True, append_images=rest, **options)


# ---- load_cells ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "f2", "f4", "f8", "?"])
def test_npy_of_any_number_type(tmp_path, dtype):
    image = pixels(dtype=dtype)
    for order in "CF":
        np.save(tmp_path / "a.npy", np.asarray(image, order=order))
        np.testing.assert_array_equal(data.load_cells(str(tmp_path / "a.npy")), image)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_tiff_with_a_page_per_channel(tmp_path, dtype, compression):
    image = pixels(dtype=dtype)
    save_tiff(tmp_path / "a.TIF", image, compression=compression)
    found = data.load_cells(str(tmp_path / "a.TIF"))
    np.testing.assert_array_equal(found, image)
    assert found.dtype == image.dtype


def test_tiff_of_one_page_in_colour(tmp_path):
    image = pixels(dtype="u1")
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(data.load_cells(str(tmp_path / "a.tiff")), image)


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_pickles_are_refused_and_the_advice_works(tmp_path):
    path = str(tmp_path / "a.npy")
    np.save(path, np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle.*convert it once"):
        data.load_cells(path)
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="no .npy file"):
        data.load_cells(path)
    assert not Bomb.exploded

    image = pixels()
    boxes = np.empty(len(image), object)
    boxes[:] = list(image)
    np.save(path, boxes, allow_pickle=True)
    with pytest.raises(ValueError, match="convert it once: (.*)") as caught:
        data.load_cells(path)
    exec(str(caught.value).partition("once: ")[2], {"numpy": np, "path": path})
    np.testing.assert_array_equal(data.load_cells(path), image)


def npz(image):
    buffer = io.BytesIO()
    np.savez(buffer, image)
    return buffer.getvalue()


def npy(image):
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


@pytest.mark.parametrize("content, message", [
    (npy(pixels())[:-7], "reshape|EOF|read"),
    (npy(pixels())[:40], "header|EOF"),
    (npy(pixels()[0]), r"\(channels, height, width\).*\(6, 5\)"),
    (npy(pixels()[None]), r"\(1, 3, 6, 5\)"),
    (npy(pixels()[:0]), r"\(0, 6, 5\)"),
    (npy(pixels().astype(complex)), "complex"),
    (npy(pixels().astype("U3")), "<U3"),
    (npy(np.where(pixels() > 150, np.nan, pixels())), r"\d+ of 90 pixels are NaN or infinite"),
    (npy(np.where(pixels() > 150, -np.inf, pixels())), "NaN or infinite"),
    (npz(pixels()), "no .npy file"), (b"", "no .npy file"), (b"hello", "no .npy file"),
])
def test_damaged_npy(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(Exception, match=message) as caught:
        data.load_cells(str(tmp_path / "a.npy"))
    assert not isinstance(caught.value, (AttributeError, TypeError, IndexError))


def test_tiff_types_that_pillow_mistakes(tmp_path):
    """Pillow has no uint32 and no int8: it reads their bits as the other kind."""
    for dtype, kind in (("<u4", 1), ("<i4", 2), ("u1", 1), ("i1", 2)):
        image = np.array([[3, 200], [2**31 + 5, 77]]).astype(dtype)
        tags = {
            256: 2,
            257: 2,
            258: 8 * image.itemsize,
            259: 1,
            262: 1,
            273: 200,
            277: 1,
            278: 2,
            279: image.nbytes,
            339: kind,
        }
        entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
                           for tag, value in sorted(tags.items()))
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
        (tmp_path / "a.tif").write_bytes(head.ljust(200, b"\0") + image.tobytes())
        found = data.load_cells(str(tmp_path / "a.tif"))
        np.testing.assert_array_equal(found, image[None])
        assert found.dtype == image.dtype


@pytest.mark.parametrize("damage", ["cut", "sizes", "text"])
def test_damaged_tiff(tmp_path, damage):
    path = tmp_path / "a.tif"
    save_tiff(path, pixels(height=40, width=40))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "sizes":
        save_tiff(path, [pixels()[0], pixels(height=7)[0]])
    else:
        path.write_text("hello")
    with pytest.raises(Exception):
        data.load_cells(str(path))


# ---- TIFF: every kind that tifffile writes ---------------------------------------------------------

def tiff(image, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **options)
    return buffer.getvalue()


def load_tiff(tmp_path, content, **planes):
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    return data.load_cells(str(path), planes)


def check_tiff(tmp_path, stored, expected=None, planes=None, **options):
    expected = stored if expected is None else expected
    found = load_tiff(tmp_path, tiff(stored, **options), **(planes or {}))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype.newbyteorder("=")


PAGES = dict(photometric="minisblack", metadata=None)


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4",
                                   "f8"])
def test_tiff_number_types(tmp_path, dtype):
    image = (pixels(3, 20, 24) % 2 if dtype == "?" else pixels(3, 20, 24)).astype(dtype)
    if dtype[0] in "iu" and dtype[1] != "1":
        image[0, 0, 0] = np.iinfo(image.dtype).max
    for byteorder in "<>":
        check_tiff(tmp_path, image, byteorder=byteorder, **PAGES)
    check_tiff(tmp_path, image, bigtiff=True, **PAGES)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "deflate", "zstd", "lzma", "packbits",
                                         "jpeg2000", "lerc"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tiff_compressions(tmp_path, compression, dtype):
    image = pixels(3, 20, 24).astype(dtype)
    check_tiff(tmp_path, image, compression=compression, **PAGES)
    check_tiff(tmp_path, image, compression=compression, tile=(16, 16), **PAGES)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
@pytest.mark.parametrize("byteorder", "<>")
def test_tiff_predictors(tmp_path, dtype, byteorder):
    check_tiff(tmp_path, pixels(3, 20, 24).astype(dtype), compression="zlib", predictor=True,
               byteorder=byteorder, **PAGES)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_tiff_samples_of_a_pixel_are_channels(tmp_path, dtype, count):
    image = pixels(count, 20, 24).astype(dtype)
    last = np.moveaxis(image, 0, -1)
    for kind in ["minisblack", "rgb"][:1 + (count > 2)]:
        options = dict(photometric=kind, metadata=None)
        options["extrasamples"] = ["unspecified"] * (count - (3 if kind == "rgb" else 1))
        check_tiff(tmp_path, last, image, planarconfig="contig", **options)
        check_tiff(tmp_path, last, image, planarconfig="contig", compression="lzw", predictor=True,
                   **options)
        check_tiff(tmp_path, image, planarconfig="separate", **options)


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "f4"])
def test_tiff_white_at_zero_is_left_as_stored(tmp_path, dtype):
    image = pixels(2, 20, 24).astype(dtype)
    check_tiff(tmp_path, image, photometric="miniswhite", metadata=None)
    check_tiff(tmp_path, image, photometric="miniswhite", compression="lzw", metadata=None)


def test_tiff_orientation_turns_the_pixels(tmp_path):
    image = Image.fromarray(pixels(1, 20, 24, "u1")[0])
    for orientation in range(1, 9):
        image.save(tmp_path / "a.tif", tiffinfo={274: orientation})
        image.getexif()[274] = orientation
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(data.load_cells(str(tmp_path / "a.tif"))[0], expected)


@pytest.mark.parametrize("kind", [dict(imagej=True), dict(ome=True), dict()])
@pytest.mark.parametrize("byteorder", "<>")
def test_described_axes(tmp_path, kind, byteorder):
    """Channels are channels; slices and time points are refused, or chosen."""
    kind = dict(kind, byteorder=byteorder, photometric="minisblack")
    image = pixels(3, 20, 24)
    check_tiff(tmp_path, image, metadata={"axes": "CYX"}, **kind)
    check_tiff(tmp_path, image[0], image[:1], metadata={"axes": "YX"}, **kind)
    for axis in "ZT":
        stack = tiff(image, metadata={"axes": f"{axis}YX"}, **kind)
        with pytest.raises(ValueError, match=f"not channels.*--planes {axis.lower()}=0"):
            load_tiff(tmp_path, stack)
        np.testing.assert_array_equal(load_tiff(tmp_path, stack, **{axis.lower(): 2}), image[2:])
        with pytest.raises(ValueError, match=f"no {axis.lower()}=3: its axes are"):
            load_tiff(tmp_path, stack, **{axis.lower(): 3})
    both = pixels(6, 20, 24).reshape(2, 3, 20, 24)
    check_tiff(tmp_path, both, both[1], {"z": 1}, metadata={"axes": "ZCYX"}, **kind)
    check_tiff(tmp_path, both, both[0], {"t": 0}, metadata={"axes": "TCYX"}, **kind)
    if "imagej" not in kind:                                # which knows one order only
        check_tiff(tmp_path, both, both[:, 2], {"z": 2}, metadata={"axes": "CZYX"}, **kind)
        check_tiff(tmp_path, both, both[:, 2], {"t": 2}, metadata={"axes": "CTYX"}, **kind)


@pytest.mark.parametrize("text, message", [
    ("channels=5\nhyperstack=true\n", None), ("slices=5\n", "not channels"),
    ("frames=5\nhyperstack=true\n", "not channels"), ("", "images=5, 1 can be read"),
    ("channels=6\n", "does not fit"),
])
def test_imagej_stack_with_one_directory(tmp_path, text, message):
    """ImageJ leaves the other planes behind the first, and only its description speaks of them."""
    image = pixels(5, 20, 24)
    content = tiff(image[0], metadata=None, description=f"ImageJ=1.53t\nimages=5\n{text}")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        assert file.pages.first.dataoffsets[0] + image[0].nbytes == len(content)
    content += image[1:].tobytes()
    if message is None:
        np.testing.assert_array_equal(load_tiff(tmp_path, content), image)
        content = content[:-image[0].nbytes]
        message = "does not fit"
    with pytest.raises(ValueError, match=message):
        load_tiff(tmp_path, content)


def test_series_are_refused_or_chosen_and_previews_left_out(tmp_path):
    image = pixels(4, 40, 48)
    preview = pixels(3, 10, 12, "u1").transpose(1, 2, 0)

    def file(**options):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            writer.write(image, **PAGES)
            writer.write(preview, photometric="rgb", metadata=None, **options)
        return buffer.getvalue()

    np.testing.assert_array_equal(load_tiff(tmp_path, file(subfiletype=1)), image)
    with pytest.raises(ValueError, match="2 series of images .*--planes series=0"):
        load_tiff(tmp_path, file())
    np.testing.assert_array_equal(load_tiff(tmp_path, file(), series=0), image)
    np.testing.assert_array_equal(load_tiff(tmp_path, file(), series=1),
                                  preview.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="no series 2: there are 2"):
        load_tiff(tmp_path, file(), series=2)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as writer:
        writer.write(image, metadata={"axes": "CYX"})
        writer.write(image + 1, metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match="2 series"):
        load_tiff(tmp_path, buffer.getvalue())
    np.testing.assert_array_equal(load_tiff(tmp_path, buffer.getvalue(), series=1), image + 1)


@pytest.mark.parametrize("content, message", [
    (tiff(pixels(1, 20, 24, "u1")[0], photometric="palette", colormap=np.zeros((3, 256), "u2")),
     "a palette"),
    (tiff(pixels(6, 20, 24).reshape(2, 20, 24, 3), photometric="rgb", metadata=None), "its axes"),
    (tiff(pixels(5, 20, 24), ome=True, metadata={"axes": "CYX"}).replace(
        b'SizeC="5"', b'SizeC="3"'), "3 of its 5 pages"),
    (tiff(pixels(5, 20, 24), ome=True, metadata={"axes": "CYX"}).replace(
        b'SizeC="5"', b'SizeC="7"'), "7 planes, it has 5"),
    (tiff(pixels(5, 20, 24), ome=True, metadata={"axes": "CYX"}).replace(b"<OME", b"<OMX"),
     "does not fit"),
    (tiff(pixels(3, 20, 24), **PAGES)[:1000], "cut off or damaged|corrupted"),
    (tiff(pixels(1, 20, 24)[0], compression="jpegxl"), "compression 50002 is not read"),
])
def test_tiffs_that_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_tiff(tmp_path, content)


def with_tag(content, tag, value):
    """The first page's tag with another value, in place."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = file.pages.first.tags[tag].valueoffset
        size = {3: 2, 4: 4}[file.pages.first.tags[tag].dtype]
    return content[:at] + value.to_bytes(size, "little") + content[at + size:]


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
def test_tiff_bombs_are_refused_by_their_size(tmp_path, compression, monkeypatch):
    content = tiff(pixels(1, 20, 24)[0], compression=compression, **PAGES)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)     # nothing is decoded
    for width in (60000, 65535):
        bomb = with_tag(with_tag(with_tag(content, 256, width), 257, width), 278, width)
        with pytest.raises(ValueError, match="too large"):
            load_tiff(tmp_path, bomb)


def test_coded_images_are_measured_before_they_are_decoded(tmp_path, monkeypatch):
    content = tiff(pixels(1, 20, 24, "u1")[0], compression="jpeg2000", **PAGES)
    at = content.index(b"\xff\x4f\xff\x51") + 8
    bomb = content[:at] + struct.pack(">II", 60000, 60000) + content[at + 8:]
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    with pytest.raises(ValueError, match="3600000000 pixels: too large"):
        load_tiff(tmp_path, bomb)


def test_tiff_with_missing_strips_is_refused(tmp_path):
    content = tiff(pixels(1, 20, 24)[0], compression="zlib", **PAGES)
    with pytest.raises(ValueError, match="parts of the pixels are missing"):
        load_tiff(tmp_path, with_tag(content, 279, 0))
    with pytest.raises(ValueError, match="parts of the pixels are missing"):
        load_tiff(tmp_path, with_tag(content, 273, 0))


# ---- Arrays whose channels come last, .npz --------------------------------------------------------

@pytest.mark.parametrize("shape, last", [
    ((32, 32, 5), True), ((224, 224, 3), True), ((40, 32, 5), True), ((64, 64, 8), True),
    ((5, 32, 32), False), ((8, 4, 4), False), ((36, 30, 28), False), ((20, 16, 16), False),
    ((3, 6, 5), False), ((100, 64, 64), False), ((1, 32, 4), False),
])
def test_channels_that_come_last_are_refused(tmp_path, shape, last):
    image = np.random.default_rng(0).integers(0, 99, shape).astype(np.uint16)
    for name, content in (("a.npy", npy(image)), ("a.npz", npz(image))):
        (tmp_path / name).write_bytes(content)
        if last:
            with pytest.raises(ValueError, match="channels come first.*moveaxis"):
                data.load_cells(str(tmp_path / name))
        else:
            np.testing.assert_array_equal(data.load_cells(str(tmp_path / name)), image)


def test_npz_holds_one_array_that_is_no_pickle(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez_compressed(path, pixels())
    np.testing.assert_array_equal(data.load_cells(path), pixels())
    np.savez(path, a=pixels(), b=pixels())
    with pytest.raises(ValueError, match="needs one array, it has 2: a.npy, b.npy"):
        data.load_cells(path)
    np.savez(path, np.array([Bomb()], object))
    with pytest.raises(ValueError, match="pickle"):
        data.load_cells(path)
    (tmp_path / "a.npz").write_bytes(npz(pixels())[:-30])
    with pytest.raises(ValueError, match="no .npz file, or damaged"):
        data.load_cells(path)
    assert not Bomb.exploded


def test_npz_bomb_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cells, "MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", np.zeros((3, 100, 100)))
    with pytest.raises(ValueError, match="240128 bytes when unpacked: too large"):
        data.load_cells(str(tmp_path / "a.npz"))


def test_take_channels():
    image = pixels(4)
    take = functools.partial(data.take_channels, lambda path: image)
    np.testing.assert_array_equal(take(4, [2, 0], ""), image[[2, 0]])
    np.testing.assert_array_equal(
        take(4, [-1, 3, -1], ""), np.stack([0 * image[0], image[3], 0 * image[0]])
    )
    with pytest.raises(ValueError, match="4 channels, expected 5.*channels come first"):
        take(5, [0], "")


# ---- CellTransform -------------------------------------------------------------------------------

def test_evaluation_only_normalises():
    image, mean, std = pixels(3, 32, 32), [1.0, 20.0, 300.0], [2.0, 5.0, 0.5]
    y = data.CellTransform(32, mean, std, augment=False)(image)
    expected = (image - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    y = data.CellTransform(32, mean, std, False, masked=[1])(image)
    assert (y[1] == 0).all() and (y[[0, 2]] != 0).any((1, 2)).all()


@pytest.mark.parametrize("height, width", [(40, 32), (32, 41), (20, 50), (31, 31), (7, 5)])
def test_other_sizes_are_cropped_or_padded_in_the_centre(height, width):
    image = 1 + pixels(2, height, width)
    y = data.CellTransform(32, [0, 0], [1, 1], False)(image).numpy()
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = np.pad(image, ((0, 0), (40, 40), (40, 40)))[
        :, 40 + top : 72 + top, 40 + left : 72 + left
    ]
    np.testing.assert_array_equal(y, expected)
    assert y.shape == (2, 32, 32)


def draws(transform, image, count=200):
    torch.manual_seed(0)
    return [transform(image) for _ in range(count)]


def test_crops_stay_within_the_padding_and_reach_all_of_it():
    """A bright pixel of a 28 px image, padded to 32, moves by -2 to 2 in each direction."""
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 14, 14] = 255
    transform = data.CellTransform(28, [0], [1], augment=True)
    seen = {
        tuple(torch.nonzero(transform.window(image)[0]).squeeze(0).tolist()) for _ in range(400)
    }
    assert seen == {(y, x) for y in range(12, 17) for x in range(12, 17)}
    large = np.zeros((1, 40, 40), np.uint8)               # larger than the padding: any crop of it
    large[0, 20, 20] = 255
    rows = {int(torch.nonzero(transform.window(large)[0])[0, 0]) for _ in range(400)}
    assert rows == set(range(20 - 12, 20 + 1))


def test_augmentation_moves_all_channels_alike():
    image = np.repeat(pixels(1, 64, 64, np.float32), 3, 0)
    transform = data.CellTransform(56, [0] * 3, [1] * 3, augment=True)
    results = draws(transform, image)
    for y in results:
        torch.testing.assert_close(y[1], y[0])
        torch.testing.assert_close(y[2], y[0])
    assert len({tuple(y[0].flatten().tolist()) for y in results}) > 150


def test_each_augmentation_comes_half_of_the_time(monkeypatch):
    calls = dict(rotate=0, defocus=0)

    def count(name, result):
        calls[name] += 1
        return result

    monkeypatch.setattr(data.cells, "defocus", lambda x, radius: count("defocus", x))
    monkeypatch.setattr(
        data.CellTransform, "rotate", staticmethod(lambda x, degrees: count("rotate", x))
    )
    image = np.tile(np.arange(300, dtype=np.float32), (1, 300, 1)) + 1  # wide: no padding is seen
    results = draws(data.CellTransform(224, [0], [1], augment=True), image, 600)
    holes = [y for y in results if (y == 0).any()]
    mirrored = [y for y in results if (y[0, 0].diff().sum() < 0)]
    upright = sum(1 for y in results if (y[0, 0].diff().sum() > 0))
    assert 250 < calls["defocus"] < 350 and 250 < len(holes) < 350
    assert 70 < calls["rotate"] < 130
    assert 70 < len(mirrored) < 130
    assert upright + len(mirrored) == 600
    areas = {int((y == 0).sum()) for y in holes}
    assert max(areas) <= 1000 and max(areas) > 700 and min(areas) == 100
    assert all(area <= 1000 for area in areas)


def test_defocus_spreads_a_point_into_a_disc():
    point = torch.zeros(2, 15, 15)
    point[0, 7, 7], point[1, 7, 6] = 1.0, 3.0
    for radius in (1, 2, 3):
        disc = data.cells.defocus(point, radius)
        torch.testing.assert_close(disc.sum((1, 2)), torch.tensor([1.0, 3.0]))
        y, x = torch.nonzero(disc[0], as_tuple=True)
        assert (torch.hypot(y - 7.0, x - 7.0) < radius + 0.5).all()
        assert (y == 7).sum() == 2 * radius + 1
        torch.testing.assert_close(disc[0].roll(-1, 1) * 3, disc[1])
        torch.testing.assert_close(disc[0], disc[0].T)
        torch.testing.assert_close(disc[0], disc[0].flip(0))
    torch.testing.assert_close(data.cells.defocus(torch.ones(1, 9, 9), 3), torch.ones(1, 9, 9))


def test_rotation_turns_about_the_centre():
    image = torch.zeros(1, 33, 33)
    image[0, 16, 28] = 1.0
    turned = data.CellTransform.rotate(image, 90.0)
    assert turned[0].argmax().item() in (4 * 33 + 16, 28 * 33 + 16) and turned.max() > 0.9


# ---- Splits and folders --------------------------------------------------------------------------

def test_axes_that_a_damaged_description_miscounts_are_refused():
    with pytest.raises(ValueError, match=r"its axes are CYX, of \(2, 3\)"):
        data.tiff.to_channels(np.zeros((2, 3)), "CYX", {})


def test_split_is_the_legacy_permutation():
    order = [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]  # numpy.random.seed(0); numpy.random.permutation(10)
    for split, part in (("train", order[:6]), ("val", order[6:8]), ("test", order[8:])):
        assert data.sites.split_of(10, split).tolist() == sorted(part)
    for n in (0, 1, 4, 7, 23):
        parts = [data.sites.split_of(n, split).tolist() for split in ("train", "val", "test")]
        assert sorted(sum(parts, [])) == list(range(n)) and len(parts[0]) == n * 6 // 10


def make_cells(root, counts, splits=("",), channels=3):
    for split in splits:
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                np.save(folder / f"{i:02d}.npy", pixels(channels, seed=i))
    return str(root)


def test_folder_of_classes_is_split_class_by_class(tmp_path):
    root = make_cells(tmp_path, dict(a=10, b=25))
    parts = [data.cell_folder(root, split, np.asarray) for split in ("train", "val", "test")]
    assert [[label for _, label in part.samples].count(1) for part in parts] == [15, 5, 5]
    assert [len(part) for part in parts] == [21, 7, 7] and parts[0].classes == ["a", "b"]
    assert len({path for part in parts for path, _ in part.samples}) == 35
    image, label = parts[1][0]
    assert image.shape == (3, 6, 5) and label == 0


def test_folder_with_splits_and_tiffs(tmp_path):
    root = make_cells(tmp_path, dict(a=2, b=3), ("train", "val"))
    save_tiff(tmp_path / "val/a/x.tiff", pixels())
    assert len(data.cell_folder(root, "train", np.asarray)) == 5
    val = data.cell_folder(root, "val", np.asarray, ["a", "b"])
    assert len(val) == 6 and all(image.shape == (3, 6, 5) for image, _ in val)
    with pytest.raises(FileNotFoundError, match="test: no such folder.*ROOT/test/CLASS"):
        data.cell_folder(root, "test", np.asarray)


def test_folders_that_cannot_be_split(tmp_path):
    root = make_cells(tmp_path / "few", dict(a=3, b=2))
    data.cell_folder(root, "train", np.asarray)
    with pytest.raises(
        ValueError, match="few/b: 2 images are too few.*'val' gets none. Give it at least 3"
    ):
        data.cell_folder(root, "val", np.asarray)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.cell_folder(str(tmp_path / "nothing"), "train", np.asarray)
    (tmp_path / "empty/a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images \(.npy, .tif, .tiff, .npz\)"):
        data.cell_folder(str(tmp_path / "empty"), "train", np.asarray)


def test_bad_files_are_skipped_and_too_many_end_the_run(tmp_path):
    root = make_cells(tmp_path, dict(a=20))               # one may be bad, however few there are
    files = data.cell_folder(root, "train", np.asarray)
    (tmp_path / "a" / files.samples[3][0].rpartition("/")[2]).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"):
        assert files[3] is None
    assert files[4] is not None and files.bad.sum() == 1
    files.load = functools.partial(data.take_channels, files.load, 8, [0])
    with (
        pytest.warns(UserWarning),
        pytest.raises(data.BadDataError, match="3 channels, expected 8"),
    ):
        for i in range(10):
            files[i]


def test_channel_statistics(tmp_path):
    root = make_cells(tmp_path, dict(a=20))
    files = data.cell_folder(root, "train", np.asarray)
    stack = np.stack([np.load(path) for path, _ in files.samples]).astype(np.float64)
    mean, std = data.channel_statistics(files, 3)
    np.testing.assert_allclose(mean, stack.mean((0, 2, 3)))
    np.testing.assert_allclose(std, stack.std((0, 2, 3)))
    few = data.channel_statistics(files, 3, 2)[0]
    np.testing.assert_allclose(few, stack[[0, -1]].mean((0, 2, 3)))
    assert files[0][0].shape == (3, 6, 5)                 # and the data set is as it was


def test_channel_count_is_what_most_of_the_first_files_have(tmp_path):
    files = data.cell_folder(make_cells(tmp_path, dict(a=10)), "train", np.asarray)
    np.save(files.samples[0][0], pixels(5))
    np.save(files.samples[1][0], pixels()[0])
    assert data.channel_count(files) == 3
    with (
        pytest.warns(UserWarning, match="5 channels, expected 3|got uint16"),
        pytest.raises(data.BadDataError),
    ):
        data.channel_statistics(files, 3)
    for path, _ in files.samples:
        np.save(path, pixels()[0])
    with pytest.raises(ValueError, match=r"cannot be read.*\(6, 5\)"):
        data.channel_count(files)


# ---- Object stores -------------------------------------------------------------------------------

class Shaky(fsspec.AbstractFileSystem):
    """An object store that fails `failures` times before it answers."""
    protocol, failures, calls, error, cachable = "shaky", 0, 0, OSError("connection reset"), False

    def cat_file(self, path, **options):
        type(self).calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"content of " + path.encode()


@pytest.fixture
def shaky(monkeypatch):
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    pauses = []
    monkeypatch.setattr(data.cells.time, "sleep", pauses.append)
    monkeypatch.setattr(Shaky, "calls", 0)
    return pauses


def test_a_store_that_fails_is_asked_again(shaky, monkeypatch):
    monkeypatch.setattr(Shaky, "failures", 4)
    assert data.cells.fetch("shaky://bucket/a") == b"content of bucket/a"
    assert Shaky.calls == 5 and shaky == [0.5, 1, 2, 4]


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError("slow"), RuntimeError("odd")])
def test_but_not_for_ever(shaky, monkeypatch, error):
    monkeypatch.setattr(Shaky, "failures", 10**9)
    monkeypatch.setattr(Shaky, "error", error)
    with pytest.raises(
        OSError, match=f"shaky://bucket/a: failed 5 times, at last {type(error).__name__}: {error}"
    ):
        data.cells.fetch("shaky://bucket/a")
    assert Shaky.calls == 5 and sum(shaky) == 7.5


@pytest.mark.parametrize(
    "error", [FileNotFoundError("a"), PermissionError("a"), ValueError("a"), ImportError("s3fs")]
)
def test_nor_when_it_cannot_help(shaky, monkeypatch, error):
    monkeypatch.setattr(Shaky, "failures", 10**9)
    monkeypatch.setattr(Shaky, "error", error)
    with pytest.raises(type(error)):
        data.cells.fetch("shaky://bucket/a")
    assert Shaky.calls == 1 and not shaky


def test_unknown_stores_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        data.cells.fetch("nosuch://bucket/a")
    for path in ("memory://nothing/here", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError):
            data.cells.fetch(path)


# ---- JUMP-CP -------------------------------------------------------------------------------------

def parquet(columns):
    buffer = io.BytesIO()
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def text(columns, delimiter="\t"):
    rows = zip(
        *[
            [name, *("" if v is None else str(v) for v in values)]
            for name, values in columns.items()
        ]
    )
    return "".join(delimiter.join(row) + "\n" for row in rows).encode()


# Wells A01 to A05; A02 and A05 are untreated; A04 stands twice, with s3 and then s1.
PLATE = dict(well_position=["A01", "A02", "A03", "A04", "A04", "A05"],
             broad_sample=["s2", None, "s1", "s3", "s1", None])
META = dict(
    broad_sample=["s1", "s3", "s2", "s9", None],
    target=["KRAS", "EGFR", "KRAS", "TP53", None],
    pert_type=["trt", "trt", "trt", "trt", "control"],
)
# By hand: the join goes s1 -> A03, A04; s3 -> A04; s2 -> A01; none -> A02, A05. KRAS comes first,
# then EGFR; A04 is s3's in the end, because s3 comes after s1 in metadata.
LABELS = dict(A01=1, A02=0, A03=1, A04=2, A05=0)


def write(base, name, content):
    with fsspec.open(f"{base}/{name}", "wb") as file:
        file.write(content)
    return f"{base}/{name}"


def make_plate(base, images=40, wells=tuple(LABELS), plate=PLATE, meta=META, table=text, **index):
    """The benchmark's layout at a folder or URL -> the three tables' paths."""
    wells = [wells[i % len(wells)] for i in range(images)]
    columns = dict(
        path=[f"images/{i}.npy" for i in range(images)],
        ID=[f"id{i}" for i in range(images)],
        well_loc=wells,
        **index,
    )
    for i, path in enumerate(columns["path"]):
        write(base, path, npy(np.full((8, 4, 4), i, np.uint16)))
    return (
        write(base, "BR00116991.pq", parquet(columns)),
        write(base, "platemap.tsv", table(plate)),
        write(base, "metadata.tsv", table(meta)),
    )


@pytest.fixture(params=["local", "memory"])
def base(request, tmp_path):
    if request.param == "local":
        (tmp_path / "images").mkdir()
        return str(tmp_path)
    store = fsspec.filesystem("memory")
    store.store.clear()
    return "memory://bucket/jump"


@pytest.mark.parametrize("table", [text, parquet, functools.partial(text, delimiter=",")])
def test_jump_cp_layout(base, table):
    tables = make_plate(base, table=table)
    seen = {}
    for split, size in (("train", 24), ("val", 8), ("test", 8)):
        plate = data.JumpCP(*tables, split, np.asarray)
        assert len(plate) == size and plate.classes == ["control", "KRAS", "EGFR"]
        for image, label in plate:
            i = int(image[0, 0, 0])
            assert image.shape == (8, 4, 4) and label == list(LABELS.values())[i % 5]
            seen[i] = split
    assert sorted(seen) == list(range(40))
    assert sorted(i for i in seen if seen[i] == "val") == data.sites.split_of(40, "val").tolist()


def test_gene_column_of_crispr_plates(base):
    meta = dict(gene=META["target"], broad_sample=META["broad_sample"])
    plate = data.JumpCP(*make_plate(base, meta=meta), "train", np.asarray)
    assert plate.classes == ["control", "KRAS", "EGFR"]


def test_several_plates_share_the_maps(base):
    index, *maps = make_plate(base)
    # Beside that index.
    more = dict(path=["x.npy", "y.npy"], well_loc=["A01", "A02"], ID=["a", "b"])
    second = write(base, "images/second.pq", parquet(more))
    both = [data.JumpCP([index, second], *maps, split, np.asarray)
            for split in ("train", "val", "test")]
    paths = {path for part in both for path, _ in part.samples}
    assert {f"{base}/images/x.npy", f"{base}/images/1.npy"} <= paths
    assert [len(part) for part in both] == [25, 8, 9] and both[0][0] is not None
    with pytest.warns(UserWarning, match="40 of 80 rows of .* repeat a path"):
        data.JumpCP([index, index], *maps, "train", np.asarray)


def test_images_in_unlabelled_wells_are_left_out_and_counted(base):
    tables = make_plate(base, wells=("A01", "Z99", None, "A03"))
    with pytest.warns(
        UserWarning, match=r"20 of 40 images have no label: their wells \(None, Z99\).*left out"
    ):
        plates = [data.JumpCP(*tables, split, np.asarray) for split in ("train", "val", "test")]
    assert sum(map(len, plates)) == 20
    for plate in plates:
        assert all(int(image[0, 0, 0]) % 2 * 3 in (0, 3) and label == 1 for image, label in plate)
    with pytest.raises(ValueError, match="40 of 40 images have no label.*B01.*A01, A02"):
        data.JumpCP(*make_plate(base, wells=("B1", "B3")), "train", np.asarray)


def test_empty_splits_and_wrong_tables(base):
    with pytest.raises(ValueError, match="no images in this split of 1"):
        data.JumpCP(*make_plate(base, images=1), "train", np.asarray)
    index, plate, meta = make_plate(base)
    with pytest.raises(ValueError, match="no column well_position; it has broad_sample, target"):
        data.JumpCP(index, meta, meta, "train", np.asarray)
    with pytest.raises(ValueError, match="no column target or gene; it has well_position"):
        data.JumpCP(index, plate, plate, "train", np.asarray)
    with pytest.raises(ValueError, match="no column path"):
        data.JumpCP(plate, plate, meta, "train", np.asarray)
    for content in (b"", b"PAR1 no parquet", b"\xff\xfe\x00binary", b"a,b\n1,2,3\n"):
        with pytest.raises(ValueError, match="neither a Parquet nor a text table|no column"):
            data.JumpCP(write(base, "index", content), plate, meta, "train", np.asarray)
    with pytest.raises(FileNotFoundError):
        data.JumpCP(f"{base}/nothing", plate, meta, "train", np.asarray)


def test_missing_and_damaged_images_are_skipped(base):
    tables = make_plate(base, images=400)
    plate = data.JumpCP(*tables, "train", np.asarray)
    write(base, f"images/{plate.samples[0][0].rpartition('/')[2]}", b"")
    plate.samples = [plate.samples[0], (f"{base}/images/none.npy", 0), *plate.samples[2:]]
    with pytest.warns(UserWarning, match="skipped"):
        assert plate[0] is None and plate[1] is None and plate[2] is not None
    assert plate.bad.sum() == 2


def test_paths_of_the_index(tmp_path):
    locate = data.JumpCP.locate
    assert locate("a/1.npy", "plates/index.pq", "") == "plates/a/1.npy"
    assert locate("a/1.npy", "index.pq", "") == "a/1.npy"
    assert locate("a/1.npy", "s3://bucket/x/index.pq", "") == "s3://bucket/x/a/1.npy"
    assert locate("/a/1.npy", "plates/index.pq", "") == "/a/1.npy"
    assert locate("s3://b/a/1.npy", "plates/index.pq", "") == "s3://b/a/1.npy"
    assert locate("s3://b/a/1.npy", "plates/index.pq", "s3://b/=/disk/") == "/disk/a/1.npy"
    assert locate("s3://c/a/1.npy", "plates/index.pq", "s3://b/=/disk/") == "s3://c/a/1.npy"
    assert locate(None, "index.pq", "") is None


def test_loading_processes_read_from_a_store():
    base = "memory://bucket/jump"
    plate = data.JumpCP(*make_plate(base), "train", data.CellTransform(4, [0] * 8, [1] * 8, False))
    loader = data.make_loader(plate, 4, train=False, workers=2)
    assert sorted(images[0, 0, 0, 0].item() for images, _ in loader) == sorted(
        data.sites.split_of(40, "train")[::4].tolist())


# ---- Tables --------------------------------------------------------------------------------------

ROWS = dict(path=["a,1.npy", "b.npy"], well_loc=["A01", None])


@pytest.mark.parametrize("content", [
    text(ROWS), text({**ROWS, "path": ["a|1.npy", "b.npy"]}, ",").replace(b"a|1", b'"a,1"').replace(
        b'"a,1".npy', b'"a,1.npy"'), text(ROWS, ";"), parquet(ROWS),
    b"\xef\xbb\xbf" + text(ROWS, ";"), text(ROWS).decode().encode("utf-16"),
    text(ROWS).replace(b"\n", b"\r\n"), text(ROWS).replace(b"\t", b" \t ", 1), b"\n" + text(ROWS),
])
def test_tables_as_spreadsheets_write_them(tmp_path, content):
    expected = [ROWS["path"], ROWS["well_loc"]]
    for packed in (content, gzip.compress(content), gzip.compress(content[:9]) + gzip.compress(
            content[9:])):
        path = write(str(tmp_path), "table", packed)
        assert data.read_table(path, "path", "well_loc") == expected
        assert data.read_table(path, "path", "well|well_loc") == expected


def test_parquet_is_read_from_memory_that_is_not_pythons(tmp_path, monkeypatch):
    seen = []
    read = pyarrow.parquet.read_table
    monkeypatch.setattr(pyarrow.parquet, "read_table", lambda source, **options: (
        seen.append((source, options)), read(source, **options))[1])
    data.read_table(write(str(tmp_path), "t", parquet(ROWS)), "path")
    (source, options), = seen
    assert isinstance(source, pyarrow.BufferReader) and options == {"use_threads": False}


@pytest.mark.parametrize("content", [
    b"path,path,x\n1,2,3\n", b"path;well; path\n1;2;3\n", b"\xef\xbb\xbfpath\tpath\n1\t2\n",
    gzip.compress(b"path,path\n1,2\n", mtime=0),
    parquet(pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["path", "path"])),
])
def test_repeated_columns_are_an_error_of_one_line(tmp_path, content):
    with pytest.raises(ValueError, match=r"t: column path comes twice") as caught:
        data.read_table(write(str(tmp_path), "t", content), "path")
    assert "\n" not in str(caught.value)


def test_damaged_and_oversized_gzip(tmp_path, monkeypatch):
    packed = gzip.compress(text(ROWS))
    for content in (packed[:-9], packed[:5], packed[:12] + b"x" + packed[13:]):
        with pytest.raises(ValueError, match="neither a Parquet nor a text table"):
            data.read_table(write(str(tmp_path), "t", content), "path")
    monkeypatch.setattr(data.plates, "MAX_BYTES", 20)
    with pytest.raises(ValueError, match="more than 20 bytes when unpacked"):
        data.read_table(write(str(tmp_path), "t", packed), "path")


def test_names_of_wells():
    names = {"A01": "A01", "A1": "A01", "a01": "A01", " A01 ": "A01", "A001": "A01", "p24": "P24",
             "AF48": "AF48", "aa1": "AA01", "A10": "A10", "r01c01": "r01c01", " 7 ": "7", None: None}
    assert {name: data.sites.normal_well(name) for name in names} == names


@pytest.mark.parametrize("wells", [("A1", "a01", " A01 "), ("A001", "a1 ", "A01")])
def test_wells_go_by_their_normal_names(base, wells):
    plates = [data.JumpCP(*make_plate(base, wells=wells), split, np.asarray)
              for split in ("train", "val", "test")]
    assert sum(map(len, plates)) == 40 and {label for p in plates for _, label in p.samples} == {1}


def test_sites_of_a_well_stay_together_when_asked(base):
    tables = make_plate(base)
    index = data.read_table(tables[0], "path", "well_loc")
    well_of = {path.rpartition("/")[2]: well for path, well in zip(*index)}

    def wells(split, **options):
        plate = data.JumpCP(*tables, split, np.asarray, **options)
        return {well_of[path.rpartition("/")[2]] for path, _ in plate.samples}

    splits = [wells(split, split_by="well") for split in ("train", "val", "test")]
    assert [len(s) for s in splits] == [3, 1, 1] and len(set.union(*splits)) == 5
    assert wells("train") & wells("test")                   # the benchmark's own split


# ---- A file per channel --------------------------------------------------------------------------

NAME = r"(?P<well>r\d+c\d+)f(?P<site>\d+)p\d+-ch(?P<channel>\d+)"


def make_raw(root, wells=5, sites=4, channels=(1, 2, 10), classes="ab"):
    """As Harmony writes them; a channel's pixels tell class, well, site and channel."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for well in range(wells):
            for site in range(sites):
                for channel in channels:
                    image = np.array([[k, 10 * k + well, site, channel]], np.uint16)
                    path = root / name / f"r01c{10 * k + well:02d}f{site:02d}p01-ch{channel}sk1.tiff"
                    tifffile.imwrite(path, image)
    return str(root)


def test_a_file_per_channel_is_an_image_per_site(tmp_path):
    root = make_raw(tmp_path)
    parts = {split: data.cell_folder(root, split, np.asarray, pattern=NAME)
             for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [24, 8, 8]
    assert parts["train"].channels == ["1", "2", "10"]
    wells = {}
    for split, part in parts.items():
        for image, label in part:
            assert image.shape == (3, 1, 4) and image[:, 0, 3].tolist() == [1, 2, 10]
            assert (image[:, 0, :3] == image[0, 0, :3]).all() and image[0, 0, 0] == label
            wells.setdefault(int(image[0, 0, 1]), []).append(split)
    assert len(wells) == 10 and all(len(set(w)) == 1 and len(w) == 4 for w in wells.values())
    by_site = [data.cell_folder(root, split, np.asarray, pattern=NAME, split_by="site")
               for split in ("train", "test")]
    well_of = [{int(image[0, 0, 1]) for image, _ in part} for part in by_site]
    assert well_of[0] & well_of[1]


def test_wells_of_several_classes_stay_together(tmp_path):
    """A class for each kind of cell: a well's images lie in several folders."""
    for name in "abc":
        (tmp_path / name).mkdir()
        for well in range(10):
            for site in range(2):
                np.save(tmp_path / name / f"{name}_A{well:02d}_s{site}.npy", pixels())
    seen = {}
    for split in ("train", "val", "test"):
        part = data.cell_folder(str(tmp_path), split, np.asarray,
                                pattern=r"_(?P<well>[A-P]\d+)_s(?P<site>\d)\.")
        assert part.channels == []
        for path, _ in part.samples:
            seen.setdefault(path.rpartition("/")[2].split("_")[1], set()).add(split)
    assert len(seen) == 10 and all(len(splits) == 1 for splits in seen.values())


def test_sites_that_are_incomplete_or_double(tmp_path):
    root = make_raw(tmp_path / "d")
    (tmp_path / "d/a/thumb.tiff").write_bytes(b"")
    next((tmp_path / "d/a").glob("*f01*ch2*")).unlink()
    with pytest.warns(UserWarning, match="1 of 121 files do not match|1 of 40 sites lack some"):
        parts = [data.cell_folder(root, split, np.asarray, pattern=NAME)
                 for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 39
    for path in list((tmp_path / "d/a").glob("*f02*ch2*"))[:3]:
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="4 of 40 sites lack some.*1, 2"):
        data.cell_folder(root, "train", np.asarray, pattern=NAME)
    with pytest.raises(ValueError, match=r"both channel '\d+' of one site.*plate"):
        data.cell_folder(root, "train", np.asarray, pattern=r"(?P<well>r\d+c\d+).*-ch(?P<channel>\d+)")
    with pytest.raises(ValueError, match="none of .* files matches"):
        data.cell_folder(root, "train", np.asarray, pattern="(?P<channel>xyz)")
    with pytest.raises(ValueError, match="--split-by well: the wells are not known"):
        data.cell_folder(root, "train", np.asarray, split_by="well")


def test_files_of_a_site_have_one_channel_of_one_size(tmp_path):
    paths = [str(tmp_path / f"{i}.npy") for i in range(2)]
    for second in (pixels(1, 7, 5), pixels(2)):
        np.save(paths[0], pixels(1))
        np.save(paths[1], second)
        with pytest.raises(ValueError, match="one channel each, of one size"):
            data.load_cells(" + ".join(paths))


@pytest.mark.parametrize("names, by_channel", [
    (["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p01-ch2sk1fk1fl1.tiff"], True),
    (["IXM_A01_s1_w1E89359D7-AB.tif", "IXM_A01_s1_w2AF3F2BD9-CD.tif"], True),
    (["IXM_A01_s1_w1.tif", "IXM_A01_s1_w2.tif"], True),
    (["A01_T0001F001L01A01Z01C01.tif", "A01_T0001F001L01A01Z01C02.tif"], True),
    (["img_c0.tif", "img_c1.tif"], True), (["A01_Channel1.tif", "A01_Channel2.tif"], True),
    (["A01_s1.tif", "A01_s2.tif"], False), (["cell1.tif", "cell2.tif"], False),
    (["r01c01f01p01-ch1.tiff", "r01c01f02p01-ch1.tiff"], False),
])
def test_names_that_number_channels(names, by_channel):
    assert data.named_by_channel([f"d/{name}" for name in names]) == by_channel


# ---- Drawn cells ---------------------------------------------------------------------------------

def test_cells_are_a_function_of_split_and_index():
    cells = {split: data.Cells(split, np.asarray) for split in ("train", "val", "test")}
    image, label = cells["train"][11]
    assert image.shape == (8, 32, 32) and image.dtype == np.float32 and label == 3
    np.testing.assert_array_equal(image, data.Cells("train", np.asarray)[11][0])
    assert abs(image - cells["train"][19][0]).max() > 0.5
    assert abs(image - cells["val"][11][0]).max() > 0.5
    assert [len(c) for c in cells.values()] == [2000, 500, 500] and len(cells["val"].classes) == 8
    assert data.Cells("val", np.asarray, 48)[0][0].shape == (8, 48, 48)


def test_no_channel_alone_tells_the_class_but_their_agreement_does():
    cells = data.Cells("train", np.asarray)
    images, labels = map(np.stack, zip(*(cells[i] for i in range(800))))
    # Alone: of log brightness and contrast, class means differ no more than chance makes them.
    for feature in (images.mean((2, 3)), images.std((2, 3)), images[:, :, 16, 16]):
        feature = np.log(np.abs(feature) + 0.01)  # (images 8)
        means = np.stack([feature[labels == k].mean(0) for k in range(8)])  # (class 8)
        z = (means - feature.mean(0)) / (feature.std(0) / 10)  # 100 images of each class
        assert abs(z).max() < 4 and 0.6 < z.std() < 1.4
    # Together: compare the channels' correlations with what each class's code says.
    flat = images.reshape(800, 8, -1)
    flat = (flat - flat.mean(2, keepdims=True)) / flat.std(2, keepdims=True)
    agreement = np.einsum("nip,njp->nij", flat, flat) / flat.shape[2]  # (images 8 8)
    signs = 1 - 2 * data.Cells.code
    scores = np.einsum("nij,ki,kj->nk", agreement - agreement.mean(), signs, signs)
    assert (scores.argmax(1) == labels).mean() > 0.9


@pytest.mark.parametrize(
    "channels, best",
    [
        ([0], 12.5),
        ([5], 12.5),
        ([0, 1], 25),
        ([3, 6], 25),
        ([0, 1, 2], 50),
        ([0, 1, 2, 3], 50),
        ([0, 1, 2, 4], 100),
        (range(8), 100),
    ],
)
def test_what_is_possible_on_some_channels(channels, best):
    assert data.Cells.best(channels) == best


def test_data_sets_go_to_processes_that_are_spawned(tmp_path):
    files = data.cell_folder(
        make_cells(tmp_path, dict(a=10)), "train", data.CellTransform(8, [0] * 3, [1] * 3, True)
    )
    files.load = functools.partial(data.take_channels, files.load, 3, [0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dataset in (files, data.Cells("val", data.CellTransform(8, [0] * 8, [1] * 8, False))):
            pickle.dumps(dataset.transform), pickle.dumps(dataset.load)
