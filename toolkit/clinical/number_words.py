"""Numbers and numbers of days as notes write them, in Korean and English."""

from __future__ import annotations

DAYS = {
    "하루": 1, "이틀": 2, "사흘": 3, "나흘": 4, "닷새": 5, "엿새": 6, "이레": 7, "여드레": 8, "아흐레": 9, "열흘": 10,
    "보름": 15,
}  # fmt: skip
_SMALL = {
    "한": 1, "두": 2, "세": 3, "네": 4, "일": 1, "이": 2, "삼": 3, "사": 4, "오": 5, "육": 6, "a": 1, "an": 1, "one": 1,
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
}  # fmt: skip

KOREAN_COUNT = r"(?:\d{1,3}|한|두|세|네|일|이|삼|사|오|육)"
ENGLISH_COUNT = r"(?:\d{1,3}|an?|one|two|three|four|five|six|seven|eight|nine|ten)"
KOREAN_DAYS = "|".join(sorted(DAYS, key=len, reverse=True))


def number_of(text: str) -> int:
    """Return a number in digits or words."""
    return int(text) if text.isdigit() else _SMALL[text.lower()]
