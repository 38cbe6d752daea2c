"""Reader of Hugging Face's config.json: its fields become a model section.

Only what decides shapes is read. A field that looks like a shape and is not read is refused by name, since a forecast
which ignores it would be wrong without saying so.
"""

from __future__ import annotations

import re
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.validation import validate
from simulator.job.huggingface_families import ARCHITECTURES
from simulator.job.huggingface_fields import Fields
from simulator.job.model import Model


def _plain(name: str) -> str:
    """`qwen3_moe` and `Qwen3MoeForCausalLM` both as qwen3moe."""
    name = re.sub(r"(Model)?(ForCausalLM|ForConditionalGeneration|LMHeadModel)$|_text$", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())


_MODEL_TYPES = {_plain(name): name for name in ARCHITECTURES} | {
    "kimik2": "DeepseekV3ForCausalLM",
    "skyworkmoe": "SkyworkForCausalLM",
}


def is_huggingface(data: dict[str, Any]) -> bool:
    """Whether `data` is a Hugging Face config rather than a model section."""
    return "architectures" in data or "model_type" in data


def _architecture(config: dict[str, Any], where: str) -> str:
    named = config.get("architectures")
    if named:
        field, value = "architectures", named[0] if isinstance(named, list) else named
        found = value if isinstance(value, str) and value in ARCHITECTURES else None
    elif config.get("model_type"):
        field, value = "model_type", config["model_type"]
        found = _MODEL_TYPES.get(_plain(str(value)))
    else:
        raise QuestionError(f"{where}: architectures: required, and missing")
    if found is None:
        text = f"{where}: {field} = {str(value)[:60]!r}: no reader for it"
        raise QuestionError(f"{text}{nearest(str(value), ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}")
    return found


def model_from_huggingface(config: dict[str, Any], name: str) -> Model:
    """The model that `config` describes, called `name`; of a multimodal one the text model.

    Raises QuestionError, one line, for an unknown architecture, a missing or wrong field, and a field that may change
    the cost and is not understood.
    """
    architecture = _architecture(config, name)
    text, notes = config, None
    if "text_config" in config:
        text = config["text_config"]
        if not isinstance(text, dict):
            raise QuestionError(f"{name}: text_config: a mapping of fields is needed")
        notes = "The text model only: vision and audio parts of the configuration are left out."
        text = {key: config[key] for key in ("tie_word_embeddings",) if key in config} | text
    fields = Fields(text, name)
    data = ARCHITECTURES[architecture](fields)
    fields.check_all_read()
    source = f"Hugging Face config.json, {architecture}"
    return validate(Model, data | {"name": name, "source": source, "notes": notes}, name)
