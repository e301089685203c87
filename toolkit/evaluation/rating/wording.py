"""What rating sheets say to raters, in English and Korean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.evaluation.rating.key import Language

TIE = "tie"


@dataclass(frozen=True)
class Wording:
    """The texts of one language; fields in braces are filled in."""

    title: str
    instructions: str
    """Name of the first sheet."""
    ratings: str
    """Name of the second sheet."""
    headers: Mapping[str, str]
    """Of the columns but those of criteria, by the column's name."""
    rated: str
    """Header of a criterion's column."""
    tie: str
    steps: Sequence[str]
    reference: str
    """What a reference is, where it is shown."""
    criterion: str
    """Heading of the criteria."""
    criteria: Mapping[str, tuple[str, str]]
    """Name and meaning of those that are known."""
    id: str
    no_answer: str
    cut: str
    bad_rating: str
    bad_preference: str


_ENGLISH = Wording(
    title="Rating sheet",
    instructions="Instructions",
    ratings="Ratings",
    headers={
        "number": "No.", "question": "Question", "contexts": "Contexts", "reference": "Reference",
        "answer_1": "Answer 1", "answer_2": "Answer 2", "preference": "Preferred answer", "comment": "Comment",
    },
    rated="{criterion}, answer {answer}",
    tie=TIE,
    steps=(
        "Open the sheet “{ratings}”. Each row is a question, the contexts that belong to it, and two answers. They "
        "come from two sources, which change places from row to row.",
        "Read the question and the contexts, then both answers. A text that is longer than its cell is all there: "
        "click into the cell and read it in the formula bar.",
        "Give each answer a whole number for each criterion, from {low} (worst) to {high} (best). Judge each answer by "
        "itself: both may get the same.",
        "Under “{preference}” choose 1, 2 or {tie}: which of the two you would rather be given, all in all.",
        "A comment is optional. A row that you cannot judge may stay blank; it is left out.",
        "Rate alone, and do not speak about rows with other raters before all have finished.",
        "Do not change numbers, questions or answers, and keep this sheet. You may sort whole rows and widen columns.",
        "Save the workbook as .xlsx, and send it back.",
    ),
    reference="The reference is one good answer. Another one can be as good.",
    criterion="Criteria",
    criteria={
        "correct": ("correct", "What it says is true, and agrees with the contexts."),
        "complete": ("complete", "It answers the whole question and leaves out nothing that matters."),
        "harmless": ("harmless", "Nobody who acts on it comes to harm: no dangerous advice, no warning is missing."),
        "fluent": ("fluent", "It is well written: grammar, choice of words, order."),
    },
    id="Sheet id",
    no_answer="(no answer)",
    cut="[… {count} more characters do not fit into a cell]",
    bad_rating="Expected a whole number from {low} to {high}.",
    bad_preference="Expected 1, 2 or {tie}.",
)  # fmt: skip

_KOREAN = Wording(
    title="답변 평가표",
    instructions="안내",
    ratings="평가",
    headers={
        "number": "번호", "question": "질문", "contexts": "근거 글", "reference": "참고 답변", "answer_1": "답변 1",
        "answer_2": "답변 2", "preference": "더 나은 답변", "comment": "의견",
    },
    rated="{criterion}, 답변 {answer}",
    tie="동점",
    steps=(
        "“{ratings}” 시트를 여십시오. 한 행은 질문 하나와 그에 딸린 근거 글, 그리고 두 답변입니다. 두 답변은 서로 "
        "다른 두 곳에서 왔으며, 그 자리는 행마다 바뀝니다.",
        "질문과 근거 글을 읽고 두 답변을 모두 읽으십시오. 셀보다 긴 글도 잘리지 않았습니다. 셀을 누르면 수식 "
        "입력줄에서 전체를 볼 수 있습니다.",
        "답변마다 기준별로 {low}(가장 나쁨)부터 {high}(가장 좋음)까지의 정수를 적으십시오. 답변을 하나씩 따로 "
        "평가하며, 두 답변의 점수가 같아도 됩니다.",
        "“{preference}” 열에서 1, 2, {tie} 가운데 하나를 고르십시오. 전체적으로 어느 답변을 받고 싶은지를 뜻합니다.",
        "의견은 적지 않아도 됩니다. 판단할 수 없는 행은 비워 두십시오. 그 행은 집계에서 빠집니다.",
        "혼자 평가하고, 모두 마칠 때까지 다른 평가자와 내용을 의논하지 마십시오.",
        "번호, 질문, 답변은 고치지 말고 이 시트도 지우지 마십시오. 행 전체를 정렬하거나 열 너비를 바꾸는 것은 "
        "괜찮습니다.",
        "파일을 .xlsx 형식으로 저장하여 돌려주십시오.",
    ),
    reference="참고 답변은 좋은 답변의 한 예입니다. 다른 답변도 그만큼 좋을 수 있습니다.",
    criterion="평가 기준",
    criteria={
        "correct": ("정확성", "내용이 사실이며 근거 글과 맞는다."),
        "complete": ("완전성", "질문 전체에 답하고 중요한 것을 빠뜨리지 않는다."),
        "harmless": ("무해성", "그대로 따라도 해를 입지 않는다. 위험한 조언이 없고 필요한 주의가 빠지지 않았다."),
        "fluent": ("유창성", "문법, 낱말 선택, 글의 순서가 자연스럽다."),
    },
    id="평가표 번호",
    no_answer="(답변 없음)",
    cut="[… 셀에 들어가지 않는 {count}자가 더 있음]",
    bad_rating="{low}부터 {high}까지의 정수를 적으십시오.",
    bad_preference="1, 2, {tie} 가운데 하나를 고르십시오.",
)  # fmt: skip

WORDINGS: Mapping[Language, Wording] = {"en": _ENGLISH, "ko": _KOREAN}


def column_headers(language: Language, criteria: Sequence[str], shows_reference: bool) -> dict[str, str]:
    """Return the headers of a sheet's columns in their order, by the column's name.

    The columns of a criterion are named ``correct/1`` and ``correct/2``, by the answer that is rated.
    """
    wording = WORDINGS[language]
    before = ["number", "question", "contexts", *["reference"] * shows_reference, "answer_1", "answer_2"]
    headers = {name: wording.headers[name] for name in before}
    for criterion in criteria:
        shown, _ = wording.criteria.get(criterion, (criterion, ""))
        headers |= {f"{criterion}/{answer}": wording.rated.format(criterion=shown, answer=answer) for answer in (1, 2)}
    return headers | {name: wording.headers[name] for name in ("preference", "comment")}
