"""Export of a trained model: a folder that `visavis.load` reads, and its adapters for PEFT.

    model/                     trained weights, on top of bundled ones (nano), else all weights with
                               adapters merged
    model/adapter/             the adapters alone, with a connector that was trained with them,
                               on a base in transformers' format

Both are replaced atomically.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from visavis.checkpoints.adapters import adapter_chain
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.compose import EFFICIENTNET, MINILM_NAME
from visavis.checkpoints.formats import detect_config
from visavis.checkpoints.load import resolve
from visavis.checkpoints.native import TEXT_TOKENIZER, save_native, write_native
from visavis.checkpoints.tensor_files import read_json
from visavis.checkpoints.transformers.load import TransformersFormat
from visavis.checkpoints.transformers.weights import vlm_table
from visavis.errors import CheckpointError, TrainError
from visavis.model.vlm import VLM
from visavis.train.lora import merged_state, native_pairs, write_peft
from visavis.train.recipe import Recipe, StepsStage
from visavis.utils import write_folder_atomically

BUNDLED = ("smollm2-135m", EFFICIENTNET)  # parts of the bundle "nano"


def save_model(loaded: Checkpoint, recipe: Recipe, folder: Path) -> list[str]:
    """Write the finished model; return the reason for each file that could not be written.

    Raises:
        TrainError: the disk is full; the folder is as it was.
    """
    named = replace(loaded, name=recipe.name)
    problem = ""
    try:
        with write_folder_atomically(folder) as temporary:
            if stands_on_bundle(recipe):
                _write_on_bundle(named, recipe, temporary)
            else:
                write_native(named, temporary, state=merged_state(loaded.vlm))
                if recipe.model.lora is not None:
                    problem = _write_adapter(loaded.vlm, recipe, temporary / "adapter")
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"the model could not be written to {folder} ({' '.join(str(error).split())}); what "
            "was there before is intact. All steps of the stage are in its last checkpoint: free "
            "some space, or raise a limit on file sizes, and run the same command again."
        ) from error
    return [f"adapter/ is not written: {problem}"] if problem else []


def trained_parts(recipe: Recipe) -> set[str]:
    """Return the parts that some stage changes."""
    parts = {"words": {"connector"}, "head": {"head"}}
    return {
        part
        for stage in recipe.stages
        for part in (stage.train if isinstance(stage, StepsStage) else parts[stage.kind])
    }


def stands_on_bundle(recipe: Recipe) -> bool:
    """Return whether bundled weights and what was trained are the whole model."""
    model = recipe.model
    return (
        (model.language_model, model.vision_tower) == BUNDLED
        and model.text_tower in ("", MINILM_NAME)
        and not {"language_model", "vision_tower"} & trained_parts(recipe)
        and not model.quantize
        and not (model.lora is not None and model.lora.dora)
    )


def _write_on_bundle(loaded: Checkpoint, recipe: Recipe, folder: Path) -> None:
    """Write what was trained, float16: connector, head, adapters."""
    lora = recipe.model.lora
    save_native(
        folder,
        name=loaded.name,
        config=loaded.vlm.config,
        tensors={
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in own_tensors(loaded.vlm).items()
        },
        profile=loaded.profile,
        processor=loaded.processor,
        bundle="nano",
        lora_scale=lora.scale if lora is not None else 1.0,
        file_name="adapter.safetensors",
    )
    if loaded.text_tokenizer is not None:
        loaded.text_tokenizer.save(str(folder / TEXT_TOKENIZER))


def own_tensors(vlm: VLM) -> dict[str, Tensor]:
    """Return the weights that are not bundled: all but decoder and tower, and adapters."""
    state = {
        name: tensor.detach().cpu()
        for name, tensor in vlm.state_dict().items()
        if name.partition(".")[0] not in ("decoder", "tower", "text_tower")
    }
    return state | {name: tensor.cpu() for name, tensor in native_pairs(vlm).items()}


def _write_adapter(vlm: VLM, recipe: Recipe, folder: Path) -> str:
    """Write the adapters for PEFT; return why not, if they cannot be."""
    assert recipe.model.lora is not None
    if not recipe.model.base:
        return "the model is composed of parts, and no folder holds its base"
    trained = trained_parts(recipe)
    if others := trained - {"lora", "connector"}:
        return f"{', '.join(sorted(others))} was trained beside, which no adapter holds"
    if "connector" in trained and vlm.image_newline is not None:
        return "the connector was trained beside, and PEFT has no place for its image_newline"
    try:
        _, base = adapter_chain(resolve(recipe.model.base), None)
        if not (base / "config.json").is_file():
            return "its base is no folder in transformers' layout; `visavis convert` it first"
        layout = detect_config(base)
        if not issubclass(layout.format, TransformersFormat):  # PEFT goes by their tensors' names
            return f"its base is in the layout {layout.title}; `visavis convert` it first"
        write_peft(
            vlm,
            vlm_table(read_json(base / "config.json"), vlm.config),
            folder,
            base=recipe.model.base,
            recipe=recipe.model.lora,
            whole="connector" in trained,
        )
    except (CheckpointError, TrainError) as error:
        return str(error)
    return ""
