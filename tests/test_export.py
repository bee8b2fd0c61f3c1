"""Programs made of models: torch.export, ONNX, torch.jit.trace and make_fx agree with the model at batches and
sizes other than the traced ones, and leave it as it was; models without values, on `meta` or fake, have shapes."""
import copy
import io

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fastvim
import fastvim_export
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
OPEN = Dim.DYNAMIC
CLASS_TOKEN = dict(schedule="vim", class_token=True)
PER_CHANNEL = dict(schedule="channelvim", class_token=True, in_chans=3)
FIELDS = {"fastvim": dict(), "pooled": dict(class_token=True), "vim": CLASS_TOKEN,
          "channels": PER_CHANNEL, "attention": dict(pool="attention"), "max": dict(pool="max")}


def small(**fields):
    """A block of each kind over 2 x 2 tokens."""
    return tiny(torch.float32, **{**dict(depth=2, img_size=16), **fields})


def assert_same(program, model, *arguments):
    y = model(*arguments).detach()
    assert type(y) is torch.Tensor                              # nothing fake was left in it
    torch.testing.assert_close(program(*arguments).detach(), y, rtol=1e-4, atol=1e-5)


# ---- torch.export --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, strict", [("python", False), ("cpu", False), ("cpu", True)])
def test_an_open_batch(backend, strict):
    """Exported with one batch, run and trained with another; kernels stay one operation a block."""
    model = small(depth=1 if backend == "python" else 2)
    with fastvim.use_backend(backend):
        before = model(images(model))
        exported = torch.export.export(
            model, (images(model),), dynamic_shapes=({0: Dim("b", min=1, max=64)},), strict=strict)
        assert model(images(model)).equal(before)
        graphs = [m.graph for m in exported.graph_module.modules() if hasattr(m, "graph")]
        targets = [str(node.target) for graph in graphs for node in graph.nodes]
        own = sum("fastvim.ssm" in target for target in targets)
        assert own == (0 if backend == "python" else 2)
        x = images(model, 5)
        expected = outputs_and_gradients(model, x)
        assert_close(outputs_and_gradients(exported.module(), x), expected, rtol=1e-3, atol=1e-5)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        assert_same(torch.export.load(file).module(), model, x)
        assert_same(exported.run_decompositions().module(), model, x)


@pytest.mark.parametrize("backend, name", [
    ("python", "fastvim"), ("cpu", "fastvim"), ("cpu", "pooled")])
def test_open_height_and_width(backend, name):
    """Twice in a row, of the model's own size and of another, which does not fit its patches. As
    for the batch, torch.export takes lengths of 0 and 1 for constants, also that of the rows above
    a class token that is a step of its own."""
    least = 32 if name == "pooled" else 24
    model = small(depth=1 if backend == "python" else 2, img_size=32, **FIELDS[name])
    shapes = ({0: OPEN, 2: OPEN, 3: OPEN},)
    with fastvim.use_backend(backend):
        for size in ((32, 32), (37, 56))[:1 if backend == "python" else 2]:
            exported = torch.export.export(model, (images(model, 2, size),), dynamic_shapes=shapes)
            for batch, other in ((1, (least, 56)), (2, (41, least + 1))):
                assert_same(exported.module(), model, images(model, batch, other))


@pytest.mark.parametrize("fields", [dict(), CLASS_TOKEN], ids=["fastvim", "vim"])
@pytest.mark.parametrize("backend", ["python", "cpu"])
def test_keep_as_an_input(backend, fields):
    model = small(img_size=32, **fields)
    keep = random_keep(2, 16, 9)
    shapes = ({0: OPEN}, {0: OPEN, 1: OPEN})
    with fastvim.use_backend(backend):
        exported = torch.export.export(model, (images(model), keep), dynamic_shapes=shapes)
        keep = random_keep(3, 16, 7)
        keep[1, 5:] = -1
        assert_same(exported.module(), model, images(model, 3), keep)


def test_scan_of_an_open_number_of_steps():
    """Its rounds of doubling against the loop, over lengths beside powers of two."""
    torch.manual_seed(0)
    for steps in (1, 2, 7, 8, 9, 33):
        x, dt = torch.randn(2, 2, 3, steps, 5, dtype=torch.float64).unbind()
        B, C = torch.randn(2, 2, 3, steps, 4, dtype=torch.float64).unbind()
        A = -torch.rand(2, 5, 4, dtype=torch.float64)
        D = torch.randn(2, 5, dtype=torch.float64)
        for skip in (None, D):
            s = fastvim_export.selective_scan(x, F.softplus(dt), A.mT[:, None], B, C, skip)
            assert_close(s, fastvim.selective_scan(x, dt, A, B, C, skip))
    long = torch.zeros(1, 1, 2 ** 16 + 1, 1)
    with pytest.raises(RuntimeError, match="more than 65536 steps"):
        fastvim_export.selective_scan(long, long, torch.zeros(1, 1, 1, 1), long, long, None)


def test_channel_sampling_is_not_exported():
    model = small(**PER_CHANNEL).train()
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(RuntimeError, match=r"model.eval\(\), or build it with hcs=False"):
            export(model, (images(model),))


# ---- ONNX ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastvim", "vim", "static", "keep"])
def test_onnx(name, tmp_path, caplog):
    """torch.onnx.export of a model as it is made: onnxruntime agrees, optimizing or not."""
    fastvim.announce.cache_clear()
    model = small(depth=1 if name == "fastvim" else 2, **FIELDS.get(name, {}))      # it is unrolled
    shapes = ({0: OPEN},)
    others = [(images(model, batch, seed=4),) for batch in (1, 5)]
    inputs = (images(model),)
    if name == "static":
        shapes = None
        others = [(images(model, seed=4),)]
    if name == "keep":
        shapes = ({0: OPEN}, {0: OPEN, 1: OPEN})
        inputs = (*inputs, random_keep(2, 4, 3))
        others = [(images(model, 5), random_keep(5, 4, 2))]
    if name == "fastvim":
        shapes = ({0: OPEN, 2: OPEN, 3: OPEN},)
        others.append((images(model, 3, (29, 40)),))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, inputs, path, dynamic_shapes=shapes, verbose=False)
    assert caplog.text.count("has no torch.onnx.export: python runs this model") == 1
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        names = [node.name for node in session.get_inputs()]
        for arguments in others:
            values = {key: value.numpy() for key, value in zip(names, arguments, strict=True)}
            y = torch.from_numpy(session.run(None, values)[0])
            torch.testing.assert_close(y, model(*arguments).detach(), rtol=1e-4, atol=1e-5)


# ---- torch.jit, torch.fx -------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FIELDS)
def test_jit_trace(name, grad):
    model = small(**FIELDS[name])
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, images(model))
        assert_same(traced, model, images(model, 5))
    if grad:
        x = images(model, 5)
        expected = outputs_and_gradients(model, x)
        assert_close(outputs_and_gradients(traced, x), expected, rtol=1e-3, atol=1e-5)


def test_what_cannot_read_a_model_is_refused():
    model = small()
    with pytest.raises(RuntimeError, match="torch.jit.script cannot read these models: use"):
        torch.jit.script(model)
    with pytest.raises(TypeError, match=r"images must be a float tensor \(B, C, H, W\), not Proxy"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("fields", [dict(), CLASS_TOKEN], ids=["fastvim", "vim"])
def test_make_fx(mode, fields):
    model = small(**fields)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            graph = make_fx(lambda x: model(x), tracing_mode=mode, _allow_non_fake_inputs=True)(images(model))
            assert_same(graph, model, images(model, 5 if mode == "symbolic" else 2, seed=7))


# ---- tensors without values ----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("fields, kept", [
    (dict(drop_path_rate=0.1), 0), (dict(), 3), (CLASS_TOKEN, 0), (CLASS_TOKEN, 3), (dict(bf16=True), 0),
    (dict(PER_CHANNEL, hcs=False), 0)], ids=str)
def test_shapes_for_free(where, fields, kept):
    """On `meta` a model can also be made; a fake one is the copy of another: torch's own random
    numbers do not work there."""
    real = small()
    expected = real(images(real))
    dtype = torch.bfloat16 if "bf16" in fields else torch.float32
    fields = {key: value for key, value in fields.items() if key != "bf16"}
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5)
    with torch.device("cpu" if where == "fake" else "meta"):
        model = fastvim.FastVim(**{**sizes, **fields}).to(dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake if where == "fake" else torch.device("meta"):
        model = copy.deepcopy(model)
        keep = torch.zeros(2, kept, dtype=torch.long) if kept else None
        y = model(torch.randn(2, 3, 32, 32, dtype=dtype), keep=keep)
        y.sum().backward()
        assert y.shape == (2, 5)
        assert y.dtype == dtype
        assert all(p.grad.shape == p.shape for p in model.parameters())
    assert real(images(real)).equal(expected)
