"""Define how hazy images find their clear truth: the keys that paired training, validation and evaluation share."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from corun_ray.config.types import OptionalText, Section, Text

KEY_GROUP = "key"
"""The group of a pattern that is the key, where the pattern has several."""


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern of `match`.

    Raises `ValueError` for one that is no regular expression, or that does not say which of its groups is the key.
    """
    # Names are compared in NFC, so the letters of a pattern must be in NFC too.
    try:
        pattern = re.compile(unicodedata.normalize("NFC", text))
    except re.error as error:
        raise ValueError(f"{text} is no regular expression ({error})") from None

    if KEY_GROUP in pattern.groupindex or pattern.groups == 1:
        return pattern
    count = "no group" if pattern.groups == 0 else f"{pattern.groups} groups, none of them (?P<{KEY_GROUP}>...)"
    raise ValueError(f"{text} has {count} (the text of its one group is what pairs two files, as in ^([^_]+))")


def _check_pattern(text: str | None) -> str | None:
    if text is not None:
        compile_pattern(text)
    return text


Pattern = Annotated[OptionalText, AfterValidator(_check_pattern)]


class TruthSection(Section):
    """Hazy images and, perhaps, their clear truth."""

    hazy: Text = Field(description="folder or URI of hazy images")
    clear: OptionalText = Field(None, description="folder or URI of their clear truth, paired by stem or by match")
    match: Pattern = Field(
        None, description="regular expression whose group pairs hazy and clear names, such as ^([^_]+); null: by stem"
    )
    match_clear: Pattern = Field(None, description="the same for clear names, where they need another; null: match")
    crop_truth: bool = Field(
        False, description="take the centre of a truth that has a border around the hazy image's view (SOTS indoor)"
    )

    @field_validator("match", "crop_truth")
    @classmethod
    def _need_truth(cls, value: str | bool | None, info: ValidationInfo) -> str | bool | None:
        # A truth that was refused is absent here; its own mistake is reported.
        if value and info.data.get("clear", "") is None:
            raise ValueError("not used without clear")
        return value

    @field_validator("match_clear")
    @classmethod
    def _check_match_clear(cls, match_clear: str | None, info: ValidationInfo) -> str | None:
        if "match" not in info.data:
            return match_clear  # its own mistake is reported

        # One pattern cannot tell the two kinds of files in one folder apart.
        match, hazy, clear = info.data["match"], info.data.get("hazy"), info.data.get("clear")
        is_one_folder = hazy and clear and hazy.rstrip("/") == clear.rstrip("/")
        if match_clear is not None and match is None:
            raise ValueError("not used without match")
        if match_clear is None and match is not None and is_one_folder:
            raise ValueError("missing (hazy and clear are one folder: which of its names are the truths?)")
        return match_clear
