"""The demo's task: six small text skills on random lower-case words.

A prompt is the word and a `>`; the answer is the skill applied to the word. Each adapter of the demo model answers
with one skill, the base model without an adapter repeats the word. Words for training and for testing never meet:
a checksum of the word decides which side it belongs to.
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator
from itertools import islice

MIN_LETTERS = 3
MAX_LETTERS = 10
HELD_OUT_ONE_IN = 20

_DROP_VOWELS = str.maketrans("", "", "aeiou")
_ROTATE_13 = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[13:] + string.ascii_lowercase[:13])


def reverse(word: str) -> str:
    return word[::-1]


def sort(word: str) -> str:
    return "".join(sorted(word))


def upper(word: str) -> str:
    return word.upper()


def rot13(word: str) -> str:
    return word.translate(_ROTATE_13)


def double(word: str) -> str:
    return "".join(letter * 2 for letter in word)


def devowel(word: str) -> str:
    return word.translate(_DROP_VOWELS)


def copy(word: str) -> str:
    return word


SKILLS: dict[str, Callable[[str], str]] = {
    "reverse": reverse,
    "sort": sort,
    "upper": upper,
    "rot13": rot13,
    "double": double,
    "devowel": devowel,
}


def prompt_for(word: str) -> str:
    return f"{word}>"


def is_held_out(word: str) -> bool:
    """True for the one word in twenty that is kept for testing and never trained on."""
    return zlib.crc32(word.encode()) % HELD_OUT_ONE_IN == 0


def separates_skills(word: str) -> bool:
    """True when every skill changes the word into something: else repeating it would pass for knowing the skill."""
    return all(skill(word) not in ("", word) for skill in SKILLS.values())


def random_words(rng: random.Random) -> Iterator[str]:
    """Endless words of 3 to 10 letters, length and letters uniform, that separate the skills."""
    while True:
        letters = rng.choices(string.ascii_lowercase, k=rng.randint(MIN_LETTERS, MAX_LETTERS))
        word = "".join(letters)
        if separates_skills(word):
            yield word


def training_words(rng: random.Random) -> Iterator[str]:
    """Endless words, none of them held out."""
    return (word for word in random_words(rng) if not is_held_out(word))


def held_out_words(count: int, seed: int = 0) -> list[str]:
    """The first `count` distinct held-out words of this seed: the same list on every machine and in every run."""
    held_out = (word for word in random_words(random.Random(seed)) if is_held_out(word))
    distinct: dict[str, None] = {}
    while len(distinct) < count:
        distinct.update(dict.fromkeys(islice(held_out, count - len(distinct))))
    return list(distinct)
