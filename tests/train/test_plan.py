"""What a recipe would do: every problem at once, and numbers near those of the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import write_tiny_checkpoint
from tests.train.hub_configs import MODELS, save_settings
from tests.train.made_data import make_data
from visavis.api import load
from visavis.checkpoints.formats import detect
from visavis.checkpoints.inspect import model_parts
from visavis.checkpoints.native import write_native
from visavis.data.sources import open_data_source
from visavis.processing.prompt_config import PromptConfig
from visavis.train import cost_model
from visavis.train.data_loader import DataLoader
from visavis.train.distributed import TrainModule
from visavis.train.dry_run import plan
from visavis.train.param_groups import trainable_groups
from visavis.train.recipe import Recipe, StepsStage
from visavis.train.runner import run_recipe

SHAPES = {"format": "shapes", "path": "train"}
SHORT = {
    "kind": "steps",
    "name": "short",
    "steps": 2,
    "generative": {"sources": {"talk": {}}, "batch": 4},
    "train": {"connector": 1e-3},
}


def recipe(**changes: Any) -> Recipe:
    stage = {
        "kind": "steps",
        "name": "one",
        "epochs": 2,
        "generative": {"sources": {"talk": {}}, "batch": 40, "micro_tokens": 512},
        "train": {"connector": 1e-3, "language_model": 1e-4},
    }
    whole = {
        "name": "made",
        "model": {"base": "tiny-random"},
        "data": {"talk": {**SHAPES, "options": {"as": "chat"}}},
        "stages": [stage],
        "precision": "f32",
    }
    return Recipe.model_validate({**whole, **changes})


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def test_a_plan_says_what_trains_and_how_much_is_read(tmp_path: Path) -> None:
    made = plan(recipe(), tmp_path, flops=1e9)
    assert made.problems == [] and made.flops == 1e9
    (stage,) = made.stages
    rows = {row["part"]: row for row in stage.trains}
    assert rows["tower"]["trained"] == 0
    assert rows["decoder"]["learning rate"] == "0.0001"
    assert rows["connector"]["trained"] == rows["connector"]["parameters"]
    assert stage.steps == 200  # two epochs of 4,000
    (source,) = stage.sources
    assert (source.samples, source.share, source.epochs) == (4000, 1.0, 2.0)
    assert stage.operations is not None and stage.seconds == 200 * stage.operations / 1e9


def test_tokens_are_about_those_of_the_run(tmp_path: Path) -> None:
    made = plan(recipe(), tmp_path).stages[0]
    loader = DataLoader(load("tiny-random", precision="f32").encoder)
    samples = open_data_source(recipe().data["talk"], tmp_path, name="talk")
    counted = [len(loader.chat(samples[number]).token_ids) for number in range(40)]
    assert made.tokens_per_step == pytest.approx(sum(counted), rel=0.15)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    stages = [
        {
            "kind": "steps",
            "name": "first",
            "steps": 3,
            "generative": {"sources": {"talk": {}, "pairs": {}}, "max_tokens": 5000},
            "contrastive": {"sources": {"few": {}}, "batch": 64},
            "train": {"head": 1e-3, "lora": 1e-3, "connector": 1e-3},
            "lora_from": 9,
        },
        {
            "kind": "steps",
            "name": "second",
            "epochs": 1,
            "generative": {"sources": {"absent": {}, "wrong": {}}},
            "train": {"vision_tower": 1e-3},
            "vision_from": 7,
        },
    ]
    data = {
        "talk": {**SHAPES, "options": {"as": "chat"}},
        "pairs": {**SHAPES, "options": {"as": "find"}},
        "few": {**SHAPES, "options": {"as": "find"}, "cap": 20},
        "absent": {"format": "llava", "path": "talk.json"},
        "wrong": {**SHAPES, "options": {"sort": "chat"}},
        "unused": SHAPES,
    }
    model = {"base": "tiny-random", "lora": {}}
    made = plan(recipe(model=model, data=data, stages=stages), tmp_path)
    expected = [
        "the source 'absent' cannot be opened",
        "the options of the source 'wrong' do not fit",
        "stage 'first', 'pairs': the sample 'train-0' is a query with its target",
        "draws 64 queries a step of 20 samples",
        "trains 'head', which the model does not have",
        "trains 'lora', which the model does not have",
        "trains 'vision_tower', which the model does not have",
        "sequences of 5000 tokens (max_tokens), but the model's context is 1024",
    ]
    missing = [text for text in expected if not any(text in one for one in made.problems)]
    assert missing == [] and len(made.problems) == len(expected)
    assert any("no stage reads the source 'unused'" in note for note in made.notes)
    assert [stage.steps for stage in made.stages] == [3, None]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"base": "no-such-model"}, "model.base: no model is named 'no-such-model'"),
        ({"base": "somebody/something"}, "name a local folder that holds one"),
        (
            {"language_model": "tiny-random", "vision_tower": "here", "connector_weights": "gone"},
            "model.connector_weights: gone is no folder",
        ),
        ({"language_model": "tiny-random", "vision_tower": "nothing"}, "model.vision_tower"),
        ({"language_model": "nothing", "vision_tower": "tiny-random"}, "model.language_model"),
    ],
)
def test_parts_that_are_not_there(
    model: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_checkpoint(tmp_path / "here")
    (found,) = plan(recipe(model=model), tmp_path).problems
    assert problem in found


def test_broken_pictures_and_long_samples_are_named(tmp_path: Path) -> None:
    made = recipe(data={"talk": {"format": "llava", "path": "talk.json"}})
    make_data(made, tmp_path)
    (tmp_path / "picture.png").write_bytes(b"no picture")
    problems = plan(made, tmp_path).problems
    assert len(problems) == 2 and "picture.png" in problems[0] and "sample '0'" in problems[0]
    make_data(made, tmp_path)
    stage = made.stages[0].model_dump(exclude_unset=True)
    stage["generative"]["max_tokens"] = 20
    (problem,) = plan(made.model_copy(update={"stages": (StepsStage(**stage),)}), tmp_path).problems
    assert "the sample '1' has about" in problem and "expected at most 20" in problem
    stage["generative"]["cut"] = True
    made = made.model_copy(update={"stages": (StepsStage(**stage),)})
    assert plan(made, tmp_path).problems == []


def test_names_whose_features_are_made_need_no_picture(tmp_path: Path) -> None:
    made = recipe(data={"talk": {"format": "records", "path": "imagenet-classes"}})
    planned = plan(made, tmp_path)
    assert planned.problems == [] and planned.stages[0].tokens_per_step


def test_memory_is_near_what_is_held(tmp_path: Path) -> None:
    """Weights exactly; what autograd saves of a pass within a third."""
    made = plan(recipe(), tmp_path).stages[0]
    assert made.memory is not None
    model = load("tiny-random", precision="f32", device="cpu")
    whole = model.vlm.state_dict()
    whole.pop("decoder.head.weight")
    assert made.memory["weights"] == pytest.approx(sum(t.nbytes for t in whole.values()), rel=0.01)
    (stage,) = recipe().stages
    assert isinstance(stage, StepsStage)
    groups = trainable_groups(model.vlm, stage)
    trained = sum(p.numel() for group in groups.values() for p in group)
    assert made.memory["gradients"] == 4 * trained and made.memory["optimizer"] == 8 * trained
    samples = open_data_source(recipe().data["talk"], tmp_path, name="talk")[:8]
    loader = DataLoader(model.encoder)
    encoded = [loader.chat(sample) for sample in samples]
    batch = loader.pack(
        [sample.prompt for sample in samples],
        encoded,
        ids=[sample.id for sample in samples],
        labels=True,
    )
    saved: dict[int, int] = {}
    own = {p.data_ptr() for p in model.vlm.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TrainModule(model.vlm)(batch, "loss")
    config, learned = model.vlm.config.decoder, sum(sum(one.loss_mask) for one in encoded)
    expected = cost_model.activation_bytes(config, batch.num_tokens, 4, recomputed=False)
    expected += cost_model.score_bytes(config, learned, 4)
    assert 0.67 < expected / sum(saved.values()) < 1.5


def test_operations_are_six_a_weight_where_all_is_trained() -> None:
    vlm = load("tiny-random", precision="f32", device="cpu").vlm
    weights = sum(p.numel() for p in vlm.decoder.blocks.parameters() if p.dim() == 2)
    vlm.decoder.requires_grad_(True)
    numbers = {"cached": False, "recomputed": False}
    assert cost_model.step_operations(vlm, (10.0, 0.0, 0.0), 3, **numbers) == 6 * 30 * weights
    numbers = {"cached": True, "recomputed": True}
    assert cost_model.step_operations(vlm, (10.0, 0.0, 0.0), 3, **numbers) == 10 * 30 * weights
    vlm.decoder.requires_grad_(False)
    numbers = {"cached": False, "recomputed": False}
    assert cost_model.step_operations(vlm, (10.0, 0.0, 0.0), 3, **numbers) == 4 * 30 * weights


@pytest.mark.parametrize(
    ("name", "millions"),  # of published checkpoints
    [
        ("lmsys/vicuna-7b-v1.5", 6738),
        ("lmsys/vicuna-13b-v1.5", 13016),
        ("Qwen/Qwen2-VL-2B-Instruct", 2209),
        ("Qwen/Qwen2-VL-7B-Instruct", 8291),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3755),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8292),
        ("Qwen/Qwen3-VL-2B-Instruct", 2128),
        ("Qwen/Qwen3-VL-4B-Instruct", 4438),
        ("Qwen/Qwen3-VL-8B-Instruct", 8767),
        ("microsoft/Phi-3.5-vision-instruct", 4147),
        ("llava-hf/llava-v1.6-mistral-7b-hf", 7567),
        ("somebody/llava-onevision-qwen2-0.5b-ov", 894),
        ("BAAI/Aquila-VL-2B-llava-qwen", 1946),
        ("lmms-lab/llava-onevision-qwen2-7b-ov", 8030),
    ],
)
def test_published_settings_have_the_published_size(
    name: str, millions: int, tmp_path: Path
) -> None:
    """From config.json alone: no weights are beside it."""
    folder = save_settings(tmp_path, name)
    config, _ = detect(folder).format.read_config(folder)
    count = sum(part["parameters"] for part in model_parts(config))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("name", MODELS)
def test_settings_alone_say_how_images_are_sized(name: str, tmp_path: Path) -> None:
    folder = save_settings(tmp_path, name)
    assert detect(folder).format.read_config(folder)[1] is not None


def test_a_model_without_weights_is_planned_and_noted(tmp_path: Path) -> None:
    folder = save_settings(tmp_path, "Qwen/Qwen2-VL-2B-Instruct")
    made = plan(recipe(model={"base": str(folder)}), tmp_path, flops=1e12)
    assert made.problems == [] and made.stages[0].memory
    assert any("planned from its settings" in note for note in made.notes)


OWN_TEMPLATES = {  # of the language model -> the problem that a plan reports
    "": "brings no chat template",
    "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}": "",
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}": (
        "the model's own chat template does not show which tokens belong to the answer"
    ),
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}": (
        "it leaves the answer out"
    ),
}


@pytest.mark.parametrize("jinja", OWN_TEMPLATES)
def test_a_template_without_a_loss_mask_is_named(jinja: str, tmp_path: Path) -> None:
    model = load("tiny-random", precision="f32")
    model.profile = PromptConfig(jinja=jinja)
    (tmp_path / "model").mkdir()
    write_native(model, tmp_path / "model")
    problem = OWN_TEMPLATES[jinja]
    base = {"base": str(tmp_path / "model")}
    made = plan(recipe(model=base), tmp_path)
    assert any(problem in one for one in made.problems) == bool(made.problems) == bool(problem)
    named = plan(recipe(model={**base, "chat_template": "chatml-bare"}), tmp_path)
    assert named.problems == []
    if not problem:
        run_recipe(recipe(model=base, stages=[SHORT]), tmp_path, tmp_path / "out")
        assert (tmp_path / "out" / "model").is_dir()
