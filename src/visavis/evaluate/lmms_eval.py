"""visavis as a model of the package lmms-eval, found by its entry point `lmms_eval.models`.

    lmms-eval --model visavis --model_args pretrained=nano --tasks pope --batch_size 1

lmms-eval is not a dependency: install it beside visavis, in an environment of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from visavis.errors import InputError
from visavis.inputs import Prompt

if TYPE_CHECKING:
    from visavis.api import Model

TOKENS = ("<image>", "<video>")
SETTINGS = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_new_tokens"}


def manifest() -> ModelManifest:
    """Return the model manifest that lmms-eval registers."""
    return ModelManifest(model_id="visavis", simple_class_path=f"{__name__}.Visavis")


class Visavis(lmms):  # type: ignore[misc]
    """A visavis model that answers lmms-eval's requests.

    Args:
        pretrained: a bundled name, a folder, a .gguf file or a hub id.
        batch_size: answers that grow at the same time.
        settings: further arguments of `visavis.load`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "nano",
        batch_size: int | str = 8,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        from visavis.api import load

        self.visavis: Model = load(pretrained, device=device, **settings)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return an answer to each request, greedy unless the task asks otherwise."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = _settings(requests[numbers[0]].args[1])
            prompts = [self._prompt(requests[number].args) for number in numbers]
            replies = self.visavis.chat_many(prompts, max_sequences=self.batch_size, **settings)
            for number, reply in zip(numbers, replies, strict=True):
                answers[number] = reply.text
        return [answer or "" for answer in answers]

    def _prompt(self, arguments: tuple[Any, ...]) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for token in TOKENS:
            context = context.replace(token, "")
        return Prompt.chat(context.strip(), visuals)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise InputError("visavis answers lmms-eval's tasks of one round only")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise InputError(
            "visavis gives lmms-eval answers, not likelihoods; choose a generating task"
        )


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return lmms-eval's generation settings as those of `Model.chat_many`."""
    found = {
        ours: given[theirs] for theirs, ours in SETTINGS.items() if given.get(theirs) is not None
    }
    if not given.get("do_sample", True) or not found.get("temperature"):
        found.pop("temperature", None)
        found.pop("top_p", None)
    if (given.get("num_beams") or 1) > 1:
        found["beams"] = given["num_beams"]
    until = given.get("until")
    stops = [until] if isinstance(until, str) else list(until or [])
    found["stop"] = [text for text in stops if text]
    found.setdefault("max_new_tokens", 1024)
    return found
