"""Language consistency: the share of words in the wanted language.  https://huggingface.co/papers/2501.12948"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from typing import Literal

from trl_rewards import Reward, Samples, Score
from trl_rewards.models import as_text

Language = Literal[
    "prompt", "ar", "de", "el", "en", "es", "fr", "he", "hi", "it", "ja", "ko", "nl", "pt", "ru", "th", "uk", "zh"
]
SCRIPTS = {
    "ar": {"ARABIC"},
    "el": {"GREEK"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "th": {"THAI"},
    "uk": {"CYRILLIC"},
    "zh": {"CJK"},
}
"""Scripts of languages that are not written in Latin letters, by the first word of their letters' Unicode names."""
_ALONE = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}
"""Scripts without spaces between words: each letter counts as one."""
_SAME = {"KATAKANA-HIRAGANA": "KATAKANA", "IDEOGRAPHIC": "CJK"}
"""Of the prolonged sound mark ー, and the iteration mark 々."""
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|$)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|</?\w+>|\\\w+|https?://\S+", re.DOTALL
)
"""Code, mathematics, tags and addresses."""


@functools.lru_cache(maxsize=65536)
def script_of(letter: str) -> str:
    """The script of a letter, such as LATIN or CJK."""
    first = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
    return _SAME.get(first, first)


def _letters_alone(text: str) -> str:
    """The text with letters of full or half width as usual ones, and without combining marks, such as vowel signs:
    `re` would end words at them."""
    usual = unicodedata.normalize("NFKC", text)
    return "".join(letter for letter in usual if not unicodedata.category(letter).startswith("M"))


def scripts_of(text: str) -> Counter[str]:
    """How many words of each script a text has, code and mathematics left out. Single Latin or Greek letters, which
    are often variables, are no words."""
    found: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", _letters_alone(_NO_LANGUAGE.sub(" ", text))):
        letters = Counter(script_of(letter) for letter in word)
        alone = {script: count for script, count in letters.items() if script in _ALONE}
        found.update(alone)
        spaced = letters - Counter(alone)
        if spaced and (spaced.total() > 1 or not {"LATIN", "GREEK"} & set(spaced)):
            found[spaced.most_common(1)[0][0]] += 1
    return found


def wanted_scripts(language: Language, prompt: str) -> set[str]:
    """The scripts of a language; of the prompt's, the one most of its words are in, with kana all of Japanese."""
    if language != "prompt":
        return SCRIPTS.get(language, {"LATIN"})
    there = scripts_of(prompt)
    if not there:
        return set()
    if there["HIRAGANA"] + there["KATAKANA"]:
        return SCRIPTS["ja"]
    return {there.most_common(1)[0][0]}


class LanguageConsistency(Reward):
    """Share of the completion's words in the script of the wanted language, in [0, 1].

    https://huggingface.co/papers/2501.12948: DeepSeek-R1 adds the share of words in the target language to the reward,
    against reasoning that mixes languages. A word's language is told by its script alone: English among Chinese is
    seen, English among German is not. Code, mathematics and tags do not count; a completion without words, and with
    `prompt` a prompt without any, has no opinion (None).
    """

    language: Language = "prompt"
    """Code of the language, or `prompt`: that of the prompt's last message."""

    def score(self, samples: Samples) -> list[Score]:
        prompts = [as_text(prompt if isinstance(prompt, str) else prompt[-1:]) for prompt in samples.prompts]
        found: list[Score] = []
        for text, prompt in zip(samples.texts, prompts, strict=True):
            words, wanted = scripts_of(text), wanted_scripts(self.language, prompt)
            known = words.total() and wanted
            found.append(sum(words[script] for script in wanted) / words.total() if known else None)
        return found
