"""A chat format of `processing/turns.py` as a jinja chat template, which other programs render.

The template takes a message's content as one text or as a list of images and texts, and writes an
image as its placeholder. Makes text; renders nothing.
"""

from __future__ import annotations

import json

from visavis.processing.turns import Turn, TurnTemplate


def chat_jinja(template: TurnTemplate, image: str = "", video: str = "") -> str:
    """Return the source of a template that writes the same text; empty if none can.

    Args:
        image, video: what stands for one, within what the format writes around it; empty: the
            model takes none.
    """
    if any(turn.images_only for turn in template.turns.values()):
        return ""  # a template that drops words would be taken for a broken one
    visuals = [
        f"{{%- {keyword} part['type'] == '{kind}' -%}}"
        + _text(template.image_start + token + template.image_end)
        for keyword, kind, token in (("if", "image", image), ("elif", "video", video))
        if token
    ]
    text = "{{- part['text'] -}}"
    lines = [
        "{%- macro body(content) -%}",
        "{%- if content is string -%}{{- content -}}",
        "{%- else -%}{%- for part in content -%}",
        *([*visuals, "{%- else -%}", text, "{%- endif -%}"] if visuals else [text]),
        "{%- endfor -%}{%- endif -%}",
        "{%- endmacro -%}",
    ]
    if template.before:
        lines.append(_text(template.before))
    if template.system:
        lines += [
            "{%- if not messages or messages[0]['role'] != 'system' -%}",
            "{%- set messages = [{'role': 'system', 'content': "
            f"{json.dumps(template.system)}}}] + messages -%}}",
            "{%- endif -%}",
        ]
    lines += [
        "{%- set state = namespace(asked=false) -%}",
        "{%- for message in messages -%}",
    ]
    opening = "if"
    if template.first_user is not None:
        lines.append("{%- if message['role'] == 'user' and not state.asked -%}")
        lines += [*_turn(template.first_user), "{%- set state.asked = true -%}"]
        opening = "elif"
    for role, turn in template.turns.items():
        lines += [f"{{%- {opening} message['role'] == '{role}' -%}}", *_turn(turn)]
        opening = "elif"
    roles = ", ".join(template.turns)
    lines += [
        "{%- else -%}",
        f"{{{{- raise_exception('roles are {roles}') -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_text(template.turns['assistant'].start)}"
        "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"


def _turn(turn: Turn) -> list[str]:
    pieces = [
        _text(turn.start + turn.gap),
        "{{- body(message['content']) -}}",
        _text(turn.end + turn.after),
    ]
    return [piece for piece in pieces if piece]


def _text(text: str) -> str:
    """Return jinja that writes a text as it is."""
    return f"{{{{- {json.dumps(text)} -}}}}" if text else ""
