"""Chat formats as jinja, for `tokenizer.chat_template`: what a GGUF file can say of them.

llama.cpp puts a mark where a picture stands and hands a template the text around it; what belongs
beside a picture (LLaVA's newline after each) is therefore written beside that mark. Knows no
tokenizer.
"""

from __future__ import annotations

import json

from visavis.processing.profile import PromptProfile
from visavis.processing.turns import TURNS, Turn, TurnTemplate
from visavis.registry import lookup

MARK_START, MARK_END = "<__media", "__>"  # what llama.cpp's marks begin and end with


def chat_template(profile: PromptProfile, bos: str) -> str:
    """Return a jinja chat template that writes a profile's turns; empty where there are none.

    Of the formats of `turns.py` only `plain`, which leaves the user's words out, has none.

    Args:
        bos: what every conversation begins with.
    """
    if not profile.turns:
        return profile.jinja
    turns = lookup("turn template", profile.turns, TURNS)
    if any(turn.images_only for turn in turns.turns.values()):
        return ""
    image = (turns.image_start + profile.image_start, profile.image_end + turns.image_end)
    return _jinja(turns, bos, _content(*image))


def _jinja(template: TurnTemplate, bos: str, content: str) -> str:
    """Return jinja that renders turns as `templates.encode_turns` does.

    Args:
        content: an expression, what a message says.
    """

    def around(turn: Turn, text: str) -> str:
        before, after = _quoted(turn.start + turn.gap), _quoted(turn.end + turn.after)
        return f"{{{{ {before} + {text} + {after} }}}}"

    pieces = [f"{{{{ {_quoted(bos + template.before)} }}}}"]
    if template.system:
        own = around(template.turns["system"], _quoted(template.system))
        absent = "not messages or messages[0]['role'] != 'system'"
        pieces.append(f"{{% if {absent} %}}{own}{{% endif %}}")
    pieces.append("{% set seen = namespace(user=false) %}{% for message in messages %}")
    word = "if"
    for role, turn in template.turns.items():
        body = around(turn, content)
        if role == "user" and template.first_user is not None:
            first = around(template.first_user, content)
            once = "{% set seen.user = true %}"
            body = f"{{% if seen.user %}}{body}{{% else %}}{first}{once}{{% endif %}}"
        pieces.append(f"{{% {word} message['role'] == '{role}' %}}{body}")
        word = "elif"
    generation = _quoted(template.turns["assistant"].start)
    pieces.append("{% else %}{{ raise_exception('no such role in this chat format') }}")
    pieces.append("{% endif %}{% endfor %}")
    pieces.append(f"{{% if add_generation_prompt %}}{{{{ {generation} }}}}{{% endif %}}")
    return "".join(pieces)


def _content(image_start: str, image_end: str) -> str:
    """Return the expression of a message's text, with what belongs beside its pictures."""
    text = "message['content']"
    if image_start:
        text += f" | replace({_quoted(MARK_START)}, {_quoted(image_start + MARK_START)})"
    if image_end:
        text += f" | replace({_quoted(MARK_END)}, {_quoted(MARK_END + image_end)})"
    return f"({text})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
