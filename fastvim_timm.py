"""`import fastvim_timm`: timm.create_model, timm.list_models and the rest of timm know our models.

So does `import fastvim` where timm was imported before it."""
import timm  # noqa: F401

import fastvim
import fastvim_hub

configs = {name: fastvim.Config(**fastvim.model_fields(name)) for name in fastvim.list_models()}
fastvim_hub.register(configs, fastvim.create_model)
