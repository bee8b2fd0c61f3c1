"""The models for torch.hub, from a clone or straight from GitHub:

    model = torch.hub.load("PATH", "fastvim_tiny", source="local", num_classes=10)
    model = torch.hub.load("PATH", "fastvim_small", source="local", checkpoint="FastVim_small.ckpt")
    torch.hub.list("OWNER/NAME"), torch.hub.help("OWNER/NAME", "fastvim_tiny")      # of GitHub
"""
import fastvim as _fastvim
import fastvim_hub as _fastvim_hub

dependencies = ["torch", "numpy", "einops"]


def _entry(name):
    def entry(pretrained=False, checkpoint=None, **fields):
        if pretrained:
            raise ValueError(_fastvim_hub.NO_WEIGHTS)
        model = _fastvim.create_model(name, **fields)
        if checkpoint is not None:
            print(_fastvim.load_checkpoint(model, checkpoint))
        return model
    entry.__name__ = name
    entry.__doc__ = (f"{name}, freshly initialised, with any field of fastvim.Config overridden."
                     "\n\ncheckpoint: a file to load, ours or a released one, strictly and safely.")
    return entry


for _name in _fastvim.list_models():        # torch.hub takes each function without underscore
    globals()[_name] = _entry(_name)
