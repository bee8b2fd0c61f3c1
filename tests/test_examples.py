"""examples/: what the scripts say of themselves, at small size."""
import importlib.util
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("slide", ROOT / "examples/slide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_slide_is_read_by_tiles_whatever_its_size(script, tmp_path, capsys):
    """Of slides of 2,048 px and, without their tiles, of four times that side."""
    torch.set_num_threads(1)
    slide, heat = script.main(size=2048, slides=2, out=tmp_path / "slide.png")
    tile = script.TILE ** 2
    tiles = slide.reads[1:-1]                       # the first is coarse, the last for the picture
    tissue = heat.isfinite()
    assert tiles == [tile] * int(tissue.sum()) and len(tiles) > 3
    assert slide.reads[0] == (2048 // script.TILE * 8) ** 2
    assert max(slide.reads[:-1]) == tile and slide.reads[-1] <= 512 ** 2
    assert heat.shape == (9, 9) and not tissue.all()
    said = capsys.readouterr().out
    assert "readings of at most 0.2 of 13 MB" in said and "peak memory" in said and "score" in said
    assert Image.open(tmp_path / "slide.png").size == (480, 400)

    class Encoder(torch.nn.Module):
        def forward(self, pixels):
            return torch.zeros(1, script.WIDTH)
    large = script.Slide(8192, True, 1000)
    vectors, ids = script.embed(large, Encoder())
    assert max(large.reads[1:]) == tile and len(large.reads) == 1 + len(ids)
    assert vectors.shape == (script.WIDTH, 36, 36)
    assert large.reads[0] == 288 ** 2               # an eighth of a tile's side apart, not all of it


def test_reading_is_a_function_of_the_position(script):
    """Neighbouring, overlapping and coarse readings agree; a lesion has more and larger nuclei."""
    slide = script.Slide(4000, True, 3)
    y, x, radius = slide.lesion
    top, left = int((y - radius) * 4000), int((x - radius) * 4000)
    whole = slide.read(top, left, 400)
    assert (whole[100:200, 100:200] == slide.read(top + 100, left + 100, 100)).all()
    assert (whole[::8, ::8] == slide.read(top, left, 400, 8)).all()
    dark = (script.Slide(4000, True, 3).read(top, left, 560)[..., 0] == 100).mean()
    healthy = (script.Slide(4000, False, 3).read(top, left, 560)[..., 0] == 100).mean()
    assert dark > 3 * healthy > 0


def test_the_heat_map_marks_what_slides_were_told_apart_by(script):
    """Vectors of noise; those of a lesion point elsewhere. Only the slides have labels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = script.WIDTH
    signal = 3 * torch.randn(width)

    def draw(has_lesion, side=6):
        ids = torch.randperm(side * side)[:12].sort().values
        image = torch.randn(width, side * side)
        image[:, ids[4:6]] += has_lesion * signal[:, None]
        return image.view(width, side, side), ids
    labels = torch.arange(64) % 2.0
    images, ids = zip(*(draw(y) for y in labels))
    model = script.train(torch.stack(images), ids, labels, epochs=16)
    scores = []
    places = []
    for i in range(16):
        image, own = draw(i % 2)
        score, heat = script.occlude(model, image, own)
        assert heat.isfinite().flatten().nonzero()[:, 0].equal(own)
        scores.append(score > 0)
        if i % 2:
            ranks = heat.flatten()[own].argsort(descending=True).argsort()
            places.append(ranks[4:6].float().mean().item() / len(own))
    assert sum(s == bool(i % 2) for i, s in enumerate(scores)) >= 14
    assert np.mean(places) < 0.2                    # among the hottest; 0.5 by chance
