"""Parity with the released models: inputs, weights, outputs and gradients of the released code.

`PYTHONPATH=. python tests/test_golden.py` prints the parity table; tests/golden/README.md says what the files
hold."""
import json
import math
import pathlib
from unittest import mock

import numpy as np
import pytest
import torch

import checkpoints
import fastvim
import train_mae

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"

# file -> what it overrides, beyond what its meta says of sizes
MODELS = {
    "fastvim_mean": {},
    "fastvim_max": {"pool": "max"},
    "fastvim_scale025": {"pool_scale": 0.25},
    "fastvim_rect_48x80": {},
    "fastvim_norotate": {"schedule": "pool_col"},
    "fastvim_features": {"block_norm": "layernorm", "num_classes": 0},
    "vim_norm_nocls": {"schedule": "vim"},
    "vim_norm_midcls": {"schedule": "vim", "class_token": True},
    "channelvim_channel_first": {"schedule": "channelvim", "class_token": True},
    "fastchannelvim_channel_first": {"schedule": "fastchannelvim"},
    "fastchannelvim_spatial_first_max": {"schedule": "fastchannelvim_spatial", "pool": "max"},
    "fastchannelvim_2d_max": {"schedule": "fastchannelvim_2d", "pool": "max"},
}
AUTOENCODERS = {"fastmaskvim_mae_released": {"schedule": "fastvim"},
                "vim_mae": {"schedule": "vim", "class_token": True}}
SCANS = ["scan_short", "scan_long"]


# ---- reading -------------------------------------------------------------------------------------


def read(name):
    """-> meta, state dict under the released names, the other arrays as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    weights = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    arrays = {key: array for key, array in arrays.items() if not key.startswith("sd/")}
    if "weights" in meta:
        weights = draw_weights(**meta["weights"]) | weights
    if "x" in meta:
        generator = torch.Generator().manual_seed(meta["x"]["seed"])
        arrays["io/x"] = torch.randn(meta["x"]["shape"], generator=generator)
    return meta, weights, arrays


def draw_weights(seed, drawn, noise, sum):
    """The weights that a released model was given, drawn again: first its initialisation, each
    tensor from its place in the generator's stream, then noise on all of them in their order."""
    weights = {}
    stream = torch.Generator().manual_seed(seed)
    position = 0
    for name, (shape, kind, offset, *numbers) in sorted(drawn.items(), key=lambda row: row[1][2]):
        if offset >= 0:
            torch.rand(offset - position, generator=stream)     # what is not among the weights
            position = offset + math.prod(shape)
        weights[name] = draw(kind, torch.empty(shape), stream, *numbers)
    generator = torch.Generator().manual_seed(noise)
    weights = {name: weights[name] + 0.05 * torch.randn(shape, generator=generator)
               for name, (shape, *_) in drawn.items()}
    total = torch.stack([value.double().abs().sum() for value in weights.values()]).sum()
    if abs(total / sum - 1) > 1e-6:
        raise RuntimeError("this torch draws other random numbers than those of tests/golden")
    return weights


def draw(kind, w, generator, scale, divisor=1):
    """Fills a tensor as the released code's initialisation of that kind did, bit for bit."""
    if kind == "constant":
        return w.fill_(scale)
    if kind == "S4D":
        return w.copy_(torch.arange(1.0, w.shape[1] + 1).log())
    if kind == "uniform":
        return w.uniform_(-scale, scale, generator=generator) / divisor
    if kind == "normal":
        return w.normal_(0, scale, generator=generator)
    if kind == "whole normal":
        return w.uniform_(-1, 1, generator=generator).erfinv_() * (scale * math.sqrt(2))
    if kind == "cut normal":
        bound = math.erf(math.sqrt(2))
        return w.uniform_(-bound, bound, generator=generator).erfinv_() * math.sqrt(2) * scale
    assert kind == "dt"
    u = w.uniform_(0, 1, generator=generator)
    dt = torch.exp(u * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    return dt + torch.log(-torch.expm1(-dt))                    # softplus of it is dt


# ---- comparing -----------------------------------------------------------------------------------


def errors(pairs):
    """-> the largest absolute error, and in units of the tolerance 2e-5 + 1e-4 |reference|."""
    return (max((a - b).abs().max().item() for a, b in pairs),
            max(((a - b).abs() / (2e-5 + 1e-4 * b.abs())).max().item() for a, b in pairs))


def gradient_norms(model):
    """-> {released name: norm of the parameter's gradient}"""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.norm().item() for name, g in checkpoints.to_released(gradients).items()}


def load_strictly(model, weights):
    """Loads weights of the released names, all of them and no other, as an export names them."""
    checkpoints.load(model, weights)
    exported = checkpoints.to_released(model.state_dict())
    assert exported.keys() == weights.keys()
    assert all(exported[name].equal(weights[name]) for name in weights)


def build(name):
    meta, weights, io = read(name)
    size = meta["img_size"]
    fields = {"img_size": size, "patch_size": meta.get("patch_size", 16), "depth": meta["depth"],
              "in_chans": meta.get("channels", 3), "embed_dim": meta["embed_dim"],
              "num_classes": 7, "out_indices": meta.get("out_indices")}
    model = fastvim.FastVim(**{**fields, **MODELS[name]}).eval()
    load_strictly(model, weights)
    return model, meta, io


def loss_of(outputs):
    return sum((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum()
               for y in outputs)


def compare(name):
    """-> both errors of outputs and input gradient, and the largest relative error of a parameter's
    gradient norm."""
    model, meta, io = build(name)
    x = io["io/x"].requires_grad_()
    outputs = model.forward_intermediates(x) if model.cfg.out_indices else [model(x)]
    references = [io[key] for key in sorted(io) if key.startswith("io/y")]
    assert len(outputs) == len(references)
    loss_of(outputs).backward()
    absolute, error = errors([*zip(outputs, references), (x.grad, io["io/gx"])])
    norms = gradient_norms(model)
    expected = {k: v for k, v in meta["grad_norms"].items() if v is not None}
    assert set(expected) <= set(norms)
    assert expected
    return absolute, error, max(abs(norms[k] - v) / max(v, 1e-12) for k, v in expected.items())


def compare_scan(name):
    """The same for the selective scan alone: forward, and every gradient."""
    _, _, arrays = read(name)
    inputs = {key[3:]: value.clone().requires_grad_() for key, value in arrays.items()
              if key.startswith("io/") and key not in ("io/y", "io/gy")}
    i = inputs
    s = fastvim.selective_scan(i["u"].mT[None], i["dt"].mT[None], i["A"][None], i["B"].mT[None],
                               i["C"].mT[None], i["D"][None], i["dt_bias"][None])[0].mT
    s.backward(arrays["io/gy"])
    pairs = [(s, arrays["io/y"])] + [(v.grad, arrays[f"grad/{k}"]) for k, v in inputs.items()]
    return *errors(pairs), max(abs(a.norm() / b.norm() - 1).item() for a, b in pairs)


class ReleasedMasking(fastvim.GridWithHoles):
    """The released code's masked backward direction: it pools the reversed tokens, and expands the
    reversed steps, by the row ids of the tokens as they were. That mixes rows."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        cell = self.index["cell"]
        assert not self.index["hole"].any() and not self.class_token
        self.length = cell.new_tensor(math.prod(n for _, n in self.full.sizes)) // self.steps
        step = cell // self.length                              # the pooled axis is the inner one
        self.mixed = (self.steps - 1 - step.flip(1))[..., None]             # (b s 1)

    def pool(self, c, kind, score):
        p = super().pool(c, kind, score)                        # (k b p e)
        sums = torch.zeros_like(p[1]).scatter_add(1, self.mixed.expand(c[1].shape), c[1])
        return torch.stack([p[0], sums * self.full.scale / self.length])

    def expand(self, s):
        index = self.mixed.expand(-1, -1, s.shape[3])
        return torch.stack([super().expand(s)[0], s[1].gather(1, index)])


def compare_autoencoder(name):
    """The same for an autoencoder: loss and prediction; the mask has to be equal."""
    if name.endswith("released"):
        mixing = mock.patch.object(fastvim, "GridWithHoles", ReleasedMasking)
        with mixing, fastvim.use_backend("python"):
            return run_autoencoder(name)
    return run_autoencoder(name)


def run_autoencoder(name):
    meta, weights, io = read(name)
    sizes = ("img_size", "patch_size", "depth", "embed_dim", "decoder_embed_dim")
    fields = {key: meta[key] for key in sizes} | AUTOENCODERS[name]
    model = train_mae.MaskedAutoencoder(**fields)
    for pos in ("pos_embed", "decoder_pos_embed"):              # sines and cosines are ours already
        torch.testing.assert_close(model.get_parameter(pos).data, weights[pos], atol=1e-6, rtol=0)
    load_strictly(model, weights)
    loss, pred, mask = model(io["io/x"], io["io/noise"])
    loss.backward()
    assert mask.equal(io["io/mask"])
    norms = gradient_norms(model)
    expected = meta["grad_norms"]
    assert norms.keys() == expected.keys()
    return *errors([(loss, io["io/loss"]), (pred, io["io/pred"])]), max(
        abs(norms[key] - value) / value for key, value in expected.items())


# ---- tests ---------------------------------------------------------------------------------------


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


def test_weights_are_drawn_as_they_were():
    """fastvim_mean also holds its weights. A logarithm may be rounded otherwise elsewhere."""
    meta, stored, _ = read("fastvim_mean")
    drawn = draw_weights(**meta["weights"])
    assert drawn.keys() == stored.keys()
    for name in stored:
        torch.testing.assert_close(drawn[name], stored[name], atol=1e-6, rtol=1e-6)


if __name__ == "__main__":
    print(f"{'golden file':36} {'max error':>10} {'error / tolerance':>18} "
          f"{'gradient norms, relative':>26}")
    compared = {name: compare for name in MODELS}
    compared |= dict.fromkeys(AUTOENCODERS, compare_autoencoder)
    compared |= dict.fromkeys(SCANS, compare_scan)
    for name, how in compared.items():
        absolute, error, gradient = how(name)
        print(f"{name:36} {absolute:10.1e} {error:18.4f} {gradient:26.1e}")
