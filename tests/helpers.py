"""What several test files need: a tiny model without zeros and ones among its weights, its
gradients, a script run."""
import importlib
import multiprocessing
import os
import socket
import sys

import torch

import fastvim
import fastvim_kernels


def tiny(dtype=torch.float64, **fields):
    """A seeded model of 4 x 4 tokens in eval mode, every parameter random: at 0 or 1
    mistakes hide."""
    torch.manual_seed(0)
    defaults = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, d_state=4, num_classes=5)
    if fields.get("schedule") == "fastvim_video":
        defaults["frames"] = 3
    fields = {**defaults, **fields}
    model = fastvim.FastVim(**fields)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def images(model, batch=2, size=None, channels=None, seed=1):
    """Random images of the model's size and type; videos, for a model of these."""
    torch.manual_seed(seed)
    size = size or model.cfg.img_size
    if "t" in model.cfg.extents:
        size = (model.cfg.frames, *size)
    x = torch.randn(batch, channels or model.cfg.in_chans, *size)
    return x.to(next(model.parameters()).dtype)


def random_keep(batch, tokens, kept, seed=2):
    """(batch kept) token ids in random order, none twice."""
    torch.manual_seed(seed)
    return torch.stack([torch.randperm(tokens)[:kept] for _ in range(batch)])


def walk_of(grid):
    """The tables by which kernels follow a Grid."""
    return fastvim_kernels.unpack(torch.get_default_device(), *fastvim_kernels.pack(grid))


def outputs_and_gradients(model, x, **arguments):
    """-> {"y": logits, "x": the images' gradient, parameter: its gradient}, for a loss that tells
    classes apart. The loss of a batch is the sum of its images'."""
    x = x.clone().requires_grad_()
    y = model(x, **arguments)
    weights = torch.cos(torch.arange(y.shape[1], dtype=torch.float64)).to(y)
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    inputs = [x, *(model.get_parameter(k) for k in names)]
    grads = torch.autograd.grad((y * weights).sum(), inputs, materialize_grads=True)
    return dict(zip(["y", "x", *names], [y.detach(), *grads]))


def assert_close(actual, expected, rtol=1e-9, atol=1e-11):
    """Compares tensors, or dictionaries of tensors by name."""
    if isinstance(expected, torch.Tensor):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol,
                                   msg=lambda message, name=name: f"{name}: {message}")


def run_script(script, *argv):
    """The script, an imported module, from its command line, in this process."""
    sys.argv, old = [f"{script.__name__}.py", *map(str, argv)], sys.argv
    try:
        script.main()
    finally:
        sys.argv = old


class Child:
    """function(*arguments) in a process of its own, which leads a session, prints into the file
    `output` and ends as the function does. It is forked from a server that has imported the heavy
    modules once for all of them."""

    def __init__(self, function, *arguments, output, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["timm.utils", "matplotlib.figure", "sklearn.datasets", "sklearn.model_selection",
             "torch.distributed.fsdp", "train_imagenet"])
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)                # for the server
        self.output = output
        arguments = (function, arguments, str(output), environment)
        self.process = context.Process(target=in_child, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self):
        """-> its exit status, as subprocess has it"""
        self.process.join()
        return self.process.exitcode

    def said(self):
        return self.output.read_text()


def in_child(function, arguments, output, environment):
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    function(*arguments)


def run_named_script(name, *argv):
    run_script(importlib.import_module(name), *argv)


def two_processes(folder, function, *argv):
    """function(*argv) in two processes that know of each other, as torchrun starts them -> (exit status, output) x 2"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [Child(function, *argv, output=folder / f"said{rank}", RANK=str(rank), LOCAL_RANK=str(rank),
                     WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in (0, 1)]
    ended = [(child.wait(), child.said()) for child in started]
    for child in started:
        child.output.unlink()
    return ended
