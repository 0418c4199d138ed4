"""Values as people write them, in recipes and behind the options of commands."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml

from messnet.errors import RecipeError
from messnet.records.codec import field_type, type_options

_COLOUR = re.compile(r"(?:0x|#)([0-9a-fA-F]+)")
"""A number as messages write colours, 0xRRGGBB, or as web pages do; in quotes YAML reads it as text."""


def as_meant(value: object, text: object, kind: object) -> object:
    """``value`` as YAML reads it, or ``text`` as it is written where the type ``kind`` is text."""
    if isinstance(value, dict):
        named = text if isinstance(text, dict) else {}
        return {str(key): as_meant(item, named.get(key), field_type(kind, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        texts = text if isinstance(text, list) else [None] * len(value)
        return [as_meant(item, texts[i], field_type(kind, i)) for i, item in enumerate(value)]
    options = type_options(kind)
    if value == "None" and NoneType in options:
        return None
    if int in options and isinstance(value, str) and (colour := _COLOUR.fullmatch(value)):
        return int(colour.group(1), 16)
    is_text = any(option in (str, Path) or get_origin(option) is Literal for option in options)
    return text if is_text and isinstance(text, str) and value is not None else value


def value_of(words: list[str], kind: object, option: str) -> object:
    """The value of type ``kind`` that the ``words`` behind ``option`` say. Raises RecipeError where they are no value
    at all, or too many; whether it is of the type is for ``from_plain`` to say."""
    options = type_options(kind)
    if not words and bool in options:
        return True
    if not words:
        raise RecipeError(f"{option} needs a value")
    takes_list = any(get_origin(one) in (tuple, list) for one in options)
    if len(words) > 1 and not takes_list:
        raise RecipeError(f"{option} takes one value, got {' '.join(words)}")
    choices = [choice for one in options if get_origin(one) is Literal for choice in get_args(one)]
    if not takes_list or words[0].startswith("[") or (len(words) == 1 and words[0] in ("null", "None", *choices)):
        return _scalar(" ".join(words), kind)
    # A list is written "1 2", "1,2" or "[1, 2]", whatever it holds; a comma in a name needs the last form, and quotes.
    parts = [part.strip() for word in words for part in word.split(",") if part.strip()]
    return [_scalar(part, field_type(kind, i)) for i, part in enumerate(parts)]


def _scalar(word: str, kind: object) -> object:
    if word.startswith("#"):  # a colour, and in YAML a comment
        return as_meant(word, word, kind)
    try:
        return as_meant(yaml.safe_load(word), yaml.load(word, yaml.BaseLoader), kind)
    except yaml.YAMLError:  # a text that looks like YAML, such as "a: b: c"
        return word
