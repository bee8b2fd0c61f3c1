"""What timm, torch.hub and the Hugging Face hub do with the models."""
import argparse
import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import timm.data
import timm.loss
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch

import checkpoints
import fastvim
import fastvim_hub
import fastvim_timm  # noqa: F401
import train_mae
from helpers import assert_close, images, random_keep, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = dict(depth=4, embed_dim=16, d_state=4, img_size=32, patch_size=8)
FAMILIES = {
    "fastvim": {},
    "vim": dict(schedule="vim", class_token=True),
    "fastvim with a class token": dict(class_token=True, img_size=(24, 40)),
    "channelvim": dict(schedule="channelvim", class_token=True),
    "fastchannelvim": dict(schedule="fastchannelvim", hcs=False),
    "fastchannelvim with a class token": dict(schedule="fastchannelvim", class_token=True),
}


def run(code, folder, **environment):
    """-> what the code prints, in a Python of its own, which finds the project by environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- The attributes of a backbone ----------------------------------------------------------------

@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_head_reads_the_tokens_as_forward_does(fields):
    model = tiny(**fields)
    x = images(model)
    tokens = model.forward_features(x)
    assert torch.equal(model.forward_head(tokens), model(x))
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.head(pooled), model(x))


@pytest.mark.parametrize("fields", [FAMILIES["fastvim"], FAMILIES["vim"],
                                    FAMILIES["fastvim with a class token"]])
def test_head_reads_masked_tokens_and_padding(fields):
    model = tiny(**fields)
    keep = random_keep(2, 15, 7)
    keep[1, [0, 3]] = -1
    tokens = model.forward_features(images(model), keep=keep)
    assert torch.equal(model.forward_head(tokens, keep=keep), model(images(model), keep=keep))


def test_head_reads_images_of_any_size_or_says_why_not():
    for fields in ({}, FAMILIES["vim"], FAMILIES["fastchannelvim"]):
        model = tiny(**fields)
        x = images(model, size=(24, 56))
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    model = tiny(class_token=True)
    tokens = model.forward_features(images(model, size=(24, 56)))
    with pytest.raises(ValueError, match="among the 17 tokens of an image of .* not among 22"):
        model.forward_head(tokens)
    with pytest.raises(ValueError, match=r"are not the \(b s 16\)"):
        model.forward_head(torch.ones(2, 16))


def test_what_a_backbone_says_of_itself():
    model = tiny(in_chans=2, class_token=True)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 16
    assert (model.num_classes, model.in_chans, model.global_pool) == (5, 2, "token")
    assert model.get_classifier() is model.head
    assert tiny().global_pool == "avg"
    assert len(model.feature_info) == 3
    assert model.feature_info[1] == {"num_chs": 16, "reduction": 8, "module": "layers.1"}
    model.get_submodule(model.feature_info[1]["module"])
    assert tiny().pretrained_cfg == tiny().default_cfg == {
        "input_size": (3, 32, 32), "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD, "interpolation": "bicubic", "crop_pct": 0.875,
        "num_classes": 5, "first_conv": "patch_embed.proj", "classifier": "head"}
    assert model.default_cfg["input_size"] == (2, 32, 32)
    assert len(model.default_cfg["mean"]) == len(model.default_cfg["std"]) == 2
    model.default_cfg = {"num_classes": 3}
    assert model.default_cfg == {"num_classes": 3}
    model.set_grad_checkpointing()
    assert model.grad_checkpointing is True
    model.set_grad_checkpointing(enable=False)
    assert model.grad_checkpointing is False


def test_preprocessing_is_that_of_train_imagenet():
    import classification
    import data
    steps = data.image_transform(224, False).transforms
    normalize = steps[-1]
    assert tuple(normalize.mean.tolist()) == pytest.approx(fastvim_hub.MEAN)
    assert tuple(normalize.std.tolist()) == pytest.approx(fastvim_hub.STD)
    assert fastvim_hub.CROP_PCT == classification.CROP_PCT


def test_reset_classifier():
    model = tiny()
    old = model(images(model))
    model.reset_classifier(7)
    assert model.num_classes == model.cfg.num_classes == model.head.out_features == 7
    assert model.head.weight.dtype == torch.float64
    assert 0.01 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()
    assert model(images(model)).shape == (2, 7)
    model.reset_classifier(0, "avg")
    assert torch.equal(model(images(model)),
                       model.forward_head(model.forward_features(images(model)), True))
    with pytest.raises(ValueError, match="global_pool='max': the head of this model is given its"):
        model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="num_classes=-1 must be"):
        model.reset_classifier(-1)
    assert old.shape == (2, 5)


def test_a_model_without_head_has_none_of_this():
    model = tiny(out_indices=(0, 2))
    for call in (model.get_classifier, lambda: model.reset_classifier(3),
                 lambda: model.forward_head(torch.ones(1, 16, 16, dtype=torch.float64))):
        with pytest.raises(ValueError, match="no final norm or head"):
            call()


@pytest.mark.parametrize("fields", [{}, FAMILIES["channelvim"],
                                    dict(class_token=True, pool="attention")])
def test_weight_decay_and_layers_are_those_of_fine_tuning(fields):
    model = tiny(**fields)
    names = {id(p): name for name, p in model.named_parameters()}
    for decay in ({}, {"layer_decay": 0.5}):
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1,
                                                   **decay)
        seen = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                exempt = train_mae.no_decay(name, parameter)
                assert group["weight_decay"] == (0.0 if exempt else 0.1), name
                if decay:
                    share = train_mae.layer_scale(name, 3, 0.5, blocks=1)
                    assert group["lr_scale"] == share, name
                seen += 1
        assert seen == len(names)
    assert model.no_weight_decay() <= set(names.values())


# ---- timm ----------------------------------------------------------------------------------------

def test_timm_makes_every_model():
    assert {name for name in fastvim.list_models() if timm.is_model(name)} == set(
        fastvim.list_models())
    assert timm.list_models("fastvim*") == sorted(
        f"{family}_{size}" for family in ("fastvim", "fastvim_video") for size in fastvim.SIZES)
    for name in fastvim.list_models():
        fields = {**SMALL, "num_classes": 3}
        made = timm.create_model(name, **fields)
        assert type(made) is fastvim.FastVim
        assert made.cfg == fastvim.create_model(name, **fields).cfg
        settings = timm.data.resolve_model_data_config(made)
        assert settings["input_size"] == (made.in_chans, 32, 32)
        assert len(settings["mean"]) in (1, made.in_chans)


def test_timm_passes_its_options():
    model = timm.create_model("fastvim_tiny", in_chans=1, drop_path_rate=0.1, drop_rate=0.0,
                              global_pool="avg", bn_eps=None, **{**SMALL, "img_size": (32, 48)})
    assert (model.cfg.in_chans, model.cfg.drop_path_rate) == (1, 0.1)
    assert model.cfg.img_size == (32, 48)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 32, 48)
    overlay = {"mean": (0.5, 0.5, 0.5), "input_size": (3, 64, 64)}
    model = timm.create_model("fastvim_tiny", pretrained_cfg_overlay=overlay, **SMALL)
    settings = timm.data.resolve_model_data_config(model)
    assert (settings["mean"], settings["input_size"]) == ((0.5, 0.5, 0.5), (3, 64, 64))


@pytest.mark.parametrize("options, message", [
    (dict(pretrained=True), "no weights come with this project; download"),
    (dict(drop_rate=0.1), "drop_rate=0.1: there is no dropout"),
    (dict(global_pool="token"), "global_pool='token': the head"),
    (dict(drop_block_rate=0.1), "unknown option drop_block_rate"),
    (dict(features_only=True, feature_cls="hook"), "has a class of its own"),
    (dict(features_only=True, out_indices=(1, 4)), "different blocks between 0 and 3"),
    (dict(features_only=True, output_fmt="NHWC"), "unknown option output_fmt"),
])
def test_timm_is_told_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("fastvim_tiny", **SMALL, **options)


@pytest.mark.parametrize("name", ["fastvim_tiny", "vim_tiny"])
def test_features_only(name):
    features = timm.create_model(name, features_only=True, out_indices=(-2, 0), **SMALL)
    assert features.feature_info.channels() == [16, 16]
    assert features.feature_info.reduction() == [8, 8]
    assert features.feature_info.module_name() == ["layers.2", "layers.0"]
    model = fastvim.create_model(name, **SMALL)
    inner = features.model.state_dict()
    model.load_state_dict(inner, strict=False)
    x = torch.randn(2, 3, 32, 40)
    maps = features(x)
    assert [m.shape for m in maps] == [(2, 16, 4, 5)] * 2
    for actual, expected in zip(maps, model.forward_intermediates(x, (2, 0))):
        assert torch.equal(actual, expected)
    assert not [k for k in inner if k.startswith(("layers.3.", "norm_f", "head"))]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in features.parameters())           # as DDP needs it
    features.set_grad_checkpointing()
    assert features.model.grad_checkpointing


def test_features_only_chooses_blocks_as_timm_does():
    def blocks(**options):
        return timm.create_model("fastvim_tiny", features_only=True, **options).out_indices
    assert blocks(**{**SMALL, "depth": 24}) == [5, 11, 17, 23]
    assert blocks(**{**SMALL, "depth": 2}) == [0, 1]
    assert blocks(out_indices=2, **SMALL) == [2, 3]
    with pytest.raises(ValueError, match="for each channel"):
        timm.create_model("channelvim_tiny", features_only=True, **SMALL)


def test_timm_loads_files(tmp_path):
    source = fastvim.create_model("fastvim_tiny", **SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.save(source.state_dict(), tmp_path / "ours.pth")
    checkpoints.export(source, tmp_path / "released.safetensors")
    for file in ("ours.pth", "released.safetensors"):
        path = str(tmp_path / file)
        overlay = {"file": path}
        by_path = timm.create_model("fastvim_tiny", checkpoint_path=path, **SMALL)
        by_cfg = timm.create_model("fastvim_tiny", pretrained=True, pretrained_cfg_overlay=overlay,
                                   **SMALL)
        for model in (by_path, by_cfg):
            assert torch.equal(model.eval()(x), source(x))
        other = timm.create_model("fastvim_tiny", pretrained=True, num_classes=7,
                                  pretrained_cfg_overlay=overlay, **SMALL).eval()
        assert torch.equal(other.forward_features(x), source.forward_features(x))
        assert other(x).shape == (2, 7)
        features = timm.create_model("fastvim_tiny", pretrained=True, features_only=True,
                                     pretrained_cfg_overlay=overlay, **SMALL).eval()
        assert torch.equal(features(x)[3], source.forward_intermediates(x, (3,))[0])
        with pytest.raises(ValueError, match="belongs to another model"):
            timm.create_model("fastvim_tiny", pretrained=True, pretrained_cfg_overlay=overlay,
                              **{**SMALL, "depth": 3})
    source.reset_classifier(7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    overlay = {"file": str(tmp_path / "seven.pth")}
    same = timm.create_model("fastvim_tiny", pretrained=True, num_classes=7,
                             pretrained_cfg_overlay=overlay, **SMALL).eval()
    assert torch.equal(same.head.weight, source.head.weight)
    with pytest.raises(ValueError, match="of another shape: head"):
        timm.create_model("fastvim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)


def test_timm_saves_for_its_hub_and_reads_it(tmp_path):
    fields = {**SMALL, "img_size": (32, 48)}
    model = timm.create_model("vim_tiny", num_classes=3, **fields).eval()
    timm.models._hub.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="timm.create_model reads timm's"):
        fastvim.FastVim.from_pretrained(tmp_path)


def test_the_loop_of_timm_trains_saves_and_resumes(tmp_path):
    """The calls of timm's train.py, in its order, on random images; then again from its file."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 32, 32)
    labels = torch.arange(8) % 4
    args = argparse.Namespace(model="fastvim_tiny", opt="adamw", lr=5e-3, weight_decay=0.05,
                              momentum=0.9, layer_decay=0.9, sched="cosine", epochs=6,
                              warmup_epochs=1, warmup_lr=1e-5, min_lr=0.0, decay_rate=0.1,
                              cooldown_epochs=0, patience_epochs=0)

    def set_up(seed):
        torch.manual_seed(seed)
        model = timm.create_model(args.model, num_classes=4, drop_path_rate=0.1, **SMALL)
        assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 32, 32)
        model.set_grad_checkpointing(enable=True)
        optimizer = timm.optim.create_optimizer_v2(
            model, **timm.optim.optimizer_kwargs(cfg=args))
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer, **timm.scheduler.scheduler_kwargs(args), updates_per_epoch=2)
        return model, optimizer, schedule, timm.utils.ModelEmaV3(model, decay=0.5)

    mixup = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, num_classes=4)
    loss_of = timm.loss.SoftTargetCrossEntropy()

    def train(model, optimizer, schedule, ema, epochs):
        model.train()
        losses = []
        for epoch in epochs:
            torch.manual_seed(epoch)
            np.random.seed(epoch)                           # mixup's
            for _ in range(2):
                mixed, soft = mixup(inputs.clone(), labels)
                loss = loss_of(model(mixed), soft)
                optimizer.zero_grad()
                loss.backward()
                timm.utils.dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
                optimizer.step()
                ema.update(model)
                losses.append(loss.item())
            schedule.step(epoch + 1)
        return losses

    model, optimizer, schedule, ema = set_up(0)
    started = copy.deepcopy(model.state_dict())
    train(model, optimizer, schedule, ema, range(3))
    saver = timm.utils.CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(2, metric=1.0)
    straight = train(model, optimizer, schedule, ema, range(3, 6))
    assert all(not torch.equal(v, started[k]) for k, v in model.state_dict().items())

    file = str(tmp_path / "last.pth.tar")
    again, optimizer, schedule, ema_again = set_up(1)
    epoch = timm.models.resume_checkpoint(again, file, optimizer)
    timm.models.load_checkpoint(ema_again.module, file, use_ema=True)
    schedule.step(epoch)
    assert epoch == 3
    assert train(again, optimizer, schedule, ema_again, range(epoch, 6)) == straight
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    ours = fastvim.create_model("fastvim_tiny", num_classes=4, **SMALL)
    fastvim.load_checkpoint(ours, file)                     # the EMA's weights, of then
    stored = torch.load(file, weights_only=False)["state_dict_ema"]
    assert_close(ours.state_dict(), stored, rtol=0, atol=0)

    timm.utils.freeze(model, "layers.0")
    timm.utils.freeze(model, "patch_embed")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in started if name.startswith(("layers.0.", "patch_embed."))}


def test_fastvim_registers_itself_where_timm_is(tmp_path):
    """And takes neither timm nor the hub along where they are not."""
    code = """
import sys, fastvim
fastvim.create_model("fastvim_tiny", depth=1).num_features
print({"timm", "huggingface_hub", "safetensors", "requests", "httpx"} & set(sys.modules))
import timm
print(len(timm.list_models("*fastvim*")))
del sys.modules["fastvim"]
import fastvim
print(len(timm.list_models("*fastvim*")), timm.create_model("vim_tiny", depth=1).num_classes)
import warnings
warnings.simplefilter("error")                              # timm's, if a name came twice
import fastvim_timm
"""
    assert run(code, tmp_path, PYTHONPATH=str(ROOT)) == "set()\n0\n10 1000\n"


def test_an_old_timm_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", argparse.Namespace(models=argparse.Namespace()))
    fastvim_hub.register(["fastvim_tiny"], fastvim.create_model)
    monkeypatch.setitem(sys.modules, "timm", None)
    fastvim_hub.register(["fastvim_tiny"], fastvim.create_model)


# ---- torch.hub -----------------------------------------------------------------------------------

def test_torch_hub_finds_the_models(tmp_path):
    source = fastvim.create_model("vim_tiny", **SMALL)
    torch.save(source.state_dict(), tmp_path / "vim.pth")
    code = f"""
import torch
torch.manual_seed(0)
torch.hub._get_cache_or_reload = lambda *_, **__: {str(ROOT)!r}     # these two ask GitHub
print(*torch.hub.list("me/fastvim"))
print(torch.hub.help("me/fastvim", "vim_tiny"))
fields = {SMALL!r}
model = torch.hub.load({str(ROOT)!r}, "vim_tiny", source="local", checkpoint="vim.pth", **fields)
print(model.head.weight.double().sum().item())
print(tuple(model(torch.ones(1, 3, 32, 32)).shape))
try:
    torch.hub.load({str(ROOT)!r}, "vim_tiny", source="local", pretrained=True)
except ValueError as error:
    print(error)
"""
    said = run(code, tmp_path, PYTHONPATH="", TORCH_HOME=str(tmp_path)).splitlines()
    assert sorted(said[0].split()) == sorted(fastvim.list_models())
    assert "with any field of fastvim.Config overridden" in said[1]
    assert str(source.head.weight.double().sum().item()) in said
    assert "(1, 1000)" in said
    assert said[-1] == fastvim_hub.NO_WEIGHTS


# ---- The Hugging Face hub ------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [
    dict(img_size=(24, 40), class_token=True),
    dict(out_indices=(0, 2), ssm_norm=None),
    dict(schedule="fastchannelvim_2d", pool="max", num_classes=0),
])
def test_a_folder_gives_the_model_again(tmp_path, fields):
    model = tiny(torch.float32, **fields)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = fastvim.FastVim.from_pretrained(tmp_path / "new" / "folder")
    assert again.cfg == model.cfg
    assert not again.training
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    saved = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert saved.keys() == {field.name for field in dataclasses.fields(fastvim.Config)}


def test_a_folder_is_read_strictly(tmp_path):
    model = tiny(torch.float32)
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    load = fastvim.FastVim.from_pretrained
    assert load(tmp_path).num_classes == 7
    assert load(tmp_path, img_size=48, drop_path_rate=0.1).grid_size == (6, 6)
    with pytest.raises(ValueError, match="of another shape: head"):
        load(tmp_path, num_classes=5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": 2}))
    with pytest.raises(ValueError, match="unknown option depths"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not hold the fields of a model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor, as user/name"):
        load(tmp_path / "nothing")


def test_a_model_that_its_fields_do_not_make_is_not_saved(tmp_path):
    model = tiny()
    model.head = torch.nn.Linear(16, 9)
    with pytest.raises(ValueError, match="head.bias, head.weight changed since the model was made"):
        model.save_pretrained(tmp_path)
    autoencoder = train_mae.MaskedAutoencoder(**{**SMALL, "depth": 1})
    with pytest.raises(ValueError, match="a MaskedAutoencoder is also made from"):
        autoencoder.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    """user/name, by huggingface_hub with all its options; and pushed there."""
    model = tiny(torch.float32)
    store = tmp_path / "store"
    asked = []

    class Api:
        def __init__(self, token=None):
            asked.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            asked.append((repo_id, private, exist_ok))
            return argparse.Namespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            asked.append((repo_id, options["commit_message"]))
            os.rename(folder_path, store)
            os.mkdir(folder_path)
            return "commit"

    def fetch(name, allow_patterns, **options):
        asked.append((name, allow_patterns, options["revision"], options["token"]))
        return str(store)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model.push_to_hub("mine", token="secret", private=True) == "commit"
    again = fastvim.FastVim.from_pretrained("me/mine", revision="v1", token="secret")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert asked == ["secret", ("mine", True, True), ("me/mine", "Add model"),
                     ("me/mine", ["config.json", "model.safetensors"], "v1", "secret")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        fastvim.FastVim.from_pretrained("me/mine")
