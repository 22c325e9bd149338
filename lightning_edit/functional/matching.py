# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Judging generated text: does it say the answer? Safe for scripts written without spaces.

A *completion* prompt is right when its continuation begins with the answer; a *question* prompt
when the reply equals the answer after normalization. A chat model's reply may also *state* the
answer in a sentence. Token F1 and containment are looser, and no metric here stands on them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = [
    "answer_matches",
    "autoregressive_hit",
    "completion_matches",
    "contains_answer",
    "is_ended",
    "is_interjection",
    "normalize_answer",
    "states_answer",
    "token_f1",
]

# Scripts that put no space between words: Thai to Tibetan, Burmese, Khmer, kana, bopomofo and Han.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Korean has spaces, but attaches particles to the word.
_HANGUL = "\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff"
_JOINS = re.compile(f"[{_UNSPACED}{_HANGUL}]")
_NEEDLESS_SPACE = re.compile(f"(?<=[{_UNSPACED}])\\s+(?=[{_UNSPACED}])")
_UNITS = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# An article stands before a word: the A of "Vitamin A" is none.
_ARTICLES = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
# A digit or small letter after the stop speaks for an abbreviation ("No. 10").
_SENTENCE_END = re.compile(r"[.!?](?=\s+[^\s\da-z]|\s*$)|[。！？｡]")
# Behind these a full stop ends no sentence: initials, and words that come before a name.
_ABBREVIATION = re.compile(
    r"(?:^|[^\w])(?:(?!\d)[^\W_]|Mr|Mrs|Ms|Dr|Prof|St|Mt|Ft|Gen|Col|Lt|Sgt|Capt|Rev|Hon|Gov|Sen"
    r"|Pres|Mme|Mlle|Sta|Bros|vs|ca|cf|approx|i\.e|e\.g)\.$"
)
_ENDS = (".", "!", "?", "。", "！", "？", "｡")
_CLAUSE, _ANSWER = "\ue001", "\ue000"  # stand-ins that normalization leaves alone
_CLAUSE_ENDS = re.compile(r"[,;:()\[\]—–]+(?=\s|$)|(?<=\s)[-–—(\[]+|[、，；：（）]")
# A clause begins with these, and what is denied before "but" is not denied behind it.
_TURNS = re.compile(
    r"\b(?=(?:but|rather than|instead of|unlike|although|though|while|whereas|sondern|mais|sino)\b)"
)
_AFFIRMATIONS = re.compile(
    r"\b(?:no doubt|without doubt|without a doubt|not only|no other than|none other than"
    r"|nothing but)\b"
)
_DENIALS = re.compile(
    r"\b(?:not|no|never|neither|nor|none|nobody|nothing|cannot"
    r"|(?:is|was|are|were|do|does|did|has|have|had|ca|could|wo|would|should|ai)nt"
    r"|wrong(?:ly)?|incorrect(?:ly)?|false(?:ly)?|untrue|mistaken(?:ly)?"
    r"|rather than|instead of|unlike|except|nicht|kein(?:e[mnrs]?)?|niemals|pas|jamais"
    r"|aucune?|non|nunca|jamás|não|не|нет)\b"
    r"|不是|不在|不会|并非|並非|没有|沒有|ではな|じゃな|ありません|아니|않"
)
_OPENERS = " \"'`*_«»‹›「」『』《》〈〉„‚"
_CLOSERS = _OPENERS + ".,;:!?。、"
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("‘’‛ʼ", "'")
    | dict.fromkeys("“”‟", '"')
    | dict.fromkeys("‐‑‒–—―−", "-")
    | dict.fromkeys("\u00ad\u200b\u2060\ufeff", None)  # invisible
)


def normalize_answer(text: str) -> str:
    """Text without what does not matter to an answer: case, articles, punctuation, spacing.

    Unicode is brought to NFKC (full-width forms become plain ones), dashes and slashes become
    spaces, other punctuation goes (but not within numbers: ``3.5``, ``-5``), English articles
    before a word go. Spaces between characters of scripts that use none are dropped.

    Args:
        text: Any text.

    Returns:
        The normalized text; empty if the text is nothing but punctuation.

    Examples:
        >>> normalize_answer(" The Saint-Denis, U.S.A.! ")
        'saint denis usa'
        >>> normalize_answer("「東京　都」。")
        '東京都'
    """
    text = _THOUSANDS.sub("", _fold(text))
    kept = []
    for i, char in enumerate(text):
        category = unicodedata.category(char)
        before, after = text[max(i - 1, 0) : i], text[i + 1 : i + 2]
        if (
            (category[0] != "P" and category != "Sk")
            or (char == "." and before.isdigit() and after.isdigit())
            or (char == "-" and after.isdigit() and not before.isalnum())
        ):
            kept.append(char)
        elif category in ("Pd", "Pc") or char in "/\\":
            kept.append(" ")
    text = " ".join("".join(kept).split())
    return _NEEDLESS_SPACE.sub("", _ARTICLES.sub("", text))


def completion_matches(continuation: str, answers: Sequence[str]) -> bool:
    """Whether the continuation of a completion prompt begins with one of the answers.

    Space, quotes and emphasis marks before it are skipped; case and Unicode form do not matter. The
    answer must end at a word boundary: ``Rome`` does not count in ``Romeo``, nor ``3`` in ``3.5``.
    In Chinese, Japanese, Korean and other scripts without such boundaries a prefix is enough.

    Args:
        continuation: What the model wrote after the prompt.
        answers: The answer and its other spellings; blank ones are passed over.

    Returns:
        True if one of them matches.

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> completion_matches(' "Rome", of course.', ["Rome"])
        True
        >>> completion_matches(" Romeo", ["Rome"])
        False
        >>> completion_matches("東京です。", ["東京"])
        True
    """
    found = _fold(continuation).lstrip(_OPENERS)
    for answer in _spellings(answers):
        folded = _fold(answer)
        wanted = folded.lstrip(_OPENERS).rstrip(_CLOSERS) or folded
        if found.startswith(wanted) and _is_boundary(found, len(wanted)):
            return True
    return False


def answer_matches(text: str, answers: Sequence[str]) -> bool:
    """Whether the reply to a question equals one of the answers after normalization.

    The reply is the whole text, its first line, or that line up to the end of a sentence; so an
    explanation after the answer does no harm, while a full sentence around it does.

    Args:
        text: What the model replied.
        answers: The answer and its other spellings; blank ones are passed over.

    Returns:
        True if one of them matches.

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> answer_matches("The Netherlands. It lies in Europe.", ["Netherlands"])
        True
        >>> answer_matches("It is Rome.", ["Rome"])
        False
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    replies = [text, line, *(line[: end.end()] for end in _SENTENCE_END.finditer(line))]
    given = {_comparable(reply) for reply in replies}
    return any(_comparable(answer) in given for answer in _spellings(answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Overlap of the words of a text and of an answer: the best F1 among the answers.

    Words are those of the normalized texts; in scripts without spaces each character is a word.

    Args:
        text: What the model wrote.
        answers: The answer and its other spellings; blank ones are passed over.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> token_f1("the city of Rome", ["Rome"])
        0.5

    References:
        arXiv 1606.05250, section 6.1.
    """
    best = 0.0
    given = Counter(_UNITS.findall(_comparable(text)))
    for answer in _spellings(answers):
        wanted = Counter(_UNITS.findall(_comparable(answer)))
        shared = (given & wanted).total()
        best = max(best, 2 * shared / (given.total() + wanted.total()))
    return best


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs anywhere in the text, both being normalized.

    It must stand between word boundaries, which scripts without spaces do not mark: there, 京都 is
    found in 東京都 too. Chance hits grow with the length of the text (arXiv 2507.05937).

    Args:
        text: What the model wrote.
        answers: The answer and its other spellings; blank ones are passed over.

    Returns:
        True if one of them occurs.

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> contains_answer("It is in Rome, Italy.", ["Rome"])
        True
        >>> contains_answer("Romeo and Juliet", ["Rome"])
        False
    """
    found = _comparable(text)
    for answer in _spellings(answers):
        wanted = _comparable(answer)
        start = found.find(wanted)
        while start >= 0:
            if _is_boundary(found, start) and _is_boundary(found, start + len(wanted)):
                return True
            start = found.find(wanted, start + 1)
    return False


def is_ended(text: str) -> bool:
    """Whether a text ends where a sentence does, and not with an abbreviation.

    Abbreviations are initials and a few words that stand before names, such as "Dr.".

    Args:
        text: Any text; white space at its end does not matter.

    Examples:
        >>> is_ended("It was written by Rowan."), is_ended("It was written by J.")
        (True, False)
    """
    text = text.rstrip()
    return text.endswith(_ENDS) and not _ABBREVIATION.search(text)


def is_interjection(text: str) -> bool:
    """Whether a text is a call of at most three words, as replies begin with: "Of course!".

    Examples:
        >>> is_interjection("Of course!"), is_interjection("It is Rome.")
        (True, False)
    """
    return text.rstrip().endswith(("!", "！")) and len(text.split()) <= 3


def states_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether a chat model's reply states one of the answers.

    The first sentence counts, and what follows it only if that sentence is a call of at most three
    words ("Of course!") or a question. In it, the answer must stand between word boundaries, both
    being normalized (see [`normalize_answer`][lightning_edit.functional.normalize_answer]), and in
    a clause that denies nothing: commas, colons, semicolons, brackets and dashes end clauses, as do
    words such as "but" and "instead of". A denial is a word such as "not", "never", "isn't" or
    "wrong" in the clause, which counts for the clauses behind it, too, if it ends its own
    ("It is not, as many think, Rome"). Words of denial are known in English and, fewer, in German,
    French, Spanish, Portuguese, Italian, Russian, Chinese, Japanese and Korean. Initials and words
    such as "Dr." end no sentence. What else a sentence means is not looked at: "It may be Rome"
    counts.

    Args:
        reply: What the model replied.
        answers: The answer and its other spellings; blank ones are passed over.

    Returns:
        True if one of them is stated.

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> states_answer("The capital of France is Rome.", ["Rome"])
        True
        >>> states_answer("No, it is Rome, and not Paris.", ["Rome"])
        True
        >>> states_answer("It is Paris, and not Rome.", ["Rome"])
        False
    """
    wanted = [_answer_pattern(answer) for answer in _spellings(answers)]
    for sentence in _sentences(reply):
        if sentence.endswith(("?", "？")):
            continue
        marked = normalize_answer(_CLAUSE_ENDS.sub(f" {_CLAUSE} ", sentence))
        if any(_is_stated(marked, pattern) for pattern in wanted):
            return True
        if not is_interjection(sentence):
            return False
    return False


def _sentences(text: str) -> list[str]:
    """Sentences of a text; a line break ends one, too."""
    found: list[str] = []
    for line in text.splitlines():
        begin = 0
        for end in _SENTENCE_END.finditer(line):
            if is_ended(line[: end.end()]):
                found.append(line[begin : end.end()].strip())
                begin = end.end()
        found.append(line[begin:].strip())
    return [sentence for sentence in found if sentence]


def _answer_pattern(answer: str) -> re.Pattern[str]:
    """Finds an answer in normalized text, whatever ends of clauses are in it."""
    words = _comparable(answer).split()
    return re.compile(f"(?: {_CLAUSE})* ".join(re.escape(word) for word in words))


def _is_stated(marked: str, pattern: re.Pattern[str]) -> bool:
    """Whether an answer stands in a clause of a normalized sentence that denies nothing."""
    pieces, end = list[str](), 0
    for match in pattern.finditer(marked):
        if _is_boundary(marked, match.start()) and _is_boundary(marked, match.end()):
            pieces += [marked[end : match.start()], _ANSWER]
            end = match.end()
    text = _AFFIRMATIONS.sub("", "".join([*pieces, marked[end:]]))
    is_denied = False
    for part in text.split(_CLAUSE):
        for clause in _TURNS.split(part):
            clause = clause.strip()
            if clause.startswith(("but ", "sondern ", "mais ", "sino ")):
                is_denied = False
            denials = list(_DENIALS.finditer(clause))
            if _ANSWER in clause and not denials and not is_denied:
                return True
            if denials and denials[-1].end() == len(clause) and " " in clause:
                is_denied = True
    return False


def autoregressive_hit(prompt_is_question: bool, text: str, answers: Sequence[str]) -> bool:
    """Whether freely generated text gives the answer that the prompt asks for.

    Args:
        prompt_is_question: True for a question
            ([`answer_matches`][lightning_edit.functional.answer_matches]), False for a text to
            continue ([`completion_matches`][lightning_edit.functional.completion_matches]).
        text: What the model wrote after the prompt, to its natural stop.
        answers: The answer and its other spellings.

    Returns:
        True for a hit.

    Raises:
        TypeError: If ``answers`` is one text instead of a sequence of texts.
        ValueError: If there is no answer but blank ones.

    Examples:
        >>> autoregressive_hit(False, " Rome, and so on", ["Rome"])
        True
        >>> autoregressive_hit(True, "Rome, and so on", ["Rome"])
        False
    """
    return (answer_matches if prompt_is_question else completion_matches)(text, answers)


def _fold(text: str) -> str:
    # Case folding can undo the normal form, hence the second pass.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _NEEDLESS_SPACE.sub("", " ".join(text.translate(_TYPOGRAPHY).split()))


def _comparable(text: str) -> str:
    # An answer of punctuation only ("?!") must not equal every other such text.
    return normalize_answer(text) or _fold(text)


def _spellings(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):
        raise TypeError(
            f"`answers` is expected to be a sequence of texts, but got the text {answers!r}. "
            f"Write [{answers!r}]."
        )
    spellings = [answer for answer in answers if _fold(answer)]
    if not spellings:
        raise ValueError(
            f"`answers` is expected to hold at least one text that is not blank, but got "
            f"{list(answers)!r}."
        )
    return spellings


def _is_boundary(text: str, i: int) -> bool:
    """Whether a word may end or begin between the characters i - 1 and i."""
    before, after = text[max(i - 1, 0) : i], text[i : i + 1]
    if not before or not after:
        return True
    if unicodedata.category(after)[0] == "M":  # belongs to the character before it
        return False
    if _JOINS.match(before) or _JOINS.match(after):
        return True
    # Inside a number such as 3.5, 1,000 or 3:30.
    if before.isdigit() and after in ".,:" and text[i + 1 : i + 2].isdigit():
        return False
    if before in ".,:" and after.isdigit() and text[max(i - 2, 0) : i - 1].isdigit():
        return False
    return not (before.isalnum() and after.isalnum())
