"""Chat formats as data: the strings around each role's text, and which of them are learned.

The formats of LLaVA, LLaVA-NeXT, LLaVE, TinyLLaVA and Phi-3-vision under their original names.
The formats are strings; `chat_template.py` renders them to ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Turn:
    """The strings around one role's text: `start`, `gap`, the text, `end`, `after`.

    An assistant's text and `end` are learned, the rest never is. An answer that is to be generated
    begins after `start`: `gap` is left to the model.

    Args:
        images_only: the role's texts are left out, as in LLaVA's first stage.
    """

    start: str
    end: str
    after: str = ""
    gap: str = ""
    images_only: bool = False


@dataclass(frozen=True)
class ChatFormat:
    """A chat format. Special tokens are written as their texts.

    Args:
        turns: by role; a role that is absent is refused.
        before: once, at the very start.
        system: the default system message of a conversation; where it is set, a system message
            may only come first.
        first_user: the first user turn, where the system text stands inside it.
        image_start, image_end: written around each image.
        joined: all text up to the next image is encoded as one, as LLaVA does; if not, each text,
            `start` and `end` is encoded by itself.
        stop: text that ends an answer, in formats without a token for that.
    """

    turns: dict[str, Turn]
    before: str = ""
    system: str = ""
    first_user: Turn | None = None
    image_start: str = ""
    image_end: str = ""
    joined: bool = False
    stop: str = ""


ROLES = ("system", "user", "assistant")
CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = CURIOUS_USER.replace("user", "human")
VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
SAFE_ASSISTANT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
# In formats whose images stand within <Image>…</Image>.
TAGGED = (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
ABLE_TO_SEE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    f"of tasks using natural language.{TAGGED}"
)
ABOUT_CONTENT = "Answer the questions about the visual content that the user provides."
EXAMPLE = (  # that of Vicuna v0, in every conversation
    "Human: What are the key differences between renewable and non-renewable energy sources?###"
    "Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n###"
)


def _human(system: str, example: str = "") -> ChatFormat:
    """Vicuna v0's: nothing but ### between turns, in text."""
    return ChatFormat(
        {
            "system": Turn("", f"###{example}"),
            "user": Turn("Human: ", "###"),
            "assistant": Turn("Assistant:", "###", gap=" "),
        },
        system=system,
        image_end="\n",
        joined=True,
        stop="###",
    )


def _tagged(template: ChatFormat) -> ChatFormat:
    return replace(template, image_start="<Image>", image_end="</Image>\n")


def _vicuna(system: str, eos: str) -> ChatFormat:
    return ChatFormat(
        {
            "system": Turn("", " "),
            "user": Turn("USER: ", " "),
            "assistant": Turn("ASSISTANT:", eos, gap=" "),
        },
        system=system,
        image_end="\n",
        joined=True,
    )


def _chatml(system: str, after: str) -> ChatFormat:
    return ChatFormat(
        {role: Turn(f"<|im_start|>{role}\n", "<|im_end|>", after) for role in ROLES},
        system=system,
        image_end="\n",
        joined=True,
    )


def _plain() -> ChatFormat:
    return ChatFormat(
        {"user": Turn("", "", images_only=True), "assistant": Turn("", "\n")}, joined=True
    )


def _llama_2(system: str) -> ChatFormat:
    """LLaMA-2's, where the system text stands inside the first question."""
    return replace(
        MISTRAL,
        turns={
            "system": Turn("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
            "user": Turn("<s>[INST] ", " [/INST]"),
            "assistant": MISTRAL.turns["assistant"],
        },
        system=system,
        first_user=Turn("", " [/INST]"),
    )


MISTRAL = ChatFormat(
    {"user": Turn("[INST] ", " [/INST]"), "assistant": Turn("", " </s>", gap=" ")},
    image_end="\n",
    joined=True,
)

CHAT_FORMATS = {
    # ChatML without a default system turn: the fewest tokens around a question.
    "chatml-bare": ChatFormat(
        {role: Turn(f"<|im_start|>{role}\n", "<|im_end|>", "\n") for role in ROLES}
    ),
    # LLaVA 1.5, LLaVA 1.6 of Vicuna, and what LLaVA's own command line takes for them.
    "vicuna_v1": _vicuna(CURIOUS_USER, "</s>"),
    "llava_v1": _vicuna(CURIOUS_HUMAN, "</s>"),
    "llava_v1_mmtag": _tagged(_vicuna(ABLE_TO_SEE, "</s>")),
    # LLaVA 1.0 of the first Vicuna.
    "v0": _human(CURIOUS_HUMAN, EXAMPLE),
    "llava_v0": _human(CURIOUS_HUMAN),
    "llava_v0_mmtag": _tagged(_human(ABLE_TO_SEE)),
    # LLaVA of LLaMA-2.
    "llama_2": _llama_2(SAFE_ASSISTANT),
    "llava_llama_2": _llama_2(VISION_ASSISTANT),
    "llava_llama_2_simple": _llama_2(ABOUT_CONTENT),
    "llava_llama_2_mmtag": _tagged(_llama_2(ABOUT_CONTENT + TAGGED)),
    "llava_llama_3": ChatFormat(
        {
            role: Turn(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
            for role in ROLES
        },
        system=VISION_ASSISTANT,
        image_end="\n",
        joined=True,
    ),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful "
        "and honest answers.",
        "",
    ),
    # LLaVA 1.6 of Hermes-Yi-34B and of Mistral.
    "chatml_direct": _chatml("Answer the questions.", ""),
    "mistral_instruct": MISTRAL,
    "mistral_orca": _chatml(
        "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your "
        "reasoning step-by-step to be sure you get the right answers!",
        "",
    ),
    "mistral_zephyr": ChatFormat(
        {role: Turn(f"<|{role}|>\n", "</s>") for role in ROLES},
        system="You are a helpful AI assistant.",
        image_end="\n",
        joined=True,
    ),
    # LLaVA-OneVision and LLaVE.
    "qwen_1_5": _chatml("You are a helpful assistant.", "\n"),
    "qwen_2_5": _chatml(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "\n"
    ),
    "gemma_instruct": ChatFormat(
        {
            "user": Turn("<start_of_turn>user\n", "<end_of_turn>", "\n"),
            "assistant": Turn("<start_of_turn>model\n", "<end_of_turn>", "\n"),
        },
        image_end="\n",
        joined=True,
    ),
    # Phi-3-vision and Phi-3.5-vision.
    "phi3_v": ChatFormat(
        {role: Turn(f"<|{role}|>\n", "<|end|>", "\n") for role in ROLES},
        image_end="\n",
        joined=True,
    ),
    # TinyLLaVA, by the language model's family (its `llama` is vicuna_v1).
    "tinyllava_phi": _vicuna(CURIOUS_USER, "<|endoftext|>"),
    "tinyllava_gemma": _vicuna(CURIOUS_USER, "<eos>"),
    "tinyllava_qwen2_base": _vicuna(CURIOUS_USER, "<|endoftext|>"),
    "tinyllava_qwen2_instruct": _vicuna(CURIOUS_USER, "<|im_end|>"),
    # First stage of LLaVA and TinyLLaVA: a picture and its caption, no words around them.
    "plain": _plain(),
}
CHAT_FORMATS |= {  # other names of the same
    "default": CHAT_FORMATS["v0"],
    "v1": CHAT_FORMATS["vicuna_v1"],
    "v0_mmtag": CHAT_FORMATS["llava_v0_mmtag"],
    "v1_mmtag": CHAT_FORMATS["llava_v1_mmtag"],
    "v0_plain": CHAT_FORMATS["plain"],
    "llava_mistral_instruct": CHAT_FORMATS["mistral_instruct"],
    "mistral_direct": CHAT_FORMATS["chatml_direct"],
    "qwen_2": CHAT_FORMATS["qwen_1_5"],
    "tinyllava_llama": CHAT_FORMATS["vicuna_v1"],
}
