"""A conditioned model on disk: safetensors and JSON, the base model by reference. See `manifest` for the format."""

from clp_engine.checkpoint.fingerprint import base_fingerprint
from clp_engine.checkpoint.hub import find, is_conditioned, push
from clp_engine.checkpoint.loading import load, load_copies, outline, read_prompt_template, verify
from clp_engine.checkpoint.manifest import CONFIG_FILE, FORMAT_VERSION, Manifest
from clp_engine.checkpoint.saving import save

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "Manifest",
    "base_fingerprint",
    "find",
    "is_conditioned",
    "load",
    "load_copies",
    "outline",
    "push",
    "read_prompt_template",
    "save",
    "verify",
]
