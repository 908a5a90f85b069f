"""Texts that tokenizers get wrong: scripts, emoji, code, digits, whitespace runs, special tokens.

Deterministic; knows no tokenizer.
"""

from __future__ import annotations

import random

FRAGMENTS = {
    "words": [
        *["The", "quick", "brown", "foxes", "jumps", "over", "a", "I", "Internationalisation"],
        *["don't", "we'll", "They've", "it's", "I'm", "he'd", "WON'T", "O'Brien"],
        *["naïve", "café", "Straße", "ǅ", "ﬁne"],
    ],
    "scripts": [
        *["Привет", "мир", "Ελληνικά", "שלום", "العربية", "हिन्दी", "ไทยภาษา"],
        *["日本語", "テスト", "中文字符", "한국어", "ქართული", "አማርኛ"],
        *["e\u0301", "नि", "👨‍👩‍👧‍👦", "İstanbul", "ſhip", "Ⅷ", "½", "²", "٣٤", "一二三", "ǆ"],
    ],
    "emoji": ["😀", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☃", "\u200d", "\ufe0f", "🧑‍💻"],
    "code": [
        "def f(x):\n    return x**2\n",
        "#include <stdio.h>\r\nint main(void) { return 0; }",
        "SELECT * FROM t WHERE a='b';",
        "a[i]+=b->c&&!d||e",
        '{"key": [1, 2.5e-3, null]}',
        "<div class='x'>&nbsp;</div>",
        "https://example.org/a?b=c&d=%20#e",
        "\\alpha_{i}^{2}",
        "$100.00 = €85,50",
        "`~!@#$%^&*()-_=+[]{}|;:'\",.<>/?",
    ],
    "digits": [
        "0",
        "7",
        "42",
        "123",
        "2024",
        "3.14159",
        "1,000,000",
        "0x1F",
        "12345678901234567890",
    ],
    "space": [" ", "  ", "   ", "        ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\n  \n\t"],
    "odd space": [
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\x0b",
        "\x0c",
        "\x85",
    ],
    "control": ["\x01", "\x1b[0m", "\x7f", "\ufffd", "\ue000", "\U000f0000", "\U0010fffd"],
    "almost special": ["<|im_start", "im_end|>", "<|", "|>", "<s", "</", "<0x41>", "<unk", "▁"],
}


def texts(count: int, specials: list[str], seed: int = 0) -> list[str]:
    """Return `count` different texts, about a third of them with special tokens."""
    generator = random.Random(seed)
    kinds = list(FRAGMENTS.values())
    found = dict.fromkeys(fragment for kind in kinds for fragment in kind)
    while len(found) < count:
        pieces = []
        for _ in range(generator.randint(1, 12)):
            choice = generator.random()
            if specials and choice < 0.04:
                pieces.append(generator.choice(specials))
            elif choice < 0.2:
                pieces.append(generator.choice(FRAGMENTS["space"]))
            elif choice < 0.25:
                pieces.append(
                    chr(
                        generator.choice((0x80, 0x800, 0x2000, 0x10000))
                        + generator.randrange(0x700)
                    )
                )
            else:
                pieces.append(generator.choice(generator.choice(kinds)))
        found[generator.choice(("", "", " ")).join(pieces)] = None
    return list(found)[:count]
