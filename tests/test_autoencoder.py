"""The masked autoencoder, and the way of its encoder into a classifier: against loops written by hand."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import fastvim
import train_mae
import training
from helpers import assert_close, tiny

VIM = dict(schedule="vim", class_token=True)


def mae(dtype=torch.float64, **fields):
    """A seeded autoencoder of 4 x 4 patches, every trainable parameter random."""
    torch.manual_seed(0)
    fields = {**dict(img_size=32, patch_size=8, embed_dim=16, depth=3, d_state=4, decoder_embed_dim=12), **fields}
    model = train_mae.MaskedAutoencoder(**fields)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def batch(model, n=2, size=(32, 32), seed=1):
    """-> images, noise"""
    generator, p = torch.Generator().manual_seed(seed), model.cfg.patch_size
    x = torch.randn(n, 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.rand(n, (size[0] // p) * (size[1] // p), generator=generator)
    return x.to(model.pos_embed.dtype), noise


def loss_and_gradients(model, x, noise):
    out = model(x, noise)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return {"loss": out.loss.detach(), "pred": out.pred.detach(),
            **dict(zip(parameters, torch.autograd.grad(out.loss, parameters.values())))}


# ---- masking, target, loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [dict(), dict(mask_ratio=0.5), VIM])
def test_loss_and_mask_against_loops(fields):
    model = mae(**fields)
    x, noise = batch(model, 3)
    loss, pred, mask = model(x, noise)
    kept = int(16 * (1 - fields.get("mask_ratio", 0.75)))
    total, count = 0.0, 0
    for b in range(3):
        for i in range(16):
            rank = sum(bool(noise[b, j] < noise[b, i]) for j in range(16))
            assert mask[b, i] == float(rank >= kept)
            top, left = 8 * (i // 4), 8 * (i % 4)
            pixels = [x[b, c, top + r, left + k].item() for r in range(8) for k in range(8) for c in range(3)]
            mean = sum(pixels) / 192
            std = math.sqrt(sum((v - mean) ** 2 for v in pixels) / 191 + 1e-6)
            pixels = [(v - mean) / std for v in pixels]
            if mask[b, i]:
                total += sum((a - b) ** 2 for a, b in zip(pred[b, i].tolist(), pixels)) / 192
                count += 1
    assert count == 3 * (16 - kept) and abs(loss.item() - total / count) < 1e-9


@pytest.mark.parametrize("fields", [dict(), VIM])
def test_the_prediction_depends_on_the_kept_patches_only(fields):
    model = mae(**fields)
    x, noise = batch(model, 1)
    _, pred, mask = model(x, noise)
    for i in range(16):
        other = model.patchify(x)
        other[0, i] += 1 + torch.arange(192)
        changed = not model(model.unpatchify(other, 4), noise).pred.equal(pred)
        assert changed == (mask[0, i] == 0)


def test_each_kept_patch_meets_its_own_place_in_encoder_and_decoder():
    """The decoder written out: token of patch i, or the mask token, plus position i; then the blocks."""
    for fields in (dict(), VIM):
        model = mae(**fields)
        torch.nn.init.normal_(model.decoder_pos_embed)          # the class token's row would be zero
        x, noise = batch(model)
        keep = torch.stack([row.argsort()[:4].sort().values for row in noise])
        tokens = F.linear(model.forward_features(x, keep=keep), model.decoder_embed.weight, model.decoder_embed.bias)
        sequence = []
        for b in range(2):
            own = {i.item(): t for i, t in zip(keep[b], tokens[b][[0, 1, 3, 4]] if fields else tokens[b])}
            rows = model.decoder_pos_embed[0][1:] if fields else model.decoder_pos_embed[0]
            line = [own.get(i, model.mask_token[0, 0]) + rows[i] for i in range(16)]
            sequence.append(torch.stack(line + ([tokens[b][2] + model.decoder_pos_embed[0, 0]] if fields else [])))
        hidden, residual = torch.stack(sequence), None
        grid, backend = fastvim.Grid(sizes=(("l", hidden.shape[1]),)), fastvim.BACKENDS["python"]
        for block in model.decoder_blocks:
            hidden, residual = block(hidden, residual, grid, backend)
        u, _ = fastvim.add_norm(hidden, residual, model.decoder_norm)
        assert_close(model(x, noise).pred, model.decoder_pred(u)[:, :16])


def test_random_masking_differs_by_image_and_call_and_follows_the_generator():
    model = mae()
    x, _ = batch(model, 4)
    torch.manual_seed(5)
    first, second = model(x).mask, model(x).mask
    torch.manual_seed(5)
    assert model(x).mask.equal(first) and not first.equal(second) and len(first.unique(dim=0)) > 1
    assert first.sum(1).tolist() == [12] * 4


def test_patches_are_cut_by_row_column_channel():
    model = mae()
    x, _ = batch(model, size=(32, 48))
    patches = model.patchify(x)
    assert patches.shape == (2, 24, 192)
    assert patches[1, 6 + 2, (3 * 8 + 5) * 3 + 1] == x[1, 1, 8 + 3, 16 + 5]      # patch (1, 2), pixel (3, 5), channel 1
    assert model.unpatchify(patches, 4).equal(x)


def test_position_embeddings_are_fixed_sines_and_cosines():
    model = mae(embed_dim=16, **VIM)
    pos = model.pos_embed[0]
    assert not pos[0].any() and not model.decoder_pos_embed[0, 0].any()           # the class token's
    for i in range(16):
        row, column = divmod(i, 4)
        expected = [f(at / 10_000 ** (k / 4)) for at in (column, row) for f in (math.sin, math.cos) for k in range(4)]
        assert (pos[1 + i] - torch.tensor(expected)).abs().max() < 1e-6
    grouped = {id(p) for group in training.parameter_groups(model, 0.05) for p in group["params"]}
    assert id(model.pos_embed) not in grouped and id(model.decoder_pos_embed) not in grouped
    assert id(model.mask_token) in grouped
    x, noise = batch(model)
    model(x, noise).loss.backward()
    assert {k for k, p in model.named_parameters() if p.grad is None} == {"pos_embed", "decoder_pos_embed"}


def test_initialisation():
    torch.manual_seed(0)
    fields = {**fastvim.model_fields("fastmaskvim_tiny"), "depth": 6}
    model = train_mae.MaskedAutoencoder(decoder_embed_dim=256, **fields)
    weight = model.patch_embed.proj.weight
    limit = math.sqrt(6 / (192 + 768))                                            # Xavier, uniform
    assert 0.99 * limit < weight.abs().max() <= limit and abs(weight.std() / (limit / 3 ** 0.5) - 1) < 0.01
    assert 0.01 < model.mask_token.std() < 0.03
    for block, width in ((model.layers[0], 192), (model.decoder_blocks[1], 256)):
        bound = (2 * width) ** -0.5 / 6 ** 0.5                   # Kaiming (a = sqrt 5) / sqrt(the encoder's depth)
        assert 0.98 * bound < block.mixer.out_proj.weight.abs().max() <= bound
    assert not model.decoder_pred.bias.any() and not model.decoder_embed.bias.any()


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [dict(), dict(mask_divisor="count"), VIM])
def test_gradients_against_finite_differences(fields):
    model = mae(depth=2, **fields)
    x, noise = batch(model)
    gradients = loss_and_gradients(model, x, noise)
    generator = torch.Generator().manual_seed(3)
    for name in ("patch_embed.proj.weight", "layers.1.mixer.in_proj.weight", "mask_token", "decoder_embed.weight",
                 "decoder_blocks.0.mixer.A_log", "decoder_pred.weight"):
        p = model.get_parameter(name)
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                p += step * direction
                values.append(model(x, noise).loss)
            p += 1e-5 * direction
        slope = ((values[0] - values[1]) / 2e-5).item()
        assert abs((gradients[name] * direction).sum().item() - slope) < 1e-6 * max(1, abs(slope)), name


@pytest.mark.parametrize("fields", [dict(), dict(mask_divisor="count"), VIM])
@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"])
def test_compiled_backends_agree_with_python(backend, fields):
    if problem := fastvim.BACKENDS[backend].problem():
        pytest.skip(f"{backend}: {problem}")
    model = mae(torch.float32, **fields)
    x, noise = batch(model, 3)
    with fastvim.use_backend("python"):
        expected = loss_and_gradients(model.double(), x.double(), noise)
    with fastvim.use_backend(backend):
        actual = loss_and_gradients(model.float(), x, noise)
    assert_close(actual, {k: v.float() for k, v in expected.items()}, rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    calls, checkpoint = [], fastvim.checkpoint
    monkeypatch.setattr(fastvim, "checkpoint", lambda *a, **kw: calls.append(1) or checkpoint(*a, **kw))
    model = mae().train()
    x, noise = batch(model)
    expected = loss_and_gradients(model, x, noise)
    assert not calls
    model.grad_checkpointing = True
    assert_close(loss_and_gradients(model, x, noise), expected)
    assert len(calls) == 3 + 2                                  # encoder and decoder


def test_autocast_keeps_the_loss_in_float32():
    model = mae(torch.float32)
    x, noise = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and abs(out.loss - model(x, noise).loss) < 0.05 * out.loss
    assert model.mask_token.grad.isfinite().all()


def test_compiles_without_a_break():
    torch._dynamo.reset()
    model = mae(torch.float32)
    x, noise = batch(model)
    with fastvim.use_backend("python"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, noise).loss, model(x, noise).loss)


def test_another_image_size():
    model = mae()
    x, noise = batch(model, size=(48, 32))
    out = model(x, noise)
    assert out.pred.shape == (2, 24, 192) and out.mask.sum(1).tolist() == [18, 18] and out.loss.isfinite()


def test_it_learns_to_paint():
    """Stripes of one direction and phase: a quarter of the patches tells the rest."""
    torch.manual_seed(0)
    model = train_mae.MaskedAutoencoder(img_size=16, patch_size=4, embed_dim=32, depth=2, d_state=4, decoder_embed_dim=32,
                                      in_chans=1)
    optimizer, ramp = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.arange(16.0)
    for step in range(120):
        phase = torch.rand(16, 1, 1, 1) * 6.28
        x = torch.sin(ramp.view(1, 1, 16, 1) * 0.9 + phase).expand(16, 1, 16, 16)
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3                                           # painting each patch in its mean: 0.94


# ---- from autoencoder to classifier ----------------------------------------------------------------------------------


def classifier(model, dtype=torch.float64, **fields):
    return tiny(dtype, **{**dict(schedule=model.cfg.schedule, class_token=model.cfg.class_token), **fields})


@pytest.mark.parametrize("fields", [dict(), VIM])
def test_the_encoder_arrives_in_a_classifier_as_it_was(fields):
    """With every patch kept both encode an image alike, so every weight and position row is where it belongs."""
    model = mae(**fields)
    target = classifier(model)
    head = copy.deepcopy(target.head.state_dict())
    note = checkpoints.load(target, dict(model=model.state_dict()), encoder_only=True)
    x, _ = batch(model)
    everything = torch.arange(16).expand(2, -1)
    assert_close(target.forward_features(x), model.forward_features(x, keep=everything))
    assert_close(dict(target.head.state_dict()), dict(head))
    decoder = [k for k in model.state_dict() if k.startswith(("decoder", "mask"))]
    taken = len(target.state_dict()) - 2
    assert f"{taken} weights of the encoder taken, {len(decoder)} dropped" in note and "decoder_blocks" in note
    assert ("position row of the class token moved from 0 to 8" in note) == bool(fields)


def test_released_position_rows_give_half_of_a_vims_patches_a_neighbours():
    model = mae(**VIM)
    moved, released = classifier(model), classifier(model)
    checkpoints.load(moved, model.state_dict(), encoder_only=True)
    note = checkpoints.load(released, model.state_dict(), encoder_only=True, released_pos_rows=True)
    rows = model.pos_embed[0]
    assert released.pos_embed[0].equal(rows) and "moved" not in note
    assert moved.pos_embed[0].equal(torch.cat([rows[1:9], rows[:1], rows[9:]]))
    patches = [i for i in range(17) if i != 8]
    assert sum(not released.pos_embed[0, i].equal(moved.pos_embed[0, i]) for i in patches) == 8


@pytest.mark.parametrize("fields", [dict(), VIM])
def test_positions_are_resized_on_the_way(fields):
    model = mae(**fields)
    target = classifier(model, img_size=48)
    note = checkpoints.load(target, model.state_dict(), encoder_only=True)
    assert "resized from 4 x 4 to 6 x 6" in note
    grid = model.pos_embed[:, bool(fields):].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT[0]
    own = target.pos_embed[0]
    assert_close(torch.cat([own[:18], own[19:]]) if fields else own, grid)
    if fields:
        assert_close(own[18], model.pos_embed[0, 0])


def test_a_fine_tuned_classifier_is_loaded_as_it_is():
    """No autoencoder's file: the class token's row is where the token lies."""
    source = tiny(**VIM)
    target = tiny(num_classes=3, **VIM)
    note = checkpoints.load(target, source.state_dict(), encoder_only=True)
    assert target.pos_embed.equal(source.pos_embed) and "2 dropped (head)" in note
    assert target.head.weight.shape == (3, 16)


def test_an_autoencoder_without_positions_is_refused():
    weights = {name: value for name, value in mae().state_dict().items() if name != "pos_embed"}
    with pytest.raises(ValueError, match="1 missing in the file: pos_embed"):
        checkpoints.load(mae(), weights)
    other = mae(img_size=48)
    assert "pos_embed that of the model's grid" in checkpoints.load(other, mae().state_dict())
    assert other.pos_embed.equal(mae(img_size=48).pos_embed)


def test_an_autoencoder_is_continued_with_its_decoder():
    model, other = mae(), mae(mask_ratio=0.5)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert "dropped" not in checkpoints.load(other, model.state_dict())
    assert_close(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("change, says", [
    (lambda w: {k: v for k, v in w.items() if k.startswith("decoder")}, ["holds no encoder", "decoder_blocks.0"]),
    (lambda w: {"conv1.weight": torch.zeros(2)}, ["holds no encoder", "conv1.weight"]),
    (lambda w: {k: v for k, v in w.items() if "layers.2" not in k}, ["missing in the file", "layers.2.mixer.A_log"]),
    (lambda w: {**w, "layers.3.norm.weight": torch.ones(16)}, ["unknown to the model", "layers.3.norm.weight"]),
    (lambda w: mae(patch_size=4, img_size=16).state_dict(), ["patch_embed.proj.weight (16, 3, 4, 4)", "(16, 3, 8, 8)"]),
    (lambda w: mae(embed_dim=32).state_dict(), ["of another shape", "(32, 3, 8, 8), in the model (16, 3, 8, 8)"]),
    (lambda w: {**w, "pos_embed": torch.zeros(1, 15, 16)}, ["pos_embed (1, 15, 16), in the model (1, 16, 16)"]),
])
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, says):
    model = mae()
    target = classifier(model)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError) as error:
        checkpoints.load(target, change(model.state_dict()), encoder_only=True)
    assert all(text in str(error.value) for text in says), error.value
    assert_close(dict(target.state_dict()), dict(before))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, says", [
    *((dict(mask_ratio=ratio), ["mask_ratio", repr(ratio)])
      for ratio in (0, 1, 0.0, 1.0, -0.5, 1.5, math.nan, None, "a", True, 0.99)),
    (dict(embed_dim=6), ["embed_dim=6", "multiple of 4"]), (dict(decoder_embed_dim=10), ["decoder_embed_dim=10"]),
    (dict(decoder_embed_dim=0), ["decoder_embed_dim=0"]), (dict(decoder_depth=0), ["depth=0"]),
    (dict(num_classes=10), ["num_classes"]), (dict(out_indices=(0,)), ["out_indices"]),
    (dict(schedule="fastchannelvim"), ["per channel"]), (dict(img_size=7), ["img_size"]), (dict(mask=1), ["mask"])])
def test_impossible_autoencoders(fields, says):
    with pytest.raises(ValueError) as error:
        mae(**fields)
    assert all(text in str(error.value) for text in says), error.value


@pytest.mark.parametrize("x, noise, says", [
    (torch.zeros(2, 3, 4, 4), None, "whole patches of 8 x 8"), (torch.zeros(2, 3, 36, 32), None, "whole patches"),
    (torch.zeros(2, 3, 8, 8), None, "image's 1 patches"), (torch.zeros(3, 32, 32), None, r"\(B, C, H, W\)"),
    (torch.zeros(2, 4, 32, 32), None, "4 channels"), ([1], None, "list"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, "float tensor"),
    (torch.zeros(2, 3, 32, 32), torch.rand(2, 15), r"\(2, 16\)"), (torch.zeros(2, 3, 32, 32), torch.rand(16), "noise")])
def test_impossible_images(x, noise, says):
    with pytest.raises((ValueError, TypeError), match=says):
        mae(torch.float32)(x, noise)
