"""Parity with the released models: reference inputs, weights, outputs and gradients, produced by the released code.

They are not part of the project (they lie in ../shared/golden); without them these tests skip and say so.
`python tests/test_golden.py` prints the parity table."""
import json
import pathlib

import numpy as np
import pytest
import torch

import fastvim

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden references of ../shared/golden are not here")

# file -> what it overrides, beyond what its meta says of sizes
MODELS = {
    "fastvim_mean": dict(),
    "fastvim_max": dict(pool="max"),
    "fastvim_scale025": dict(pool_scale=0.25),
    "fastvim_rect_48x80": dict(),
    "fastvim_norotate": dict(schedule="pool_col"),
    "fastvim_features": dict(block_norm="layernorm", num_classes=0),
    "vim_norm_nocls": dict(schedule="vim"),
    "vim_norm_midcls": dict(schedule="vim", class_token=True),
    "channelvim_channel_first": dict(schedule="channelvim", class_token=True),
    "fastchannelvim_channel_first": dict(schedule="fastchannelvim"),
    "fastchannelvim_spatial_first_max": dict(schedule="fastchannelvim_spatial", pool="max"),
    "fastchannelvim_2d_max": dict(schedule="fastchannelvim_2d", pool="max"),
}
AUTOENCODERS = {"fastmaskvim_mae_released": dict(schedule="fastvim", released_masking=True),
                "vim_mae": dict(schedule="vim", class_token=True)}
SCANS = ["scan_short", "scan_long"]


def read(name):
    """-> meta, state dict, the other arrays as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k].copy()) for k in file.files if k != "meta"}
        meta = json.loads(str(file["meta"]))
    weights = {k[3:]: v for k, v in arrays.items() if k.startswith("sd/")}
    return meta, weights, {k: v for k, v in arrays.items() if not k.startswith("sd/")}


def build(name):
    meta, weights, io = read(name)
    size = meta["img_size"]
    model = fastvim.FastVim(**{**dict(
        img_size=tuple(size) if isinstance(size, list) else size, patch_size=meta.get("patch_size", 16),
        in_chans=meta.get("channels", 3), depth=meta["depth"], embed_dim=meta["embed_dim"],
        num_classes=7, out_indices=meta.get("out_indices")), **MODELS[name]}).eval()
    model.load_state_dict(weights, strict=True)
    return model, meta, io


def loss_of(outputs):
    return sum((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum() for y in outputs)


def errors(pairs):
    """-> the largest absolute error, and the largest in units of the tolerance 2e-5 + 1e-4 |reference|."""
    return (max((a - b).abs().max().item() for a, b in pairs),
            max(((a - b).abs() / (2e-5 + 1e-4 * b.abs())).max().item() for a, b in pairs))


def compare(name):
    """-> both errors of outputs and input gradient, and the largest relative error of a parameter's gradient norm."""
    model, meta, io = build(name)
    x = io["io/x"].requires_grad_()
    outputs = model.forward_intermediates(x) if model.cfg.out_indices else [model(x)]
    references = [io[k] for k in sorted(io) if k.startswith("io/y")]
    assert len(outputs) == len(references)
    loss_of(outputs).backward()
    absolute, error = errors([*zip(outputs, references), (x.grad, io["io/gx"])])
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    expected = {k: v for k, v in meta["grad_norms"].items() if v is not None}
    assert set(expected) <= set(norms) and expected
    return absolute, error, max(abs(norms[k] - v) / max(v, 1e-12) for k, v in expected.items())


def compare_scan(name):
    """The same for the selective scan alone: forward, and every gradient against the reference's."""
    _, _, arrays = read(name)
    inputs = {k[3:]: v.clone().requires_grad_() for k, v in arrays.items()
              if k[:3] == "io/" and k[3:] not in ("y", "gy")}
    i = inputs
    s = fastvim.selective_scan(i["u"].mT[None], i["dt"].mT[None], i["A"][None], i["B"].mT[None], i["C"].mT[None],
                               i["D"][None], i["dt_bias"][None])[0].mT
    s.backward(arrays["io/gy"])
    pairs = [(s, arrays["io/y"])] + [(v.grad, arrays[f"grad/{k}"]) for k, v in inputs.items()]
    return *errors(pairs), max(abs(a.norm() / b.norm() - 1).item() for a, b in pairs)


def compare_autoencoder(name):
    """The same for an autoencoder: loss and prediction; the mask has to be equal."""
    meta, weights, io = read(name)
    model = fastvim.MaskedAutoencoder(img_size=meta["img_size"], patch_size=meta["patch_size"], depth=meta["depth"],
                                      embed_dim=meta["embed_dim"], decoder_embed_dim=meta["decoder_embed_dim"],
                                      **AUTOENCODERS[name])
    for pos in ("pos_embed", "decoder_pos_embed"):                           # sines and cosines are ours already
        torch.testing.assert_close(model.get_parameter(pos).data, weights[pos], atol=1e-6, rtol=0)
    fastvim.load_checkpoint(model, weights)
    loss, pred, mask = model(io["io/x"], io["io/noise"])
    loss.backward()
    assert mask.equal(io["io/mask"])
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == meta["grad_norms"].keys()
    return *errors([(loss, io["io/loss"]), (pred, io["io/pred"])]), max(
        abs(norms[k] - v) / v for k, v in meta["grad_norms"].items())


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_agrees_with_the_released_one(name):
    _, error, gradient = compare_autoencoder(name)
    assert error <= 1 and gradient <= 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_the_released_one(name):
    _, error, gradient = compare(name)
    assert error <= 1 and gradient <= 1e-3


@pytest.mark.parametrize("name", SCANS)
def test_scan_agrees_with_the_released_one(name):
    _, error, gradient = compare_scan(name)
    assert error <= 1 and gradient <= 1e-3


if __name__ == "__main__":
    print(f"{'golden file':36} {'max error':>10} {'error / tolerance':>18} {'gradient norms, relative':>26}")
    compared = {name: compare for name in MODELS} | dict.fromkeys(AUTOENCODERS, compare_autoencoder)
    for name, how in {**compared, **dict.fromkeys(SCANS, compare_scan)}.items():
        absolute, error, gradient = how(name)
        print(f"{name:36} {absolute:10.1e} {error:18.4f} {gradient:26.1e}")
