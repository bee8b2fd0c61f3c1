"""`import fastvim_timm`: timm.create_model, timm.list_models and the rest of timm know our models.

So does `import fastvim` where timm was imported before it."""
import timm  # noqa: F401

import fastvim
import fastvim_hub

fastvim_hub.register(fastvim.list_models(), fastvim.create_model)
