"""What `python fastvim.py` prints: sizes and times of the models, Figure 4, the state of a machine.

    python fastvim.py                           every model: parameters, multiply-adds, time
    python fastvim.py --models tiny             only those with "tiny" in their name
    python fastvim.py --resolution 224 512      multiply-adds of ViT-T, Vim-T, FastVim-T (Figure 4)
    python fastvim.py doctor                    torch, devices, compilers, backends
"""
import argparse
import collections
import math
import os
import re
import subprocess
import sys

import torch

import fastvim
import fastvim_build


def count_macs(cfg: fastvim.Config, kept: float = 1.0) -> dict[str, int]:
    """Multiply-adds of one image's forward pass, by part. kept: of the tokens, by a mask.

    The matrix products are exact. As is usual since fvcore, the scan counts 9 p e n a direction and
    a norm 5 per element. SiLU, gate, pooling, D skip and residual additions do not count."""
    lengths = {axis: math.ceil(pixels / size) for axis, (pixels, size) in cfg.extents.items()}
    tokens = math.prod(lengths.values())
    patches = tokens // lengths.get("c", 1)                 # of all channels
    pixels = math.prod(size for _, size in cfg.extents.values())
    d = cfg.embed_dim
    e = cfg.expand * d
    n = cfg.d_state
    r = cfg.dt_rank or math.ceil(d / 16)
    l = int(kept * tokens) + cfg.class_token
    macs = collections.Counter(patch_embed=patches * d * cfg.in_chans * pixels,
                               norm=5 * l * d, head=d * cfg.num_classes)
    for i in range(cfg.depth):
        _, pooled = cfg.rows[i % len(cfg.rows)]
        p = l
        if pooled:                                                          # steps of the scan
            p = math.prod(lengths[axis] for axis in lengths if axis not in pooled) + cfg.class_token
        macs["in_proj"] += l * d * 2 * e
        macs["conv1d"] += 2 * l * e * cfg.d_conv
        macs["score"] += 2 * l * e * (cfg.pool == "attention")
        macs["x_proj"] += 2 * p * e * (r + 2 * n)
        macs["dt_proj"] += 2 * p * r * e
        macs["scan"] += 2 * 9 * p * e * n
        macs["out_proj"] += l * e * d
        macs["norm"] += 5 * l * (d + e * (cfg.ssm_norm is not None))
    return dict(macs)


def count_vit_macs(img_size: int) -> int:
    """Multiply-adds of ViT-T (DeiT) with a class token, for the comparison of Figure 4."""
    d = 192
    patches = math.ceil(img_size / 16) ** 2
    l = patches + 1
    blocks = 12 * (12 * l * d * d + 2 * l * l * d)
    return patches * d * 3 * 16 ** 2 + blocks + d * 1000


def measure_milliseconds(model: fastvim.FastVim, device: str, kept: float = 1.0) -> float:
    """Time of one image: the median of half a second of runs, at least one, after the first.

    model: without weights, on the meta device."""
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    lengths = [length for axis, (length, _) in model.cfg.extents.items() if axis != "c"]
    x = torch.randn(1, model.cfg.in_chans, *lengths, device=device)
    keep = None
    if kept < 1:
        tokens = math.prod(model.grid_size)
        keep = torch.randperm(tokens, device=device)[None, :int(kept * tokens)]
    from torch.utils.benchmark import Timer  # here: it looks for CUDA, and warns that there is none
    timer = Timer("model(x, keep=keep).sum().item()", num_threads=torch.get_num_threads(),
                  globals=dict(model=model, x=x, keep=keep))
    with torch.inference_mode():
        return 1e3 * timer.blocked_autorange(min_run_time=0.5).median


def print_models(text: str) -> None:
    """The table of all models that have `text` in their name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in fastvim.list_models() if text in name]
    if not names:
        raise ValueError(f"no model has {text!r} in its name; the models are: "
                         f"{', '.join(fastvim.list_models())}")
    print(f"backend {fastvim.pick_backend(device).name} on {device}, {torch.get_num_threads()} "
          "threads, float32, batch 1; FastMaskVim keeps 25 % of its tokens\n"
          "(the largest take seconds to minutes; --models tiny: the smallest)")
    print(f"{'model':24} {'parameters':>12} {'G multiply-adds':>16} {'ms / image':>11}")
    for name in names:
        with torch.device("meta"):
            model = fastvim.create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        kept = 0.25 if name.startswith("fastmaskvim") else 1.0
        macs = sum(count_macs(model.cfg, kept).values()) / 1e9
        milliseconds = measure_milliseconds(model, device, kept)
        print(f"{name:24} {parameters:12,} {macs:16.2f} {milliseconds:11.1f}", flush=True)


def print_figure_4(resolutions: list[int]) -> None:
    """Multiply-adds of ViT-T, Vim-T and FastVim-T, a line for each resolution."""
    print("G multiply-adds by resolution (the paper's Figure 4)")
    print(f"{'pixels':>8} {'ViT-T':>10} {'Vim-T':>10} {'FastVim-T':>10}")
    for pixels in resolutions:
        counts = [count_vit_macs(pixels)]
        for family in ("vim", "fastvim"):
            cfg = fastvim.Config(img_size=pixels, **fastvim.model_fields(f"{family}_tiny"))
            counts.append(sum(count_macs(cfg).values()))
        print(f"{pixels:8} " + " ".join(f"{count / 1e9:10.2f}" for count in counts))


def print_machine() -> None:
    """What this machine has: torch, devices, compilers, backends; builds the backends."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"python    {sys.version.split()[0]}\n"
          f"torch     {torch.__version__} (CUDA {torch.version.cuda})\n"
          f"cpu       {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}\n"
          f"gpu       {', '.join(gpus) or 'none'}")
    found = "not found: install g++, or set CXX"
    if compiler := fastvim_build.find_compiler():
        command = [*compiler, "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found = " ".join([*re.findall(r"\d+(?:\.\d+)+", said)[:1], *compiler])
    print(f"C++       {found}\n"
          f"nvcc      {fastvim_build.find_nvcc()[1]}")
    print(f"backends  FASTVIM_BACKEND is {os.environ.get('FASTVIM_BACKEND') or 'not set'}")
    for backend in fastvim.BACKENDS.values():
        state = "no GPU here"
        if gpus or "cuda" not in backend.devices:
            state = backend.problem() or backend.why                        # asking compiles it
        print(f"  {backend.name:8} {', '.join(backend.devices) or 'every device'}: {state}")
    for device in ["cpu", "cuda"] if gpus else ["cpu"]:
        print(f"  on {device} models run by {fastvim.pick_backend(device).name!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="fastvim.py",
        description="The models: parameters, multiply-adds at 224 px, time per image.")
    parser.add_argument("command", nargs="?", choices=["table", "doctor", "trace"], default="table",
                        help="table: every model, measured here (default); doctor: this machine; "
                        "trace: an image through two blocks, step by step")
    parser.add_argument("image", nargs="?", help="for trace")
    parser.add_argument("--weights", metavar="CKPT", help="for trace (default: random)")
    parser.add_argument("--out", default="trace.png", help="picture of trace (trace.png)")
    parser.add_argument("--models", default="", metavar="TEXT",
                        help="only names that contain TEXT, such as tiny")
    parser.add_argument("--resolution", type=int, nargs="+", metavar="PX",
                        help="instead: multiply-adds of ViT-T, Vim-T, FastVim-T there (Figure 4)")
    args = parser.parse_args()
    if (args.command == "trace") != bool(args.image):
        parser.error("trace, and nothing else, is given an image")
    if args.resolution and min(args.resolution) < 16:
        parser.error("--resolution: at least 16 pixels, one patch")
    try:
        if args.command == "doctor":
            print_machine()
        elif args.command == "trace":
            try:
                import walkthrough  # here: this file is installed without what the scripts need
            except ModuleNotFoundError as error:
                parser.error(f"trace needs a clone, and pip install -e '.[train]' there ({error})")
            walkthrough.trace(args.image, args.out, args.weights)
        elif args.resolution:
            print_figure_4(args.resolution)
        else:
            print_models(args.models)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
