"""Dictionaries: MedDRA's file format by invented terms, the toy one, ICD-10-CM; how terms are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolkit.clinical.ae_metrics import retrieval_recall
from toolkit.clinical.dictionary import Dictionary, open_dictionary, parts_of
from toolkit.clinical.records import complete
from toolkit.config.retrieval_schema import RetrievalConfig
from toolkit.runtime.errors import DataError

FILES = {  # invented terms and codes: nothing of MedDRA but the form of its files
    "llt.asc": [
        "91$Glimmering toes$51$$$$$$$Y$$", "92$Toes that glimmer$51$$$$$$$Y$$", "93$Glimmer foot$51$$$$$$$N$$",
        "94$Humming knee$52$$$$$$$Y$$",
    ],
    "pt.asc": ["51$Glimmering toes$$11$$$$$$$$", "52$Humming knee$$12$$$$$$$$"],
    "mdhier.asc": [
        "51$31$21$11$Glimmering toes$Toe signs$Foot signs$Foot realm$FR$$11$Y$",
        "51$32$22$12$Glimmering toes$Light signs$Odd lights$Leg realm$LR$$11$N$",
        "52$33$22$12$Humming knee$Knee noises$Odd lights$Leg realm$LR$$12$Y$",
    ],
    "soc.asc": ["11$Foot realm$FR$$$", "12$Leg realm$LR$$$"],
    "hlt_pt.asc": ["31$51$", "32$51$", "33$52$"],
    "hlgt_hlt.asc": ["21$31$", "22$32$", "22$33$"],
    "soc_hlgt.asc": ["11$21$", "12$22$"],
}  # fmt: skip
KOREAN = ["91$반짝이는 발가락$51$$$$$$$Y$$", "94$울리는 무릎$52$$$$$$$Y$$"]


def write(folder: Path, **files: list[str] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {**FILES, **{f"{key}.asc": value for key, value in files.items()}}.items():
        if lines is not None:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def asc(tmp_path: Path) -> Path:
    root = tmp_path / "MedDRA_99_1_release"
    write(root / "English" / "MedAscii")
    (root / "Korean").mkdir()
    (root / "Korean" / "LLT.ASC").write_text("\n".join(KOREAN), encoding="cp949")
    return root


def test_a_korean_term_leads_to_the_english_preferred_term_and_its_primary_class(asc: Path) -> None:
    dictionary = open_dictionary(asc)
    assert dictionary.version == "MedDRA 99.1"
    term = dictionary.find("반짝이는  발가락")
    assert term is not None
    assert (term.code, term.pt, term.pt_code, term.soc, term.soc_code) == (91, "Glimmering toes", 51, "Foot realm", 11)
    (record,) = complete(
        [{"AETERM": "발가락이 반짝", "AELLT": "울리는 무릎", "AESER": "N"}], {"USUBJID": "1"}, dictionary
    )
    assert (record["AELLT"], record["AELLTCD"], record["AEDECOD"], record["AESOC"], record["AEDICTVR"]) == (
        "Humming knee", 94, "Humming knee", "Leg realm", "MedDRA 99.1",
    )  # fmt: skip


def test_terms_that_are_not_current_are_known_and_never_proposed(asc: Path) -> None:
    dictionary = open_dictionary(asc)
    old = dictionary.find("Glimmer foot")
    assert old is not None
    assert not old.is_current
    assert [term.code for term in dictionary.candidates("glimmer foot, glimmering toes", 9)] == [91, 92]
    assert [term.code for term in dictionary.candidates("무릎이 울리는 느낌", 3)] == [94]


def test_without_mdhier_the_classes_are_those_of_pt_and_soc(asc: Path) -> None:
    (asc / "English" / "MedAscii" / "mdhier.asc").unlink()
    term = open_dictionary(asc).of_code(92)
    assert term is not None
    assert (term.pt, term.soc) == ("Glimmering toes", "Foot realm")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"llt": ["91$Glimmering toes$77$"]}, "preferred term 77, which is nowhere"),
        ({"llt": ["91$Glimmering toes"]}, "line 1 has 2 fields; expected 3 or more"),
        ({"mdhier": None, "soc": None}, "has no soc.asc"),
        ({"mdhier": None, "soc": ["13$Hand realm$"]}, "system organ class 11, which is nowhere"),
        ({"soc_hlgt": ["12$21$", "12$22$"]}, "51 .Glimmering toes. does not lead to its system organ class 11"),
        ({"mdhier": [FILES["mdhier.asc"][1]]}, "preferred term 51 has no primary path"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(
    tmp_path: Path, files: dict[str, list[str] | None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dictionary(write(tmp_path / "asc", **files))


def test_a_path_without_a_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one with MedDRA's \.asc files, or toy or icd10cm"):
        open_dictionary(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no llt\.asc"):
        open_dictionary(tmp_path)


def test_the_toy_dictionary_has_200_terms_and_no_code_of_meddra() -> None:
    terms = open_dictionary("toy").terms
    assert len(terms) == len({term.code for term in terms}) == len({name for term in terms for name in term.names}) / 2
    assert len(terms) == 200
    assert all(len(str(term.code)) == 6 for term in terms)  # MedDRA's have eight digits
    assert all(any("가" <= letter <= "힣" for letter in term.other_names[0]) for term in terms)


def test_each_event_of_a_note_has_candidates() -> None:
    note = "어제부터 속이 울렁거림, 밤에는 두통. 구토는 없음"
    assert parts_of(note) == ["어제부터 속이 울렁거림", "밤에는 두통", "구토는 없음"]
    found = open_dictionary("toy").candidate_names(note, 6)
    assert {"속이 울렁거림", "두통", "구토"} <= set(found)
    assert open_dictionary("toy").candidate_names("threw up, then chest tightness", 4)[0] == "throwing up"


def test_recall_counts_events_that_have_no_term() -> None:
    wanted = [
        {"AETERM": "두통", "AELLT": "두통", "AESER": "N"}, {"AETERM": "딸꾹질", "AESER": "N"},
        {"AETERM": "zzz", "AELLT": "두통", "AESER": "N"}, {"AETERM": "fever", "AELLT": "fever", "AESER": "N"},
    ]  # fmt: skip
    found = retrieval_recall([json.dumps(wanted[:2]), json.dumps(wanted[2:])], open_dictionary("toy"))
    assert found == {"recall@1": 0.5, "recall@5": 0.5, "unanswerable": 0.25, "terms": 4.0}


def test_icd10_is_read_as_a_whole() -> None:
    dictionary: Dictionary = open_dictionary("icd10cm")
    assert len(dictionary.terms) > 70_000
    term = dictionary.of_code("J18.9")
    assert term is not None
    assert term.pt.startswith("Pneumonia")
    assert "respiratory" in term.soc


def test_a_recipe_names_a_corpus_or_a_dictionary() -> None:
    with pytest.raises(ValueError, match="one of the two"):
        RetrievalConfig()
    with pytest.raises(ValueError, match="one of the two"):
        RetrievalConfig(corpus="a", dictionary="toy")
    with pytest.raises(ValueError, match="go with a corpus"):
        RetrievalConfig(dictionary="toy", dense=True)
