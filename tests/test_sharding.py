"""
Weights split over processes: train_imagenet.py --shard, and PyTorch's fully_shard and DistributedDataParallel on the
model itself.
"""
import os
import shutil
import signal
import socket

import pytest
import torch
import torch.distributed as dist

import fastvim
import safety
import sharding
import train_imagenet
import training
from helpers import Child, assert_close, images, outputs_and_gradients, run_script, tiny

DIGITS = ["--depth", 1, "--threads", 1, "--steps", 3, "--lr", 1e-3, "--warmup", 0, "--ema", 0.5, "--clip", 0.5,
          "--accum", 2, "--device", "cpu"]


def processes(count, output, function, *argv):
    """function(*argv) in processes that know of each other -> [(exit status, output), ...]"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [Child(function, *argv, output=output.with_name(f"{output.name}.said{rank}"), RANK=str(rank),
                      LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                for rank in range(count)]
    return [(child.wait(), child.said()) for child in children]


def train(*argv):
    run_script(train_imagenet, *DIGITS, *argv)


def before_step(step, act, *argv):
    """The script; in the last process act() is called before that step."""
    train_step = training.train_step

    def patched(run, *rest):
        if run.step == step and run.ctx.rank + 1 == run.ctx.world_size:
            act()
        return train_step(run, *rest)

    training.train_step = patched
    train(*argv)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def break_the_disk():
    raise OSError("the disk of the data has gone")


def break_the_loss():
    torch.nn.functional.cross_entropy = lambda logits, *rest, **more: logits.sum() * float("nan")


def load(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(a, b):
    """Equal but for the order of sums."""
    assert a["step"] == b["step"] and a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for part in ("model", "ema"):
        assert_close(dict(a[part]), dict(b[part]), rtol=1e-4, atol=1e-5)
    for i, values in b["optimizer"]["state"].items():
        assert_close(a["optimizer"]["state"][i], values, rtol=1e-3, atol=1e-5)
    for x, y in zip(a["history"], b["history"], strict=True):
        assert [x["loss"], x["grad_norm"]] == pytest.approx([y["loss"], y["grad_norm"]], abs=1e-4)
        assert x["metrics"] == pytest.approx(y["metrics"], abs=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run in one process that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train("--batch-size", 12, "--out", out)
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of the same run in two processes that share the weights, stopped after its second step of three."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    ended = processes(2, out, before_step, 1, ask_to_stop, "--batch-size", 6, "--shard", "--out", out)
    assert [status for status, _ in ended] == 2 * [128 + signal.SIGTERM], ended
    assert load(out)["step"] == 2
    return out


@pytest.mark.parametrize("count, flags", [(1, []), (2, []), (3, ["--shard", "--grad-checkpointing"])])
def test_any_number_of_processes_goes_on(count, flags, stopped, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    ended = processes(count, out, train, "--batch-size", 12 // count, *flags, "--out", out, "--resume",
                      "--resume-changed")
    assert [status for status, _ in ended] == count * [0], ended
    assert "at step 2 of 3" in ended[0][1]
    assert_same_run(load(out), load(whole))


def test_the_file_is_an_ordinary_one(stopped, whole):
    ours, plain = load(stopped), load(whole)
    assert list(ours["model"]) == list(plain["model"]) and ours["built"] == plain["built"]
    model = fastvim.create_model(ours["built"]["name"], **ours["built"]["fields"])
    fastvim.load_checkpoint(model, stopped / "last.pt")
    assert_close(dict(model.state_dict()), ours["ema"])


def test_a_process_that_fails_alone_does_not_wait_for_the_others(tmp_path):
    out = tmp_path / "run"
    ended = processes(2, out, before_step, 2, break_the_disk, "--batch-size", 6, "--shard", "--out", out,
                      "--save-minutes", 0)
    assert all(status for status, _ in ended) and "the disk of the data has gone" in ended[1][1]
    assert load(out)["step"] == 2


def test_nonfinite_loss_keeps_what_was_learnt_before(tmp_path):
    out = tmp_path / "run"
    ended = processes(2, out, before_step, 2, break_the_loss, "--batch-size", 6, "--shard", "--out", out)
    for status, said in ended:
        assert status and "at step 2, epoch 1. It begins in the loss function" in said and "process 1" in said
    assert load(out)["step"] == 2 and not safety.not_finite(load(out)["model"])


@pytest.mark.parametrize("flags", ["--model resnet10t", "--eval EVAL", "--predict x.png"])
def test_what_cannot_be_sharded_is_refused(flags, whole):
    flags = flags.replace("EVAL", str(whole / "last.pt")).split()
    if flags[0] == "--predict":
        flags += ["--eval", whole / "last.pt"]
    with pytest.raises(SystemExit, match="--shard is for training our models"):
        train("--shard", *flags)


# ---- The model under PyTorch's own wrappers --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """This process alone, as a group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(path, mesh, dtype=None, cast=True, **fields):
    """A tiny model of which every block's part at `path` is sharded by itself."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    model = tiny(torch.float32, **fields).train()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=cast)
    for block in model.layers:
        fully_shard(block.get_submodule(path), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return model


def gradients(model, x):
    """The logits, and all gradients of a loss of theirs, whole."""
    y = model(x)
    (y.float() * torch.cos(torch.arange(5.0))).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), **{k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()}}


PARTS = ["", "norm", "mixer", "mixer.in_proj", "mixer.layernorm", "mixer.out_proj"]


@pytest.mark.parametrize("norm, again", [("rmsnorm", False), ("layernorm", True)])
@pytest.mark.parametrize("backend", ["python", "cpu"])
@pytest.mark.parametrize("path", PARTS)
def test_fully_shard_at_any_level(path, backend, again, norm, mesh):
    plain = tiny(torch.float32, block_norm=norm).train()
    x = images(plain)
    model = sharded(path, mesh, block_norm=norm)
    model.grad_checkpointing = again
    with fastvim.use_backend(backend):
        assert_close(gradients(model, x), gradients(plain, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["python", "cpu"])
@pytest.mark.parametrize("path", PARTS)
def test_fully_shard_in_bfloat16(path, backend, mesh):
    """The residual stream stays float32: blocks are told not to cast what they are given."""
    plain = tiny(torch.float32).train()
    x = images(plain)
    model = sharded(path, mesh, torch.bfloat16, cast=path != "")
    types = set()
    for block in model.layers:
        block.register_forward_hook(lambda block, given, result: types.add(result[1].dtype))
    with fastvim.use_backend(backend):
        actual, expected = gradients(model, x), gradients(plain, x)
    assert types == {torch.float32}
    for name, value in expected.items():
        assert (actual[name] - value).norm() < 0.05 * value.norm(), name


@pytest.mark.parametrize("backend", ["python", "cpu"])
def test_a_residual_stream_of_16_bits_is_refused(backend, mesh):
    model = sharded("", mesh, torch.bfloat16)
    with pytest.raises(TypeError, match="cast_forward_inputs=False"), fastvim.use_backend(backend):
        model(images(tiny(torch.float32)))


def test_evaluations_wait_for_nobody(mesh):
    """All weights are there, and stay: the processes' parts of a validation set differ in length."""
    model = sharded("", mesh)
    x = images(tiny(torch.float32))
    with torch.no_grad(), sharding.unsharded(model):
        model.eval()
        first = model(x)
        assert not any(hasattr(p, "full_tensor") for p in model.parameters())
        assert torch.equal(model(x), first)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    assert_close(gradients(model.train(), x), gradients(tiny(torch.float32).train(), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_mixers_weights_are_split_evenly(count):
    """Two directions would else be on two processes, and the others' parts empty."""
    split = sharding.even_axis(count)
    mixer = tiny(embed_dim=32).layers[0].mixer
    assert [split(p).dim for p in (mixer.D, mixer.x_proj, mixer.in_proj.weight)] == (
        [0, 0, 0] if count < 8 else [1, 2, 0])
    assert split(torch.empty(3)).dim == 0


@pytest.mark.parametrize("options, again", [({}, False), ({"static_graph": True}, True),
                                            ({"gradient_as_bucket_view": True}, True)])
def test_distributed_data_parallel(options, again, mesh):
    plain = tiny(torch.float32, class_token=True).train()
    x = images(plain)
    model = tiny(torch.float32, class_token=True).train()
    model.grad_checkpointing = again
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
    expected = outputs_and_gradients(plain, x)
    del expected["x"]
    for _ in range(2):                                    # a static graph is learnt in the first pass
        model.zero_grad()
        y = wrapped(x)
        (y * torch.cos(torch.arange(5, dtype=torch.float64)).to(y)).sum().backward()
        actual = {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}
        assert_close(actual, expected, rtol=1e-5, atol=1e-6)
