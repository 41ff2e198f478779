"""One notation for what people and models write in many: spacing, delimiters, fonts, fractions, Unicode."""

from __future__ import annotations

import re

from ctpo_megatron.rollout.grading.boxes import closing

_UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "±": r"\pm ", "²": "^{2}", "³": "^{3}", "，": ",", "（": "(", "）": ")", "：": ":", "；": ";", "％": "%",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "′": "'", "’": "'",
    "→": r"\to ", "∠": r"\angle ", "△": r"\triangle ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|\{,\}\\!|\\ |~|\\;|\\:)(?=\d{3}(?!\d))", "{,}"),  # between groups of digits
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|!|allowbreak)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|enspace|thinspace)(?![a-zA-Z]))|~", " "),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|(?<![\d)}])!=", r"\\ne "),  # but 3!=6
        (r"\\(le|ge|ne|in|cup|cap)(?![a-zA-Z]) *", r"\\\1 "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\\mathbb\s*([A-Z])(?![a-zA-Z])|\\(R)(?![a-zA-Z])", r"\\mathbb{\1\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])\s*([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])\s*([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\l?dots(?![a-zA-Z])|\\cdots(?![a-zA-Z])", "..."),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\(?:l|r)?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}|\\text\{\s*empty set\s*\}", r"\\emptyset "),
        (r"\{\}\s*\^|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])|\\text\{\s*degrees?\s*\}", r"^\\circ "),
        (r"\^\\circ \s*\^\\circ ", r"^\\circ "),
        (
            r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|textbf|textit|textrm|textsf|textnormal|mbox|hbox|emph|operatorname|bf|rm)\s*\{",
            r"\\text{",
        ),
        (r"\{\\(?:rm|bf|it)\s+", r"\\text{"),
        (r"\\text\{\s*([A-Za-z])\s*\}(?=[_^+=*/-])", r"\1"),
        (r"\\text\{([^{}a-zA-Z]*)\}", r"\1"),
        (r"\\text\{\s*(-?\d[\d.,/]*)\s+((?!(?:and|or|to|of|out)\b)[a-zA-Z][^{}\d]*)\}", r"\1\\text{ \2}"),  # \text{3 cm}
        (r"\\text\{((?:\(?[A-Z]\)?)(?:\s*(?:,|;|and|or)\s*\(?[A-Z]\)?)+)\}", r"\1"),
        (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
        (r"(?<![a-zA-Z\\])(?:C|\\text\{C\})_\{?(\w+)\}?\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),
        (r"\A\s*(?:=|\\approx(?![a-zA-Z]))", ""),
        (r"(?<!\\text\{)(?<![a-zA-Z\\])(?:positive )?infinity(?![a-zA-Z])|\\text\{\s*infinity\s*\}", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?:\\text\{\s*)?\ball real numbers(?:\s*\})?", r"\\mathbb{R}"),
        (r"(?<=[A-Z)]) and (?=\(?[A-Z]\b)", ", "),
        (r",?\s*\\text\{\s*and\s*\}\s*|,?\s+and\s+", ", "),
        (r",?\s*\\text\{\s*or\s*\}\s*|,?\s+or\s+|\s*\\(?:lor|vee)(?![a-zA-Z])\s*", "; "),
        (r"\\%|\\text\{\s*(?:percent|%|\\%)\s*\}|(?<=[\d}) ])\s*percent\b", "%"),
        (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\w|\\pi(?![a-zA-Z]))", r"\\sqrt\1{\2}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"\*\*", "^"),
        (r"\^\(([^()]*)\)", r"^{\1}"),
        (r"\s+", " "),
        (r"(?<=[^a-zA-Z]) ?(\+|=|<|>|\^|/|\*) ?|(?<=[a-zA-Z]) (\+|=|<|>|\^|/|\*) ?|(?<=[a-zA-Z])(\+|=|<|>|\^|/|\*) ", r"\1\2\3"),
        (r"(?<=[({\[,;+*/=^]) ?- +", "-"),
        (r"(?<=[({\[]) +| +(?=[)}\]])", ""),
        (r"\A- +", "-"),
    )
)
_MULTIPLE = re.compile(r"(?<=[\d}])\s*(\\text\{\s*)?(hundred|thousand|million|billion|trillion|dozen)(?![a-z])")
_MULTIPLES = {
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "dozen": "12",
}
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_FRAME = re.compile(r"\\(?:f?box(?:ed)?|underline)\s*\{")
_TWO_ARGUMENTS = re.compile(r"\\[dtc]?(frac|binom)(?![a-zA-Z])")
_ARGUMENT = re.compile(r"\s*(?:([a-zA-Z0-9]|\\(?:pi|alpha|beta|theta|lambda|phi|omega)(?![a-zA-Z]))|\{)")
_END = re.compile(r"(?:\s|(?<!\\)[.,;]|\\(?:[,;:! ]|\\|$))+\Z")  # full stops, commas and space of LaTeX, such as \, and \\
_FONT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|bm|boldsymbol)\{")
_SIDE_BY_SIDE = re.compile(r"(?<!\\)\$")
_EASY = re.compile(r"[+-]?[\d.]*\d")


def tidy(text: str) -> str:
    """Returns `text` in the one notation that the other modules of this package read. What it means stays as it is."""
    text = text.strip()
    if _EASY.fullmatch(text):
        return text
    text = _with_arguments(_bare(text.translate(_TRANSLATION)))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _MULTIPLE.sub(lambda found: f"\\times {_MULTIPLES[found[2]]}" + ("\\text{" if found[1] else ""), text)
    return _without_end(text.replace("\\text{}", "").strip())


def _bare(text: str) -> str:
    """`text` without the delimiters of mathematics, nested boxes and bold marks around it."""
    before = ""
    while before != text:
        before = text
        text = text.strip()
        for opening, ending in _DELIMITERS:
            inside = text[len(opening) : -len(ending)]
            if len(text) > len(opening) + len(ending) and text.startswith(opening) and text.endswith(ending):
                text = inside if opening not in inside else text
        frame = _FRAME.match(text)
        if frame is not None and closing(text, frame.end()) == len(text) - 1:
            text = text[frame.end() : -1]
        font = _FONT.match(text)
        if font is not None and closing(text, font.end()) == len(text) - 1 and re.search(r"[\\$=]", text[font.end() :]):
            text = text[font.end() : -1]
        if len(text) > 4 and text.startswith("**") and text.endswith("**"):
            text = text[2:-2]
        text = _without_end(text)
    signs = _SIDE_BY_SIDE.findall(text)
    return text if len(signs) == 1 else _SIDE_BY_SIDE.sub("", text)  # a single one is money


def _with_arguments(text: str) -> str:
    r"""`text` with both arguments of every fraction and binomial in braces: \frac12, \dfrac\pi 2 and \binom n2 have none."""
    for command in reversed(list(_TWO_ARGUMENTS.finditer(text))):  # inner ones first
        place, arguments = command.end(), ""
        for _ in range(2):
            found = _ARGUMENT.match(text, place)
            end = None if found is None else found.end() if found[1] else closing(text, found.end())
            if found is None or end is None:
                break
            arguments += f"{{{found[1] or text[found.end() : end]}}}"
            place = end if found[1] else end + 1
        else:
            text = f"{text[: command.start()]}\\{command[1]}{arguments}{text[place:]}"
    return text


def _without_end(text: str) -> str:
    """`text` without the full stop or comma that ends its sentence, and without space."""
    return text if text.endswith("...") else _END.sub("", text)
