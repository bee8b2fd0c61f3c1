"""What a user can get wrong is refused before anything is computed, by a message that names it and
the choices."""

import pytest
import torch

import fastvim
from helpers import images, tiny

CASES = []  # (id, function, exception, what the message must say)


def refused(name, call, *says, error=(ValueError, TypeError)):
    CASES.append(pytest.param(call, says, error, id=name))


def keep(ids, **fields):
    def call():
        model = tiny(**fields)  # 16 tokens, 48 of three channels
        return model(images(model), keep=ids)

    return call


def image(x, channels=None, **fields):
    return lambda: tiny(torch.float32, **fields)(x, channels=channels)


# ---- models and options

for name in (
    "fastvim",
    "resnet_tiny",
    "fastvim_giant",
    "tiny",
    "",
    None,
    "fastvim_tiny_patch16",
    "FASTVIM_TINY",
):
    refused(
        f"model {name}",
        lambda name=name: fastvim.create_model(name),
        repr(name),
        *fastvim.FAMILIES,
        *fastvim.SIZES,
    )
refused(
    "option", lambda: fastvim.create_model("fastvim_tiny", dept=3), "dept", "depth", "embed_dim"
)
refused("two options", lambda: fastvim.FastVim(foo=1, bar=2), "foo", "bar", "schedule")
for field, choices in dict(
    schedule=fastvim.SCHEDULES,
    block_norm=fastvim.NORMS,
    ssm_norm=["None", *fastvim.NORMS],
    pool=fastvim.POOLS,
    mask_divisor=["axis", "count"],
).items():
    for value in ("nonsense", 1, ["mean"], *([] if field == "ssm_norm" else [None])):
        refused(
            f"{field}={value}",
            lambda field=field, value=value: tiny(**{field: value}),
            field,
            str(value),
            *choices,
        )
for field, least in dict(
    patch_size=1,
    in_chans=1,
    num_classes=0,
    embed_dim=1,
    depth=1,
    d_state=1,
    d_conv=0,
    expand=1,
    dt_rank=1,
).items():
    for value in (least - 1, -3, 2.5, 2.0, "3", True, *([] if field == "dt_rank" else [None])):
        refused(
            f"{field}={value!r}",
            lambda field=field, value=value: tiny(**{field: value}),
            field,
            str(value),
        )
for value in (
    7,
    (32, 7),
    0,
    -32,
    32.5,
    (32, 32.0),
    "32",
    None,
    (32,),
    (32, 32, 32),
    True,
    ("32", "32"),
):
    refused(f"img_size={value!r}", lambda value=value: tiny(img_size=value), "img_size", str(value))
for value in (-0.1, 1, 1.5, float("nan"), "0.1", None):
    refused(
        f"drop_path_rate={value!r}",
        lambda value=value: tiny(drop_path_rate=value),
        "drop_path_rate",
        str(value),
    )
for value in (float("nan"), float("inf"), 0, -1.0, "0.5", None):
    refused(
        f"pool_scale={value!r}",
        lambda value=value: tiny(pool_scale=value),
        "pool_scale",
        str(value),
    )
for fields in (
    dict(pool="max"),
    dict(pool="attention"),
    dict(schedule="vim"),
    dict(schedule="channelvim"),
):
    refused(
        f"pool_scale of {fields}",
        lambda fields=fields: tiny(pool_scale=0.5, **fields),
        "pool_scale",
        "mean",
        *fields.values(),
    )
for fields in (
    dict(schedule="vim", pool="max"),
    dict(schedule="channelvim_spatial", pool="attention"),
):
    refused(
        f"pooling in {fields}",
        lambda fields=fields: tiny(**fields),
        *fields.values(),
        "nothing to pool",
    )
for value in ((), (3,), (-1,), (0, 99), ("a",), (0.5,), (0, 0), 2):
    refused(
        f"out_indices={value!r}",
        lambda value=value: tiny(out_indices=value),
        "out_indices",
        str(value),
    )
refused("Config", lambda: fastvim.Config(schedule="h w"), "schedule", "'h w'", "pool_col")

# ---- images

for name, x in dict(
    integers=torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    complex=torch.zeros(1, 3, 32, 32) * 1j,
    unbatched=torch.zeros(3, 32, 32),
    video=torch.zeros(1, 3, 2, 32, 32),
).items():
    refused(
        f"image {name}",
        image(x),
        "(B, C, H, W)",
        str(x.dtype),
        str(tuple(x.shape)),
        error=TypeError,
    )
refused("image numpy", image(torch.zeros(1, 3, 32, 32).numpy()), "tensor", error=TypeError)
refused("image None", image(None), "tensor", error=TypeError)
for shape in ((1, 3, 0, 32), (1, 3, 32, 0)):
    refused(f"image {shape}", image(torch.zeros(shape)), str(shape), "pixels")
refused("image channels last", image(torch.zeros(1, 32, 32, 3)), "32 channels", "in_chans=3")
refused("image grey", image(torch.zeros(1, 1, 32, 32)), "1 channels", "in_chans=3")
refused("channels of RGB", image(torch.zeros(1, 3, 32, 32), [0, 1, 2]), "channels", "per-channel")
for channels, says in [
    (None, "channels="),
    ([0], "each"),
    ([1, 1], "another id"),
    ([0, 4], "between 0 and 3"),
    ([-1, 0], "between 0 and 3"),
    ([0.0, 1.0], "id"),
    (1, "channels=1"),
    ([], "channels=[]"),
    ([[0, 1]], "channels"),
    ([True, False], "channels"),
]:
    refused(
        f"channels={channels!r}",
        image(torch.zeros(1, 2, 32, 32), channels, schedule="fastchannelvim", in_chans=4),
        says,
    )

# ---- kept tokens

for name, ids, says in [
    ("twice", [[0, 1, 1], [0, 1, 2]], "at most once"),
    ("just beyond", [[0, 16], [1, 2]], "0 to 15"),
    ("far beyond", [[0, 1], [99, 2]], "0 to 15"),
    ("floats", [[0.0, 1.0], [2.0, 3.0]], "float32"),
    ("one image of two", [[0, 1]], "B=2"),
    ("three images of two", [[0], [1], [2]], "(3, 1)"),
    ("flat", [0, 1], "(2,)"),
    ("3-d", [[[0]], [[1]]], "(2, 1, 1)"),
    ("nothing", [[], []], "(2, 0)"),
    ("only padding", [[-1, -1], [0, 1]], "padding"),
    ("minus seven", [[0, -7], [0, 1]], "-1"),
    ("a mask", [[True, False], [False, True]], "bool"),
    ("a mask of every token", [[True] * 16, [False] * 16], "bool"),
    ("of unequal length", [[0, 1], [2]], "-1"),
]:
    refused(f"keep {name}", keep(ids), says, "keep")
refused("keep beyond all channels", keep([[0], [48]], schedule="fastchannelvim"), "0 to 47")

# ---- dense features

for indices in ((), (3,), (-1,), (0, 99), None, 1, ("a",), (0.5,)):
    refused(
        f"indices={indices!r}",
        lambda indices=indices: tiny().forward_intermediates(images(tiny()), indices),
        "indices",
        "0 and 2",
    )
refused(
    "other indices",
    lambda: tiny(out_indices=(0, 2)).forward_intermediates(images(tiny()), (0, 1)),
    "(0, 1)",
    "(0, 2)",
)
for method in ("forward", "forward_features"):
    refused(
        f"{method} of a dense model",
        lambda method=method: getattr(tiny(out_indices=(0,)), method)(images(tiny())),
        "out_indices",
        "forward_intermediates",
    )


@pytest.mark.parametrize("call, says, error", CASES)
def test_refused(call, says, error):
    with pytest.raises(error) as caught:
        call()
    for word in says:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 600


def test_backends(monkeypatch):
    with (
        pytest.raises(ValueError, match="use_backend.*'abacus'.*choose from.*python"),
        fastvim.use_backend("abacus"),
    ):
        pass
    assert not getattr(fastvim._asked, "name", None)  # and it is not in force afterwards
    monkeypatch.setenv("FASTVIM_BACKEND", "abacus")
    with pytest.raises(ValueError, match="FASTVIM_BACKEND.*'abacus'.*choose from.*python"):
        tiny()(images(tiny()))


def test_a_refused_call_leaves_the_model_as_it_was():
    model = tiny()
    before = model(images(model))
    for bad in (dict(keep=torch.tensor([[0, 0], [1, 2]])), dict(channels=[0, 1, 2])):
        with pytest.raises(ValueError):
            model(images(model), **bad)
    assert model(images(model)).equal(before)


def test_what_looks_odd_and_is_right():
    """Lists for tensors, 32-bit ids, empty batches, one pixel, one token, long images of a row."""
    model = tiny(torch.float32)
    x = images(model)
    assert model(x, keep=[[0, 1], [2, -1]]).equal(
        model(x, keep=torch.tensor([[0, 1], [2, -1]], dtype=torch.int32))
    )
    assert model(x[:0]).shape == (0, 5) and model(x[:, :, :1, :1]).shape == (2, 5)
    assert model(torch.zeros(1, 3, 8, 800)).isfinite().all()
    assert model(x, keep=[[3], [15]]).isfinite().all()
    assert fastvim.FastVim(img_size=[32, 48], embed_dim=8, depth=1).grid_size == (2, 3)
    assert fastvim.Config(img_size=[32, 48]).img_size == (32, 48)
    assert fastvim.create_model(
        "fastvim_tiny", depth=1, embed_dim=8, drop_path_rate=0
    ).drop_path_rates == [0.0, 0.0]
