"""The clinical road: records, codelists, dictionaries, rules and checks of what a model answers. Imports no torch."""

RESEARCH_USE = {
    "en": "For research; not for care.",
    "ko": "연구용이며 진료에 쓰지 않습니다.",
}
"""What is said wherever answers of these tasks appear, by language."""
