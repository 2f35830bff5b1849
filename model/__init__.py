"""GLM-5, written only with a binding's ops: config, checkpoint, attention, experts, MTP, cache, generation."""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, load, profile, trace

__all__ = ["DEMO", "Config", "Glm5", "load", "profile", "trace"]
