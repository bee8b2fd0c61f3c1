"""Videos: at t = 1 the model is one of images; which permutations it notices; clips of any length."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import checkpoints
import fastvim
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny

ROWS = fastvim.SCHEDULES["fastvim_video"]
BACKENDS = ["python", "cpu"]


def video(dtype=torch.float64, **fields):
    return tiny(dtype, **{**dict(schedule="fastvim_video", frames=4), **fields})


def without(axis, rows):
    """The rows of a grid that has not got the axis."""
    return [tuple(" ".join(a for a in axes.split() if a != axis) for axes in row) for row in rows]


@pytest.fixture
def flat(monkeypatch):
    """The name of the schedule for images that the video's is at t = 1."""
    for place in (0, -1):                   # scanned along, and convolved along, by one layer each
        assert sorted(order.split()[place] for order, _ in ROWS) == ["h", "t", "w"]
    rows = without("t", ROWS)
    assert rows == [("h w", "h w"), ("h w", "w"), ("w h", "h")]             # a mean of all, FastVim
    monkeypatch.setitem(fastvim.SCHEDULES, "flat", rows)
    return "flat"


# ---- parity with the image model -----------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_same_seed_gives_the_weights_of_the_image_model(flat, size):
    fields = dict(depth=3, img_size=(32, 48), num_classes=5)
    torch.manual_seed(0)
    clips = fastvim.create_model(f"fastvim_video_{size}", frames=1, tubelet=1, **fields).eval()
    torch.manual_seed(0)
    model = fastvim.create_model(f"fastvim_{size}", schedule=flat, **fields).eval()
    x = images(model)
    assert clips(x[:, :, None]).equal(model(x))
    state = clips.state_dict()
    assert (state.pop("patch_embed.time_embed") == 0).all()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    model.load_state_dict(state)                                # strictly: the same names


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_still_clip_of_one_tubelet_is_an_image(flat, backend, class_token):
    """Outputs, gradients, kept tokens and maps; the filter, here of two frames, is split in two."""
    model = tiny(schedule=flat, class_token=class_token, img_size=(32, 24))
    clips = video(frames=2, tubelet=2, class_token=class_token, img_size=(32, 24))
    state = model.state_dict()
    weight = state["patch_embed.proj.weight"][:, :, None]       # (d c 1 p p)
    shares = torch.tensor([0.3, 0.7], dtype=weight.dtype)[:, None, None]
    clips.load_state_dict({**state, "patch_embed.proj.weight": weight * shares,
                           "patch_embed.time_embed": torch.zeros(1, 16, 1)})
    x = images(model)
    still = x[:, :, None].expand(-1, -1, 2, -1, -1)
    with fastvim.use_backend(backend):
        for keep in (None, random_keep(2, 12, 5)):
            expected = outputs_and_gradients(model, x, keep=keep)
            actual = outputs_and_gradients(clips, still, keep=keep)
            assert actual.pop("patch_embed.time_embed").abs().max() > 0
            actual["x"] = actual["x"].sum(2)                    # that of the image in both frames
            weight = actual["patch_embed.proj.weight"]
            assert weight[:, :, 0].equal(weight[:, :, 1])       # the frames are the same
            actual["patch_embed.proj.weight"] = weight[:, :, 0]
            assert_close(actual, expected)
        for a, b in zip(clips.forward_intermediates(still, [0, 2]),
                        model.forward_intermediates(x, [0, 2])):
            assert_close(a[:, :, 0], b)
            assert a.shape == (2, 16, 1, 4, 3)


# ---- permutations --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*itertools.permutations("thw")][1:], ids="".join)
def test_permuting_axes_of_clip_and_schedule_together_changes_nothing(monkeypatch, names):
    """names: what t, h and w are called in the second model. It knows them apart by nothing but
    its schedule and its embeddings."""
    renamed = str.maketrans("thw", "".join(names))
    rows = [tuple(axes.translate(renamed) for axes in row) for row in ROWS]
    monkeypatch.setitem(fastvim.SCHEDULES, "second", rows)
    torch.manual_seed(0)
    lengths = dict(t=3, h=4, w=2)
    along = {a: torch.randn(16, n, dtype=torch.float64) for a, n in lengths.items()}

    def make(schedule, name_of):
        own = {name_of[a]: values for a, values in along.items()}
        model = video(schedule=schedule, patch_size=1, frames=own["t"].shape[1],
                      img_size=(own["h"].shape[1], own["w"].shape[1]))
        pos = own["h"][:, :, None] + own["w"][:, None]          # (d h w)
        with torch.no_grad():
            model.pos_embed.copy_(rearrange(pos, "d h w -> 1 (h w) d"))
            model.patch_embed.time_embed.copy_(own["t"][None])
        return model
    first = make("fastvim_video", dict(zip("thw", "thw")))
    second = make("second", dict(zip("thw", names)))
    own = {name: p for name, p in second.state_dict().items() if name.endswith("_embed")}
    second.load_state_dict({**first.state_dict(), **own})
    x = images(first)
    permuted = rearrange(x, f"b c {' '.join(names)} -> b c t h w")
    assert permuted.shape[2:] != x.shape[2:]
    keep = random_keep(2, 24, 9)                                # ids count as the first layer walks
    assert_close(second(permuted), first(x))
    assert_close(second(permuted, keep=keep), first(x, keep=keep))


def test_only_the_layer_that_scans_time_tells_the_order_of_frames(monkeypatch):
    """The others pool time away: shuffled frames come out as they are, shuffled, and the logits stay.
    The embedding of time tells the order, too; a new model has none yet."""
    order = torch.tensor([2, 0, 3, 1])
    pooled = [row for row in ROWS if "t" in row[1].split()]
    assert len(pooled) == 2 and len(ROWS) == 3
    monkeypatch.setitem(fastvim.SCHEDULES, "pooled", pooled)
    for schedule, embedded, blind in [("pooled", False, True), ("pooled", True, False),
                                      ("fastvim_video", False, False)]:
        model = video(schedule=schedule, d_conv=0)
        if not embedded:
            torch.nn.init.zeros_(model.patch_embed.time_embed)
        x = images(model)
        maps, shuffled = (model.forward_intermediates(v, [2])[0] for v in (x, x[:, :, order]))
        change = (model(x[:, :, order]) - model(x)).abs().max()
        moved = (shuffled - maps[:, :, order]).abs().max()
        assert (change < 1e-12) == blind, (schedule, embedded, change)
        assert (moved < 1e-12) == blind, (schedule, embedded, moved)


def test_every_token_reaches_every_other_in_three_layers():
    model = video(d_conv=0, frames=5, img_size=(24, 32))
    x = images(model, 1).requires_grad_()
    model.forward_features(x)[0, 0].square().sum().backward()   # the first frame's corner
    reached = rearrange(x.grad, "1 c t (h p) (w q) -> t h w (c p q)", p=8, q=8).abs().amax(-1)
    assert (reached > 1e-9).all()


# ---- masks, backends, lengths --------------------------------------------------------------------


@pytest.mark.parametrize("fields", [dict(), dict(class_token=True), dict(mask_divisor="count"),
                                    dict(pool="max"), dict(pool="attention")],
                         ids=lambda f: "-".join(map(str, f.values())) or "mean")
def test_everything_kept_is_the_full_clip(fields):
    model = video(img_size=(16, 24), **fields)
    x = images(model)
    full = outputs_and_gradients(model, x)
    assert_close(outputs_and_gradients(model, x, keep=random_keep(2, 24, 24)), full)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("fields", [dict(), dict(class_token=True), dict(pool="max")], ids=str)
def test_kernels_agree_with_plain_pytorch(fields, masked):
    """Tables of rows that keep an outer, an inner axis, and time; a length that is padded."""
    fields = {**fields, "tubelet": 2, "img_size": (32, 24)}
    model = video(torch.float32, **fields)
    x = torch.randn(2, 3, 5, 32, 24)                            # 3 x 4 x 3 tokens
    keep = random_keep(2, 36, 11) if masked else None
    exact = outputs_and_gradients(video(**fields), x.double(), keep=keep)
    for backend in BACKENDS:
        with fastvim.use_backend(backend):
            values = outputs_and_gradients(model, x, keep=keep)
        for name, value in values.items():
            error = (value - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)
            assert error < 1e-4, (backend, name, error)


@pytest.mark.parametrize("frames", [1, 3, 7, 12])
def test_a_clip_of_any_length_is_padded_and_its_times_resized(frames):
    model = video(frames=8, tubelet=2)
    steps = -(-frames // 2)
    fitted = video(frames=2 * steps, tubelet=2)
    time = F.interpolate(model.patch_embed.time_embed.detach(), steps, mode="linear")
    fitted.load_state_dict({**model.state_dict(), "patch_embed.time_embed": time})
    x = torch.randn(2, 3, frames, 32, 32, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, 0, 2 * steps - frames))
    assert_close(model(x), fitted(padded))
    assert model.forward_features(x).shape == (2, steps * 16, 16)


# ---- weights, programs, refusals -----------------------------------------------------------------


def test_checkpoints_of_other_lengths_and_sizes_load(tmp_path):
    model = video(torch.float32, frames=8, tubelet=2)
    checkpoints.export(model, tmp_path / "clip.safetensors")
    same = video(torch.float32, frames=8, tubelet=2)
    torch.nn.init.ones_(same.patch_embed.time_embed)
    assert "time" not in checkpoints.load(same, tmp_path / "clip.safetensors")
    assert same.patch_embed.time_embed.equal(model.patch_embed.time_embed)
    longer = video(torch.float32, frames=16, tubelet=2, img_size=48)
    note = checkpoints.load(longer, tmp_path / "clip.safetensors")
    assert "from 4 x 4 to 6 x 6" in note and "time embeddings resized from 4 to 8" in note
    time = F.interpolate(model.patch_embed.time_embed, 8, mode="linear")
    assert longer.patch_embed.time_embed.equal(time)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight \(16, 3, 2, 8, 8\), in the model"):
        checkpoints.load(video(torch.float32, frames=8), tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="unknown to the model: patch_embed.time_embed"):
        checkpoints.load(tiny(torch.float32), tmp_path / "clip.safetensors")
    model.save_pretrained(tmp_path / "folder")
    x = images(model)
    assert fastvim.FastVim.from_pretrained(tmp_path / "folder")(x).equal(model(x))


def test_exported_programs_take_clips_of_any_length():
    model = video(torch.float32, img_size=(16, 24))
    x = images(model)
    batch = torch.export.Dim("batch", min=1, max=8)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 2: length},)).module()
    for frames in (4, 9):
        x = torch.randn(3, 3, frames, 16, 24)
        assert_close(program(x), model(x), 1e-4, 1e-5)


@pytest.mark.parametrize("call, error, message", [
    (lambda: video()(torch.zeros(1, 3, 32, 32, dtype=torch.float64)), TypeError,
     r"videos must be .* \(B, C, T, H, W\), not torch.float64 of shape \(1, 3, 32, 32\)"),
    (lambda: tiny()(torch.zeros(1, 3, 4, 32, 32)), TypeError, r"images must be .* \(B, C, H, W\)"),
    (lambda: video()(torch.zeros(1, 3, 0, 32, 32)), ValueError, "videos of shape .* no pixels"),
    (lambda: video()(torch.zeros(1, 4, 3, 32, 32)), ValueError, "videos have 4 channels"),
    (lambda: video()(torch.zeros(1, 3, 4, 32, 32, dtype=torch.float64), keep=[[64]]), ValueError,
     "the 64 tokens"),
    (lambda: tiny(frames=8), ValueError, "frames=8 is for videos.*'fastvim' has no axis t"),
    (lambda: tiny(tubelet=2), ValueError, "tubelet=2 is for videos"),
    (lambda: video(frames=3, tubelet=4), ValueError, "frames=3 must be at least one patch"),
    (lambda: video(frames=0), ValueError, "frames=0"),
    (lambda: video(tubelet=2.0), ValueError, "tubelet=2.0")])
def test_what_is_no_video_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
