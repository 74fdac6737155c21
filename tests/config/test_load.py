"""Recipe, flags and --set to one configuration, and every fault of it in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from settings_given import GRPO, NEEDED, SFT, fault_lines

from rlhfkit.config.load import differing_keys, dump_config, find_recipe, iterate_fields, load_config, read_recipe
from rlhfkit.config.stages import STAGES, AnyConfig, GenerateConfig, PpoConfig, RmConfig, SftConfig
from rlhfkit.errors import ConfigError

ROOT = Path(__file__).parents[2]


# -- all faults together ----------------------------------------------------------------------------------------------


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text("model: {path: m, precison: bf16}\noptim: {lr: 2, epochs: 0}\nlora: {alpha: 32}\n")
    found = fault_lines(
        "sft",
        recipe=str(recipe),
        flags={"data.max_length": 4, "model.quantize": "3bit"},
        sets=["run.seed=-1", "optim.epohcs=2", "optim.batch_size", "run.out={"],
    )
    assert found == [
        "--set optim.batch_size: write it as a.b=value",
        "--set run.out={: the value is no YAML",
        "model.quantize: input should be 'none', '8bit' or '4bit' (found '3bit')",
        "model.precison: unknown key; did you mean model.precision?",
        "data.max_length: input should be greater than or equal to 8 (found 4)",
        "optim.epochs: input should be greater than 0 (found 0)",
        "optim.lr: input should be less than or equal to 1 (found 2)",
        "optim.epohcs: unknown key; did you mean optim.epochs?",
        "run.seed: input should be greater than or equal to 0 (found -1)",
        "data.train: no data is given; say --data FILE",
        "lora.alpha: has no effect while lora.rank is 0; set --lora-rank",
    ]


def test_the_recipe_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^1 fault in the configuration \(recipe .*a\.yaml\):\n  optim\.lr: "):
        load_config(SftConfig, recipe=str(write_yaml("optim: {lr: 3}")), flags=SFT)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_yaml(text: str, name: str = "a.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("stage", "key", "meant"),
    [
        ("sft", "optim.epohcs", "; did you mean optim.epochs?"),
        ("sft", "batch_size", "; did you mean optim.batch_size?"),  # the block is missing
        ("sft", "lora_rank", "; did you mean lora.rank?"),  # a flag's name, not a key's
        ("sft", "max_lenght", "; did you mean data.max_length?"),
        ("sft", "modle", "; did you mean model?"),
        ("sft", "modle.path", "; did you mean model.path?"),
        ("sft", "optim.learning_rate", "; did you mean optim.lr?"),  # transformers' name
        ("ppo", "ppo.kl-coef", "; did you mean ppo.kl_coef?"),
        ("ppo", "ppo.target_kl", "; did you mean ppo.kl_target?"),
        ("generate", "max_tokens", "; did you mean max_new_tokens?"),
        ("sft", "completely.other", ""),
    ],
)
def test_a_near_miss_is_answered_with_the_name_that_was_meant(stage: str, key: str, meant: str) -> None:
    (line,) = fault_lines(stage, flags=NEEDED[stage], sets=[f"{key}=1"])
    assert line == f"{key}: unknown key{meant}"


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        ("data=rows.jsonl", "data: a block of keys belongs here, not a value (found 'rows.jsonl')"),
        ("data.train=3", "data.train: input should be a valid list (found 3)"),
        ("model.path=3", "model.path: input should be a valid string (found 3)"),
        (
            "optim.lr=fast",
            "optim.lr: input should be a valid number, unable to parse string as a number (found 'fast')",
        ),
        ("optim.lr=.nan", "optim.lr: input should be a finite number (found nan)"),
        (
            "optim.batch_size=2.5",
            "optim.batch_size: input should be a valid integer, got a number with a fractional part (found 2.5)",
        ),
        ("stage=rm", "stage: input should be 'sft' (found 'rm')"),
    ],
)
def test_a_value_of_the_wrong_kind(sets: str, line: str) -> None:
    """One line each: that the field is then empty is no fault of its own."""
    assert fault_lines("sft", flags=SFT, sets=[sets]) == [line]


def test_a_key_under_a_value_is_a_fault() -> None:
    lines = fault_lines("sft", flags=SFT, sets=["optim=5", "optim.lr=0.1"])
    assert lines[0] == "optim.lr: 'optim' is a value, not a block"


def bounds() -> list[tuple[str, str, float, float]]:
    """Every bounded field of every stage: stage, path, the nearest values within and beyond its bounds."""
    found = []
    for stage, cls in STAGES.items():
        for field in iterate_fields(cls):
            whole = field.info.annotation is int
            for bound in field.info.metadata:
                for name, sign in (("ge", 1), ("gt", 1), ("le", -1), ("lt", -1)):
                    limit = getattr(bound, name, None)
                    if limit is None:
                        continue
                    step = sign * (1 if whole else 1e-9)
                    within, beyond = (limit, limit - step) if name in ("ge", "le") else (limit + step, limit)
                    found.append((stage, field.path, within, beyond))
    return found


@pytest.mark.parametrize(("stage", "path", "within", "beyond"), bounds())
def test_bounds_hold(stage: str, path: str, within: float, beyond: float) -> None:
    cls = STAGES[stage]
    config = cls.model_validate(nested({path: within}))
    assert at(config, path) == within
    lines = fault_lines(stage, flags=NEEDED[stage] | {path: beyond})
    assert lines[0].startswith(f"{path}: input should be ")
    assert lines[0].endswith(f"(found {beyond!r})")


def test_the_bounds_of_the_words_above_are_found() -> None:
    """The table of bounds is made from the classes; it must not be empty by mistake."""
    found = {(path, within) for _, path, within, _ in bounds()}
    assert {("optim.lr", 1), ("lora.rank", 1024), ("ppo.lam", 0), ("top_p", 1), ("run.keep", 1)} <= found
    assert len(bounds()) > 90


def nested(paths: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for path, value in paths.items():
        *blocks, leaf = path.split(".")
        target = raw
        for block in blocks:
            target = target.setdefault(block, {})
        target[leaf] = value
    return raw


def at(config: AnyConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


# -- which value wins -------------------------------------------------------------------------------------------------


def test_set_wins_over_flag_and_flag_over_recipe() -> None:
    recipe = write_yaml("stage: sft\noptim: {lr: 0.1, epochs: 5, batch_size: 7}\nmodel: {path: of_recipe}\n")
    config = load_config(
        SftConfig,
        recipe=str(recipe),
        flags={"optim.lr": 0.2, "optim.epochs": 6.0, "data.train": ["d"]},
        sets=["optim.lr=0.3", "optim.lr=0.4"],
    )
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size) == (0.4, 6.0, 7)
    assert (config.model.path, config.data.train) == ("of_recipe", ["d"])
    assert config.optim.scheduler == "cosine"


def test_values_of_set_are_yaml() -> None:
    sets = ["optim.lr=1e-4", "data.train=[a.jsonl, b.csv=0.5]", "run.resume=true", "lora.rank=8", "lora.alpha=null"]
    config = load_config(SftConfig, flags={"model.path": "m"}, sets=[*sets, "run.out=a=b"])
    assert config.optim.lr == 1e-4
    assert config.data.train == ["a.jsonl", "b.csv=0.5"]
    assert (config.run.resume, config.lora.rank, config.lora.alpha, config.run.out) == (True, 8, None, "a=b")


def test_defaults_of_ppo_are_its_own() -> None:
    config = load_config(PpoConfig, flags=NEEDED["ppo"])
    assert (config.optim.lr, config.optim.scheduler, config.optim.warmup_ratio) == (1e-6, "constant", 0.0)
    assert load_config(SftConfig, flags=SFT).optim.lr == 1e-5


# -- faults between fields --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "flags", "line"),
    [
        ("sft", {"model.path": ""}, "model.path: no model is given; say --model FOLDER_OR_HUB_ID"),
        ("rm", {"data.train": []}, "data.train: no data is given; say --data FILE"),
        (
            "sft",
            {"model.quantize": "4bit"},
            "model.quantize: 4bit weights cannot be trained; set --lora-rank to train adapters",
        ),
        (
            "sft",
            {"run.trackers": ["none", "tensorboard"]},
            "run.trackers: 'none' stands beside other trackers; leave one of them out",
        ),
        (
            "ppo",
            {"ppo.reward": []},
            "ppo.reward: no reward is given; say --reward RM_FOLDER or --reward file.py:function",
        ),
        (
            "ppo",
            {"ppo.rollout_size": 64, "ppo.samples_per_prompt": 5},
            "ppo.rollout_size: 64 episodes do not divide into 5 samples per prompt",
        ),
        ("ppo", {"ppo.minibatches": 3}, "ppo.minibatches: 64 episodes do not divide into 3 minibatches"),
        (
            "ppo",
            {"ppo.minibatches": 4, "optim.batch_size": 8},
            "optim.batch_size: 8 x ppo.minibatches 4 is not ppo.rollout_size 64; give two of the three",
        ),
        (
            "ppo",
            {"ppo.minibatches": 2, "optim.batch_size": 16},  # its default, asked for
            "optim.batch_size: 16 x ppo.minibatches 2 is not ppo.rollout_size 64; give two of the three",
        ),
        (
            "ppo",
            {"optim.batch_size": 128},
            "optim.batch_size: 128 episodes per optimiser step are more than ppo.rollout_size 64; give 64 or less",
        ),
        (
            "ppo",
            {"ppo.rollout_size": 8, "optim.batch_size": 16},
            "optim.batch_size: 16 episodes per optimiser step are more than ppo.rollout_size 8; give 8 or less",
        ),
        ("ppo", {"optim.batch_size": 24}, "optim.batch_size: 24 does not divide ppo.rollout_size 64"),
        ("ppo", {"ppo.advantage": "rloo"}, "ppo.samples_per_prompt: 'rloo' compares samples: give at least 2"),
        (
            "ppo",
            {"ppo.kl_target": 5.0, "ppo.kl_coef": 0},
            "ppo.kl_target: has no effect on a KL weight that starts at 0; set --kl-coef",
        ),
        ("ppo", {"data.max_length": 256}, "data.max_length: 256 leaves no room for a prompt beside 256 new tokens"),
        (
            "ppo",
            {"ppo.max_prompt_length": 800},
            "ppo.max_prompt_length: 800 and 256 new tokens do not fit in data.max_length 1024",
        ),
        ("generate", {"model": ""}, "model: no model is given; say --model FOLDER_OR_HUB_ID"),
        ("generate", {"prompt": "p", "input": "i", "output": "o"}, "prompt: stands beside input; give one of them"),
        ("generate", {"input": "i"}, "output: is missing; say where the answers go with --output FILE"),
    ],
)
def test_faults_between_fields(stage: str, flags: dict[str, Any], line: str) -> None:
    assert fault_lines(stage, flags=NEEDED[stage] | flags) == [line]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_needed_is_enough(stage: str) -> None:
    load_config(STAGES[stage], flags=NEEDED[stage])  # type: ignore[type-var]


def test_an_adapter_alone_is_a_model() -> None:
    assert load_config(GenerateConfig, flags={"adapter": "runs/sft/final"}).model == ""


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, 16),
        ({"ppo.rollout_size": 8}, 8),  # the default is no more than a rollout has
        ({"ppo.minibatches": 2}, 32),
        ({"ppo.minibatches": 8, "optim.batch_size": 8}, 8),
    ],
)
def test_minibatch_size(flags: dict[str, Any], size: int) -> None:
    assert load_config(PpoConfig, flags=NEEDED["ppo"] | flags).minibatch_size == size


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_bare_name() -> None:
    write_yaml("stage: sft", "configs/mine.yaml")
    write_yaml("stage: sft", "examples/films/theirs.yaml")
    write_yaml("stage: sft", "elsewhere/other.yml")
    assert find_recipe("mine") == Path("configs/mine.yaml")
    assert find_recipe("mine.yaml") == Path("configs/mine.yaml")
    assert find_recipe("theirs") == Path("examples/films/theirs.yaml")
    assert find_recipe("elsewhere/other.yml") == Path("elsewhere/other.yml")


def test_two_recipes_of_one_name_are_refused() -> None:
    write_yaml("stage: sft", "configs/mine.yaml")
    write_yaml("stage: sft", "examples/a/mine.yaml")
    with pytest.raises(ConfigError) as error:
        find_recipe("mine")
    assert error.value.message == "several recipes are called 'mine': configs/mine.yaml, examples/a/mine.yaml"
    assert error.value.hint == "give the path of one"


def test_an_unknown_recipe_is_answered_with_a_near_one() -> None:
    write_yaml("stage: sft", "examples/icake-zg-train.yaml")
    with pytest.raises(ConfigError) as error:
        find_recipe("icake-zg-tran")
    assert error.value.message == "no recipe called 'icake-zg-tran'"
    assert error.value.hint == "did you mean icake-zg-train?"
    with pytest.raises(ConfigError) as error:
        find_recipe("quite-other")
    assert error.value.hint == "looked for quite-other, configs/quite-other.yaml and examples/**/quite-other.yaml"


def test_a_recipe_of_another_stage_is_refused_with_its_command() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SftConfig, recipe=str(write_yaml("stage: ppo")), flags=SFT)
    assert error.value.message == "a.yaml: this recipe is for stage 'ppo', not 'sft'"
    assert error.value.hint == "rlhfkit ppo a.yaml"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: [1, 2", "a.yaml:1: this is no YAML: expected ',' or ']', but got '<stream end>' (while parsing"),
        ("- sft\n- rm\n", "a.yaml holds a list, not a mapping of blocks"),
        ("just words", "a.yaml holds a str, not a mapping of blocks"),
        ("optim: {lr: 0.1}\nmodel: {path: m}\noptim: {epochs: 2}\n", "a.yaml:3: this is no YAML: 'optim' stands twice"),
        ("optim: {lr: 0.1, lr: 0.2}\n", "a.yaml:1: this is no YAML: 'lr' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe(content: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_recipe(str(write_yaml(content)))
    assert words in error.value.message


def test_a_recipe_in_another_encoding_is_refused() -> None:
    Path("a.yaml").write_bytes("model: {path: 模型}".encode("gb18030"))
    with pytest.raises(ConfigError, match=r"a\.yaml is not UTF-8: "):
        read_recipe("a.yaml")


def test_an_empty_recipe_is_all_defaults() -> None:
    recipe = write_yaml("# nothing yet\n")
    assert load_config(SftConfig, recipe=str(recipe), flags=SFT) == load_config(SftConfig, flags=SFT)


def shipped() -> list[Path]:
    """Every YAML file under examples/ and configs/ but accelerate's own and lists of data sets."""
    files = [p for folder in ("configs", "examples") for p in sorted((ROOT / folder).glob("**/*.y*ml"))]
    raw = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    return [p for p in files if p.name != "datasets.yaml" and "compute_environment" not in raw[p]]


def test_every_recipe_we_ship_loads_by_its_bare_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped()
    monkeypatch.chdir(ROOT)
    for path in shipped():
        stage = read_recipe(str(path)).get("stage")
        assert stage in STAGES, f"{path} names no stage"
        assert find_recipe(path.stem).resolve() == path
        load_config(STAGES[stage], recipe=path.stem)  # type: ignore[type-var]


# -- resolved configurations ------------------------------------------------------------------------------------------

CHANGED = {
    "sft": {**SFT, "lora.rank": 8, "lora.alpha": 3.5, "optim.lr": 3e-7, "data.train": ["电影.jsonl=0.5", "b: c"]},
    "rm": {**SFT, "rm.center_coef": 0.01, "data.eval": ["e"], "run.eval_every": 3, "run.trackers": ["none"]},
    "ppo": {**NEEDED["ppo"], **GRPO, "ppo.kl_coef": 0, "optim.scheduler": "linear", "ppo.max_new_tokens": 9},
    "dpo": {**SFT, "dpo.loss": "robust", "dpo.label_smoothing": 0.2, "dpo.sft_coef": 0.1},
    "kto": {**SFT, "kto.beta": 0.3, "kto.desirable_weight": 1.5, "optim.batch_size": 2},
    "grpo": {**NEEDED["grpo"], "grpo.kl_coef": 0.1, "grpo.samples_per_prompt": 4, "optim.lr": 1e-5},
    "rloo": {**NEEDED["rloo"], "rloo.kl_coef": 0, "rloo.temperature": 0.7, "rloo.max_new_tokens": 9},
    "generate": {"model": "m", "prompt": "什么是电影？\n'\"", "stream": False, "temperature": 0.0},
    "score": {"model": "m", "data": ["电影.jsonl", "b"], "json_totals": True, "max_length": 64, "quantize": "4bit"},
}


@pytest.mark.parametrize("flags", [NEEDED, CHANGED], ids=["defaults", "changed"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resolved_recipe_repeats_the_configuration(stage: str, flags: dict[str, dict[str, Any]]) -> None:
    cls = STAGES[stage]
    config = load_config(cls, flags=flags[stage])  # type: ignore[type-var]
    recipe = write_yaml(dump_config(config), "resolved.yaml")
    assert load_config(cls, recipe=str(recipe)) == config  # type: ignore[type-var]


def test_a_resolved_recipe_does_not_say_how_to_start() -> None:
    config = load_config(RmConfig, flags=SFT | {"run.resume": True, "run.plan": True})
    recipe = write_yaml(dump_config(config), "resolved.yaml")
    again = load_config(RmConfig, recipe=str(recipe))
    assert (again.run.resume, again.run.plan) == (False, False)


def test_differing_keys_are_dotted_paths() -> None:
    old = load_config(SftConfig, flags=SFT).model_dump()
    new = load_config(SftConfig, flags=SFT | {"optim.lr": 0.1, "data.train": ["other"]}).model_dump()
    assert differing_keys(old, new) == ["data.train", "optim.lr"]
    assert differing_keys(old, old) == []
    # A key that only one of the two has, as in a run folder of an older version.
    assert differing_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}, "d": 3}) == ["a.c", "d"]


def test_a_lone_text_is_a_list_of_one() -> None:
    recipe = write_yaml("model: {path: M}\ndata: {train: rows.jsonl}\nrun: {trackers: none}\n")
    config = load_config(STAGES["sft"], recipe=str(recipe))
    assert config.data.train == ["rows.jsonl"]
    assert config.run.trackers == ["none"]
    assert load_config(STAGES["score"], flags={"model": "M", "data": "rows.jsonl"}).data == ["rows.jsonl"]
