import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import QUICKSTART, ROOT, invocation, run_here, run_script

from toolkit.commands.invocation import build_invocation
from toolkit.config.data_schema import PathEntry
from toolkit.config.mask_schema import MaskGroup
from toolkit.config.peer_keys import ALTERNATIVES, EQUIVALENT_KEYS
from toolkit.config.recipe import build_config, did_you_mean, dump, field_paths, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.config.section import takes_none, union_members
from toolkit.runtime.errors import ConfigError


def faults_of(recipe: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        build_config(recipe, "test")
    return error.value.faults


def test_defaults_are_the_reference_recipe() -> None:
    config = RunConfig()
    assert config.mask.train == ["last:4", "head"]
    assert config.model.dtype == "bfloat16"
    train = config.train
    assert (train.epochs, train.micro_batch_size, train.learning_rate) == (3, 1, 1e-5)
    assert (train.warmup_ratio, train.scheduler, train.max_grad_norm) == (0.1, "linear", 1.0)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe: Path) -> None:
    build_config(read_recipe(recipe), recipe.name)


def test_exaone_recipe_is_the_reference_recipe_pinned_and_without_remote_code() -> None:
    config = build_config(read_recipe(ROOT / "recipes" / "exaone35_pubmedqa_ko.yaml"), "exaone")
    assert config.train == RunConfig().train
    assert config.mask.train == RunConfig().mask.train
    assert len(config.model.revision or "") == 40
    assert not config.model.trust_remote_code


def test_the_recipe_of_adapters_differs_from_the_reference_in_what_trains_and_how_fast() -> None:
    reference, adapters = (
        build_config(read_recipe(ROOT / "recipes" / f"exaone35_pubmedqa_ko{kind}.yaml"), kind) for kind in ("", "_lora")
    )
    assert (adapters.model, adapters.data) == (reference.model, reference.data)
    assert adapters.train == reference.train.model_copy(update={"learning_rate": 2e-4})
    assert [str(entry) for entry in adapters.mask.train] == ["lora16 last:8"]


def test_flags_win_over_the_recipe_which_wins_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {epochs: 7, learning_rate: 2e-5}\n")
    config = invocation("--config", str(recipe), "--train.learning_rate", "3e-5").config
    assert (config.train.epochs, config.train.learning_rate, config.train.seed) == (7, 3e-5, 42)


def test_all_faults_are_reported_at_once_with_value_expectation_and_nearest_name(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {epochs: 0, learnin_rate: 1e-5}\nmodel: {dtype: float8}\nmasks: {}\n")
    with pytest.raises(ConfigError) as error:
        invocation("--config", str(recipe), "--train.warmup", "0.5", "--data.on_bad_row", "skip", "--optim.eps", "no")
    text = str(error.value)
    assert len(error.value.faults) == 6
    assert "train.epochs is 0; expected greater than or equal to 1" in text
    assert "train.learnin_rate: unknown key (did you mean train.learning_rate?)" in text
    assert "model.dtype is 'float8'; expected 'bfloat16' or 'float32'" in text
    assert "--train.warmup: unknown flag (did you mean train.warmup_ratio?)" in text
    assert "optim.eps is 'no'" in text
    assert "masks: unknown key (did you mean mask?)" in text


def test_a_bare_key_is_led_to_its_section() -> None:
    assert faults_of({"learning_rate": 1e-4}) == ["learning_rate: unknown key (did you mean train.learning_rate?)"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train.lr", "did you mean train.learning_rate?"),
        ("lr", "did you mean train.learning_rate?"),
        ("optimizer.lr", "did you mean train.learning_rate?"),
        ("training.num_train_epochs", "did you mean train.epochs?"),
        ("per-device-train-batch-size", "did you mean train.micro_batch_size?"),
        ("num_train_epoch", "did you mean train.epochs?"),
        ("train.learning-rate", "did you mean train.learning_rate?"),
        ("trian.learning_rate", "did you mean train.learning_rate?"),
        ("model", "did you mean model.name_or_path?"),
        ("mask.train.0.wd", "did you mean mask.train.0.weight_decay?"),
        ("train.warmup_steps", "warmup is a share of all steps: train.warmup_ratio"),
        ("lora_r", "adapters are an entry of mask.train: {lora: {select: last:8, rank: 16}} (docs/adapters.md)"),
        ("lora.r", "adapters are an entry of mask.train: {lora: {select: last:8, rank: 16}} (docs/adapters.md)"),
        ("rotation.every_steps", "did you mean output.save_every_steps?"),
        ("data.retrieval.dictionary", "data.retrieval is one key; give it whole, as a mapping"),
        ("train.nonsense", ""),
    ],
)
def test_an_unknown_key_is_led_to_ours_by_what_others_call_it_and_by_its_leaf(written: str, meant: str) -> None:
    group = [f"mask.train.0.{key}" for key in MaskGroup.model_fields]
    said = did_you_mean(written, group if written.startswith("mask") else field_paths())
    assert said == (f" ({meant})" if meant else "")


def test_what_is_within_a_key_is_led_to_the_whole_key() -> None:
    with pytest.raises(ConfigError) as error:
        invocation("--mask.rotation.every_steps", "5")
    assert error.value.faults == [
        "--mask.rotation.every_steps: unknown flag (mask.rotation is one key; give it whole, as a mapping)"
    ]


def test_flags_and_recipes_know_what_others_call_a_key(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {num_train_epochs: 2}\nmask: {train: [{select: head, lr: 1e-4}]}\nbf16: true\n")
    with pytest.raises(ConfigError) as error:
        invocation("--config", str(recipe), "--lr", "1e-4")
    assert error.value.faults == [
        "--lr: unknown flag (did you mean train.learning_rate?)",
        "mask.train.0.lr: unknown key (did you mean mask.train.0.learning_rate?)",
        "train.num_train_epochs: unknown key (did you mean train.epochs?)",
        "bf16: unknown key (model.dtype is bfloat16, the default, or float32)",
    ]


def test_every_key_that_other_names_lead_to_exists() -> None:
    sections = "|".join(RunConfig.model_fields)
    named = {key for text in ALTERNATIVES.values() for key in re.findall(rf"(?<![\w-])(?:{sections})\.[a-z_]+", text)}
    assert len(named) > 15
    assert {*EQUIVALENT_KEYS.values(), *named} <= set(field_paths())
    assert not set(EQUIVALENT_KEYS) & set(ALTERNATIVES)
    pages = {
        page for text in ALTERNATIVES.values() for page in re.findall(r"\b(?:docs|ds_configs|launch)/[\w.-]+", text)
    }
    assert all((ROOT / page).is_file() for page in pages)


def test_a_section_that_is_no_mapping_names_a_key_of_it() -> None:
    assert faults_of({"optim": "adamw_torch"}) == ["optim is 'adamw_torch'; expected keys under it, such as optim.name"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds a list; expected sections"),
        ("train: {epochs: 3", "not valid YAML"),
        ("train: 3", "train is 3"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_an_unusable_recipe_file_says_why(tmp_path: Path, content: str | bytes, message: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message):
        invocation("--config", str(recipe))


def test_a_missing_recipe_says_so() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        invocation("--config", "nowhere.yaml")


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")])
def test_yaml_switches_are_read_as_words(tmp_path: Path, written: str, read: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"train: {{gradient_checkpointing: {written}}}\n")
    assert invocation("--config", str(recipe)).config.train.gradient_checkpointing == read


def test_the_saved_recipe_is_a_valid_recipe_of_the_same_run(tmp_path: Path) -> None:
    config = invocation("--train.gradient_checkpointing", "off", "--data.validation", "0.25").config
    (tmp_path / "saved.yaml").write_text(dump(config), encoding="utf-8")
    assert invocation("--config", str(tmp_path / "saved.yaml")).config == config


def test_lists_and_none_can_be_given_as_flags() -> None:
    config = invocation(
        "--mask.train", "last:2", "norm", "--data.validation", "none", "--optim.betas", "0.8", "0.9"
    ).config
    assert config.mask.train == ["last:2", "norm"]
    assert config.data.validation is None
    assert config.optim.betas == (0.8, 0.9)
    assert invocation("--mask.train", "[head, norm]").config.mask.train == ["head", "norm"]


@pytest.mark.parametrize("fraction", ["0", "1", "1.5"])
def test_a_validation_fraction_lies_between_0_and_1(fraction: str) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        invocation("--data.validation", fraction)


def test_remote_code_from_the_hub_needs_a_pinned_commit() -> None:
    with pytest.raises(ConfigError, match="full commit hash"):
        invocation("--model.name_or_path", "org/name", "--model.trust_remote_code", "true", "--model.revision", "main")
    flags = ("--model.name_or_path", "org/name", "--model.trust_remote_code", "true", "--model.revision", "a" * 40)
    assert invocation(*flags).config.model.trust_remote_code


@pytest.mark.parametrize("flag", ["--ds", "--deepspeed", "--deepspeed_config"])
def test_the_deepspeed_file_has_three_spellings(flag: str) -> None:
    assert invocation(flag, "ds_configs/zero2.json", "--local_rank=0").deepspeed == Path("ds_configs/zero2.json")


def test_every_key_is_documented_and_shown_by_help() -> None:
    result = run_here("launch/train.py", "--help")
    assert result.returncode == 0
    assert "python launch/train.py --config recipes/quickstart.yaml" in "\n".join(result.stdout.splitlines()[:8])
    for path, info in field_paths().items():
        assert info.description, f"{path} has no docstring"
        assert f"--{path} " in result.stdout


def test_help_and_faulty_flags_are_answered_without_importing_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', *{flags!r}]\n"
        "try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    for flags, ending in ((["--help"], "False 0"), (["--train.epochs", "x"], "False 2")):
        script = code.format(flags=flags, script=str(ROOT / "launch" / "train.py"))
        result = run_script("launch/train.py", launcher=(sys.executable, "-c", script))
        assert result.stdout.strip().endswith(ending)


def test_quickstart_names_nothing_the_repository_lacks() -> None:
    recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    assert (ROOT / recipe["data"]["path"]).is_file()
    assert recipe["model"]["name_or_path"].startswith("bundled:")


OPTIONAL = [key for key, info in field_paths().items() if takes_none(info.annotation)]


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_the_word_none_means_the_same_in_flags_overrides_and_recipes(word: str) -> None:
    assert {"data.validation", "data.test", "data.split", "data.folds", "output.async_save"} <= {*OPTIONAL}
    recipes: dict[str, dict[str, str]] = {}
    for key in OPTIONAL:
        section, name = key.split(".")
        recipes.setdefault(section, {})[name] = word
    flags = [part for key in OPTIONAL for part in (f"--{key}", word)]
    for config in (
        invocation(*flags).config,
        build_invocation({}, dict.fromkeys(OPTIONAL, word), None).config,
        build_config(recipes, "recipe"),
    ):
        assert {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in OPTIONAL} == (
            dict.fromkeys(OPTIONAL)
        )
    entry = build_config({"data": {"path": [{"path": "a", "split": word, "task": word}]}}, "recipe").data.path[0]
    assert isinstance(entry, PathEntry)
    assert (entry.split, entry.task) == (None, None)
    assert build_config({"data": {"path": word}}, "recipe").data.path == word, "a key that cannot be none"


NUMBERS = [key for key, info in field_paths().items() if {int, float} & {*union_members(info.annotation)}]


@pytest.mark.parametrize("key", NUMBERS)
def test_true_is_no_number(key: str) -> None:
    """Python takes it for 1: train.max_steps, say, of one step."""
    section, _, leaf = key.rpartition(".")
    with pytest.raises(ConfigError, match=rf"{section}: {leaf} is true; expected a number"):
        build_config({section: {leaf: True}}, "test")
