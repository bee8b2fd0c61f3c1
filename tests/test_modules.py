"""Modules are called: hooks, parametrizations, pruning, replaced and patched modules, adapters,
quantization, offloading, replicas and threads, by plain PyTorch and by the kernels of the CPU."""
import copy
import io
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastvim
from helpers import assert_close, images, outputs_and_gradients, random_keep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")       # weight_norm and quantization are deprecated
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=["python", "cpu"])
def backend(request):
    with fastvim.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def exact(model, x, **arguments):
    """Plain PyTorch's logits in float64, by a copy of the model."""
    with fastvim.use_backend("python"):
        return copy.deepcopy(model).double()(x.double(), **arguments).detach()


def check(y, expected):
    """Close to float64: to the bits that the type has."""
    bound = 0.03 if y.dtype == torch.bfloat16 else 1e-5
    assert (y.double() - expected).abs().max() < bound * expected.abs().max()


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_of_every_kind_are_called(backend, dtype, caplog):
    """Where kernels read a norm's weights and do not call it, plain PyTorch serves while it has
    hooks, and says so."""
    fastvim.announce.cache_clear()
    model = tiny(dtype)
    x = images(model)
    y = exact(model, x)
    modules = {name: m for name, m in model.named_modules() if name != "layers"}
    assert {"layers.1", "layers.1.norm", "layers.1.mixer.layernorm", "norm_f"} <= modules.keys()
    kinds = {"forward": "register_forward_hook", "before": "register_forward_pre_hook",
             "backward": "register_full_backward_hook",
             "before backward": "register_full_backward_pre_hook"}
    for kind, register in kinds.items():
        seen = []
        handles = [getattr(m, register)(lambda *_, name=name: seen.append(name))
                   for name, m in modules.items()]
        z = model(x.clone().requires_grad_())
        z.sum().backward()
        check(z, y)
        assert sorted(seen) == sorted(modules), kind
        for handle in handles:
            handle.remove()
        model(x).sum().backward()
        assert len(seen) == len(modules)
    assert ("hooks on norms" in caplog.text) == (backend != "python")


@pytest.mark.parametrize("register", [
    "register_module_forward_hook", "register_module_forward_pre_hook",
    "register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_global_hooks_are_called(backend, register):
    model = tiny(torch.float32)
    seen = set()
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.add(id(module)))
    try:
        model(images(model).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen == {id(m) for name, m in model.named_modules() if name != "layers"}


@pytest.mark.parametrize("name", ["layers.0.norm", "layers.1.norm", "layers.1.mixer.layernorm",
                                  "norm_f", "layers.1.mixer.in_proj", "layers.1.mixer"])
def test_what_a_hook_returns_counts(backend, dtype, name):
    """A module whose hook doubles its output computes what one of doubled weights does."""
    model = tiny(dtype)
    x = images(model)
    module = model.get_submodule(name)
    other = copy.deepcopy(model)
    twice = other.get_submodule(name)
    weights = twice.out_proj.parameters() if name.endswith("mixer") else twice.parameters()
    for p in weights:
        p.data *= 2
    module.register_forward_hook(lambda *call: call[2] * 2)
    check(model(x), exact(other, x))


def test_hooks_on_parameters(backend):
    model = tiny(torch.float32)
    x = images(model)
    expected = outputs_and_gradients(tiny(torch.float64), x.double())
    seen = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g: 2 * g)
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    y = model(x)
    (y * torch.cos(torch.arange(5.0))).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), 2 * expected[name], rtol=1e-3, atol=1e-4)


# ---- weights that are made -----------------------------------------------------------------------

WEIGHTS = [("layers.1.mixer", "x_proj"), ("layers.1.mixer", "dt_proj"), ("layers.1.mixer", "A_log"),
           ("layers.1.mixer", "conv_weight"), ("layers.1.mixer.in_proj", "weight"),
           ("layers.1.norm", "weight"), ("layers.1.mixer.layernorm", "weight")]


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def weight_norm_twice(module, name):
    nn.utils.parametrizations.weight_norm(module, name)
    getattr(module.parametrizations, name).original0.data *= 2


def old_weight_norm_twice(module, name):
    nn.utils.weight_norm(module, name)
    getattr(module, f"{name}_g").data *= 2


def spectral_norm(module, name):
    nn.utils.parametrizations.spectral_norm(module, name).eval()


MADE = {
    "parametrization": lambda m, name: parametrize.register_parametrization(m, name, Double()),
    "weight_norm": weight_norm_twice,
    "old weight_norm": old_weight_norm_twice,
    "spectral_norm": spectral_norm,
    "pruning": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("path, name", WEIGHTS)
def test_weights_that_are_made_of_others(backend, dtype, path, name, kind):
    """The model computes what one with these weights does; training goes on for a second step."""
    if kind == "spectral_norm" and path.endswith("norm"):
        path, name = "layers.1.mixer.out_proj", "weight"    # it is for matrices
    model = tiny(dtype)
    other = copy.deepcopy(model)
    x = images(model)
    module = model.get_submodule(path)
    weight = getattr(module, name).detach().clone()
    MADE[kind](module, name)
    model(x)                                                # old kinds make the weight on the way
    made = getattr(module, name).detach()
    if kind == "pruning":
        assert (made == 0).sum() >= weight.numel() // 2
    elif kind == "spectral_norm":
        assert not made.equal(weight)
    else:
        torch.testing.assert_close(made, 2 * weight, rtol=2e-2, atol=1e-3)
    getattr(other.get_submodule(path), name).data = made.clone()
    check(model(x), exact(other, x))
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters(recurse=False))


# ---- replaced and patched modules ----------------------------------------------------------------


class Adapter(nn.Module):
    """Has weights, as what it wraps has, and computes something else."""
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: getattr(self.base, "bias", None))

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = nn.Parameter(torch.full((), 2, dtype=base.weight.dtype))

    def forward(self, v):
        return self.base(v) * self.extra


@pytest.mark.parametrize("name", ["norm", "mixer.layernorm", "mixer.in_proj", "mixer.out_proj"])
def test_an_adapter_is_called(backend, dtype, name):
    model = tiny(dtype)
    other = copy.deepcopy(model)
    x = images(model)
    block = model.layers[1]
    parent = block.mixer if "." in name else block
    setattr(parent, name.rpartition(".")[2], Adapter(block.get_submodule(name)))
    for p in other.layers[1].get_submodule(name).parameters():
        p.data *= 2
    y = model(x)
    check(y, exact(other, x))
    y.sum().backward()
    assert block.get_submodule(name).extra.grad.abs() > 0


def normalise(x, eps, centre):
    x = x - x.mean(-1, keepdim=True) if centre else x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


NORMS = {
    "other eps": (lambda d: nn.LayerNorm(d, eps=0.5), lambda x: normalise(x, 0.5, True)),
    "no bias": (lambda d: nn.LayerNorm(d, bias=False), lambda x: normalise(x, 1e-5, True)),
    "no weights": (lambda d: nn.LayerNorm(d, elementwise_affine=False),
                   lambda x: normalise(x, 1e-5, True)),
    "rms": (lambda d: nn.RMSNorm(d, eps=1e-5), lambda x: normalise(x, 1e-5, False)),
    "rms of other eps": (lambda d: nn.RMSNorm(d, eps=0.5), lambda x: normalise(x, 0.5, False)),
    "none": (lambda d: nn.Identity(), lambda x: x),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", ["norm", "mixer.layernorm"])
def test_other_norms(backend, dtype, name, kind):
    """Compared with the formula. One without a bias was once computed as an RMSNorm."""
    model = tiny(dtype)
    other = tiny(torch.float64)
    other.load_state_dict(model.state_dict())
    x = images(model)
    make, formula = NORMS[kind]
    for one, norm in ((model, make(32 if "." in name else 16).to(dtype)),
                      (other, Function(formula))):
        block = one.layers[1]
        setattr(block.mixer if "." in name else block, name.rpartition(".")[2], norm)
    with fastvim.use_backend("python"):
        expected = other(x.double()).detach()
    check(model(x), expected)
    with torch.no_grad():
        check(model(x), expected)


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("name", ["norm", "mixer.layernorm", "mixer.in_proj"])
def test_a_patched_forward_is_called(backend, monkeypatch, name, where):
    model = tiny(torch.float32)
    x = images(model)
    module = model.layers[1].get_submodule(name)
    target = module if where == "instance" else type(module)
    calls = []
    before = type(module).forward

    def forward(*arguments):
        calls.append(arguments)
        own = arguments if where == "class" else (module, *arguments)
        return before(*own)
    y = model(x)
    monkeypatch.setattr(target, "forward", forward)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert calls


def test_functional_call(backend):
    model = tiny(torch.float32)
    x = images(model)
    weights = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    check(torch.func.functional_call(model, weights, (x,)), exact(other, x))


# ---- quantization --------------------------------------------------------------------------------


class Int8(torch.Tensor):
    """A weight of 8 bits for each number and a scale for all, as weight-only quantization has it."""

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype)

    def __init__(self, t):
        self.scale = t.abs().max() / 127
        self.numbers = (t / self.scale).round().to(torch.int8)

    def plain(self):
        return self.numbers.to(self.scale) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        args = torch.utils._pytree.tree_map_only(Int8, Int8.plain, args)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.x_proj",
                                  "mixer.layernorm.weight", "norm.weight"])
def test_weights_of_another_tensor_class(backend, name):
    model = tiny(torch.float32)
    other = copy.deepcopy(model)
    x = images(model)
    path, _, last = name.rpartition(".")
    weight = Int8(other.layers[1].get_parameter(name))
    other.layers[1].get_parameter(name).copy_(weight.plain())
    module = model.layers[1].get_submodule(path)
    setattr(module, last, nn.Parameter(weight, requires_grad=False))
    assert type(getattr(module, last)) is Int8
    check(model(x), exact(other, x))


def test_dynamic_quantization(backend):
    model = tiny(torch.float32)
    x = images(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    other = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            other.get_submodule(name).weight.data = module.weight().dequantize()
    with torch.no_grad():
        y = quantized(x)
        expected = exact(other, x)
    assert not y.equal(model(x))
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()     # of 8-bit activations


# ---- offloading and adapters by other packages ---------------------------------------------------

PLACES = {"patch_embed": "cpu", "pos_embed": "cpu", "layers.0": "cpu", "layers.1": "disk",
          "layers.2": "disk", "norm_f": "disk", "head": "cpu"}


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch", "load"])
def test_offloaded_weights(backend, dtype, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny(dtype)
    x = images(model)
    expected = exact(model, x)
    cpu = torch.device("cpu")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    elif how == "dispatch":
        accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=str(tmp_path))
    else:
        file = tmp_path / "weights.bin"
        torch.save(model.state_dict(), file)
        with accelerate.init_empty_weights():
            model = tiny(dtype)
        model = accelerate.load_checkpoint_and_dispatch(
            model, str(file), PLACES, offload_folder=str(tmp_path), dtype=dtype)
    assert model.layers[1].norm.weight.is_meta
    with torch.no_grad():
        check(model(x), expected)
        check(model(x), expected)


ADAPTERS = {
    "all": dict(target_modules="all-linear"),
    "dora": dict(target_modules=["in_proj", "out_proj"], use_dora=True),
    "dropout": dict(target_modules="all-linear", lora_dropout=0.3),
    "saved": dict(target_modules=["in_proj"], modules_to_save=["head", "norm_f", "norm"]),
    "parameters": dict(target_modules=[], target_parameters=["mixer.x_proj", "mixer.dt_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_merged_computes_the_same(backend, kind):
    peft = pytest.importorskip("peft")
    model = tiny(torch.float32)
    x = images(model)
    before = model(x)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[kind])
    adapted = peft.get_peft_model(model, config).train()
    adapted(x).square().sum().backward()
    for name, p in adapted.named_parameters():
        learns = "lora_" in name or "modules_to_save" in name
        assert (p.grad is not None and bool(p.grad.any())) == learns, name
    adapted.eval()
    with torch.no_grad():
        y = adapted(x)
        merged = adapted.merge_and_unload()
    assert (y - before).abs().max() > 1e-3 * y.abs().max()
    check(y, exact(merged, x))
    check(merged(x), exact(merged, x))


# ---- copies, threads, defaults -------------------------------------------------------------------


def test_copies_of_a_model(backend, dtype):
    model = tiny(dtype)
    x = images(model)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model), model.share_memory(),
                  model.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-6)


def replicate(module):
    """As DataParallel does: the replica's weights are tensors, not parameters."""
    replica = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        replica._parameters.pop(name, None)
        setattr(replica, name, None if p is None else p * 1)
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    return replica


def test_replicas(backend, dtype):
    model = tiny(dtype)
    x = images(model)
    y = replicate(model)(x)
    check(y, exact(model, x))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_threads_share_one_model(dtype):
    """In 16 bits, norms once exchanged the shared module's weights while they ran."""
    model = tiny(dtype)
    xs = [images(model, seed=seed) for seed in range(4)]
    expected = [exact(model, x) for x in xs]
    results = []

    def run(i):
        for _ in range(10):
            results.append((i, model(xs[i]).detach()))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == 40                           # none of them ended in an error
    for i, y in results:
        check(y, expected[i])


def test_a_frozen_part_has_no_gradients(backend):
    model = tiny(torch.float32)
    x = images(model)
    expected = outputs_and_gradients(tiny(torch.float64), x.double())
    model.layers[:2].requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    values = outputs_and_gradients(model, x)
    frozen = ("layers.0.", "layers.1.", "patch_embed.")
    kept = {name: v for name, v in expected.items() if not name.startswith(frozen)}
    assert_close({k: v.double() for k, v in values.items()}, kept, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(backend, default):
    model = tiny(torch.float32, class_token=True, img_size=(32, 296))       # 148 tokens
    x = images(model)
    keep = random_keep(2, 148, 130)
    expected = [model(x), model(x, keep=keep)]
    torch.set_default_dtype(default)
    try:
        values = [model(x), model(x, keep=keep)]
        values[1].sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for y, e in zip(values, expected, strict=True):
        assert y.equal(e)


@pytest.mark.parametrize("fields, arguments", [
    (dict(), dict()), (dict(class_token=True), dict(keep=[[0, 3, 5], [1, 2, -1]])),
    (dict(schedule="fastchannelvim"), dict(channels=[2, 0, 1]))], ids=["full", "keep", "channels"])
def test_the_default_device_does_not_matter(backend, fields, arguments):
    model = tiny(torch.float32, **fields)
    x = images(model)
    expected = model(x, **arguments)
    torch.set_default_device("meta")                    # "cuda" in real life
    try:
        y = model(x, **arguments)
        model.train()(x, **arguments).sum().backward()
    finally:
        torch.set_default_device(None)
    assert y.equal(expected)
