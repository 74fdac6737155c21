"""What the training stages do alike before their loops begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice, pairwise, repeat
from typing import Any, NamedTuple, TypeVar

import torch

from rlhfkit.chat.messages import Conversation, last_user_text
from rlhfkit.chat.template import load_template, template_names
from rlhfkit.config.blocks import RewardsBlock
from rlhfkit.config.sources import parse_source
from rlhfkit.config.stages import StageConfig
from rlhfkit.data.prepare import Recipe, prepare_prompts, prepare_rows
from rlhfkit.data.records import SftRecord
from rlhfkit.data.sources import Mixed, Place, SourceReport, locate, mix, parse_items
from rlhfkit.data.tokenize import PromptRow, TokenReport, make_rows, refuse_none
from rlhfkit.errors import ConfigError, DataError, TemplateError
from rlhfkit.models.folder import ModelSource, open_model
from rlhfkit.models.kernels import chosen_kernels, refuse_kernels
from rlhfkit.models.load import LoadedModel, load_model, refuse_reward_model
from rlhfkit.models.parts import Task, parameter_counts
from rlhfkit.models.precision import current_device
from rlhfkit.models.reward_sources import FunctionReward, WeightedReward, open_rewards
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.text_side import TextSide, load_text_side
from rlhfkit.runtime.run import Run
from rlhfkit.runtime.screen import Screen
from rlhfkit.words import tr

ConfigT = TypeVar("ConfigT", bound=StageConfig)
SAMPLES = 4  # answers shown at each evaluation
CANDIDATES = 64  # rows looked at to find prompts that leave room for them
SAMPLE_TOKENS = 64


def fit_length(config: ConfigT) -> ConfigT:
    """The configuration with its default ``max_length`` brought down to the positions of the model, if they are fewer.
    One that was asked for stays, and is refused where it does not fit.

    Raises:
        ConfigError: lengths that were asked for do not go with it.
    """
    positions = open_model(config.model.path).positions
    if "max_length" in config.data.model_fields_set or not 0 < positions < config.data.max_length:
        return config
    fitted = config.model_copy(update={"data": config.data.model_copy(update={"max_length": positions})})
    if problems := fitted.problems():
        faults = "".join(f"\n  {path}: {why}" for path, why in problems)
        raise ConfigError(
            f"{config.model.path} has {positions} positions:{faults}",
            hint="give shorter lengths, or another model",
        )
    return fitted


def open_text_side(config: StageConfig) -> tuple[ModelSource, TextSide]:
    """The model's folder and its text side, before any weight is read: bad data is found in seconds."""
    source = open_model(config.model.path)
    if config.stage != "rm":
        refuse_reward_model(source)
    limit = source.positions
    if limit and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {limit} positions of {source.path}",
            hint=f"give --max-length {limit} or less",
        )
    refuse_kernels(config.optim.kernels, current_device(), str(source.config.get("model_type", "")))
    text = load_text_side(
        source,
        family=config.model.family,
        template=config.model.template,
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.data.max_length == limit < type(config.data).model_fields["max_length"].default:
        text.notes.append(f"max_length: {limit}, the positions of {source.path}")
    return source, text


class SourceRows(Mixed[Any]):
    """Rows of several sources as one sequence, as `mix` has them, that knows where each row came from.

    Args:
        sources: of each its name, its place and its rows.
        weights: how often the rows of each are used.
        seed: of the draw that weights may ask for.
        recipe: how the rows were made.
        one_each: whether every record became one row: none left out, none split.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Place, Sequence[Any]]],
        weights: Sequence[float],
        seed: int,
        recipe: Recipe,
        *,
        one_each: bool,
    ) -> None:
        super().__init__([rows for _, _, rows in sources], weights, seed)
        self._sources, self._recipe, self._one_each = sources, recipe, one_each
        self._starts = [0, *accumulate(len(rows) for _, _, rows in sources)]
        # Mixed like the rows themselves: the number of each among those of all sources.
        self._numbers = mix([range(a, b) for a, b in pairwise(self._starts)], weights, seed)

    def places(self, indices: Iterable[int]) -> list[str]:
        """Where the records of some rows stand, as ``file:line``. The files are read again for it: rows are many, and
        this is asked once, when something is wrong with one."""
        numbers = {self._numbers[i] for i in indices}
        found: list[str] = []
        for (name, place, _), (start, end) in zip(self._sources, pairwise(self._starts), strict=True):
            wanted = {n - start for n in numbers if start <= n < end}
            records = islice(self._record_of_each_row(name, place), max(wanted, default=-1) + 1)
            found += [record.where for n, record in enumerate(records) if n in wanted]
        return found

    def _record_of_each_row(self, name: str, place: Place) -> Iterator[Any]:
        stage, encoder, limit = self._recipe.stage, self._recipe.encoder, self._recipe.limit
        for record in parse_items(place.items(), stage, "skip", SourceReport(name)):
            made = 1
            if not self._one_each:
                try:
                    made = len(make_rows(stage, record, encoder, limit, TokenReport()))
                except TemplateError:  # left out as a bad row, then as now
                    made = 0
            yield from repeat(record, made)


class DataRows(NamedTuple):
    rows: SourceRows
    digest: str
    faults: list[str]  # what became of rows that are not used, or not whole: sentences for the report


def read_rows(config: StageConfig, specs: Sequence[str], text: TextSide, screen: Screen, what: str) -> DataRows:
    """Token rows of all sources as one sequence, training rows as often as their weights say.

    Prompts are held in memory, all other rows stay in their files.

    Raises:
        DataError: also when no row is left.
    """
    stage: Any = config.row_kind  # a Literal of `rlhfkit.data.parse`
    recipe = Recipe(stage, text.encoder, config.row_limit, config.data.on_bad_row)
    sources: list[tuple[str, Place, Sequence[Any]]] = []
    report = TokenReport()
    digest = hashlib.sha256()
    faults: list[str] = []
    skipped = 0
    for name, place in _places([*specs, *config.data.eval])[: len(specs)]:
        counting = partial(screen.counting, f"tokenising {tr(what)} rows of {name}")
        if stage == "ppo":
            prompts, source, tokens = prepare_prompts(name, place, recipe, counting)
            say_source(screen, source)
            for row in prompts:
                said = [[m.content for m in row.record.prompt], dict(row.record.columns)]
                digest.update(json.dumps(said, sort_keys=True, default=str).encode())
                digest.update(row.prompt.tobytes())
            sources.append((name, place, prompts))
        else:
            store = prepare_rows(name, place, recipe, counting, screen.line)
            source, tokens = store.source, store.tokens
            say_source(screen, source, ", token rows from the cache" if store.cached else "")
            digest.update(store.digest.encode())
            sources.append((name, place, store))
        report.extend(tokens)
        skipped += source.rows_skipped
        if source.rows_skipped:
            faults.append(f"{source.name}: {source.rows_skipped:,} rows were skipped (first: {source.reasons[0]})")
        faults += source.sentences()
    weights = [parse_source(spec).weight if what == "training" else 1.0 for spec in specs]
    for spec, (_, _, group), weight in zip(specs, sources, weights, strict=True):
        if len(group) and not round(weight * len(group)):
            raise DataError(
                f"the data source {spec}: {weight:g} of its {len(group):,} rows is no row",
                hint="give a larger weight, or leave the source out",
            )
    one_each = not (report.left_out or report.split or skipped)
    rows = SourceRows(sources, weights, config.run.seed, recipe, one_each=one_each)
    if specs:
        say_report(screen, what, report)
        refuse_none(sum(len(group) for _, _, group in sources), report)
    if any(weight != 1 for weight in weights):
        screen.line(f"  by the weights of their sources {len(rows):,} rows an epoch")
    return DataRows(rows, digest.hexdigest(), faults + report.sentences())


def first_prompts(config: StageConfig, specs: Sequence[str]) -> list[Conversation]:
    """What the first rows ask that lead to an answer; the rows are known to be good, or skipped where they are not."""
    stage: Any = config.row_kind
    records = (parse_items(place.items(), stage, "skip", SourceReport(name)) for name, place in _places(specs))
    found: list[Conversation] = []
    for record in islice(chain.from_iterable(records), CANDIDATES):
        prompt = record.messages[:-1] if isinstance(record, SftRecord) else record.prompt
        found += [prompt] if prompt else []
    return found


def write_answers(run: Run, model: Any, text: TextSide, prompts: Sequence[Conversation], max_length: int) -> None:
    """Write a few greedy answers to held-out prompts into samples.jsonl; the main process alone, so not if sharded."""
    if run.sharded or not run.is_main:
        return
    candidates = ((prompt, _prompt_ids(prompt, text)) for prompt in prompts)
    fitting = list(islice((c for c in candidates if 0 < len(c[1]) <= max_length - SAMPLE_TOKENS), SAMPLES))
    if not fitting:
        return
    settings = SamplingSettings(
        max_new_tokens=SAMPLE_TOKENS, temperature=0.0, stop_ids=text.tokens.stop_ids, vocabulary=text.vocabulary
    )
    answers = sample_answers(
        model,
        [ids for _, ids in fitting],
        settings,
        seeds=[(0,)] * len(fitting),
        pad_id=text.tokens.pad_id,
        autocast=run.autocast,
    )
    run.samples(
        [
            {
                "prompt": last_user_text(prompt),
                "answer": text.tokenizer.decode(a.ids, skip_special_tokens=True),
                "ended": a.ended,
            }
            for (prompt, _), a in zip(fitting, answers, strict=True)
        ]
    )


def _prompt_ids(prompt: Conversation, text: TextSide) -> list[int]:
    """A prompt's ids, none if the template refuses it: its row was skipped."""
    try:
        return text.encoder.encode_prompt(prompt)
    except TemplateError:
        return []


def _places(specs: Sequence[str]) -> list[tuple[str, Place]]:
    """Names and places of all sources: a missing one is found before work begins on the first."""
    names = [parse_source(spec).name for spec in specs]
    return [(name, locate(name)) for name in names]


def say_source(screen: Screen, source: SourceReport, more: str = "") -> None:
    """Tell how many rows a source gave, the first that was skipped, and what else there is to tell."""
    skipped = f", {source.rows_skipped:,} skipped (first: {source.reasons[0]})" if source.rows_skipped else ""
    screen.line(f"read {source.name}: {source.rows_kept:,} rows{skipped}{more}")
    for sentence in source.sentences():
        screen.line(f"  {sentence}")


def load_for_training(config: StageConfig, run: Run, source: ModelSource, text: TextSide, task: Task) -> LoadedModel:
    """The model of this stage, ready to train, with a line on what it is."""
    loaded = load_model(
        source,
        text,
        task,
        lora=config.lora,
        dtype=run.dtype,
        quantize=config.model.quantize,
        trust_remote_code=config.model.trust_remote_code,
        gradient_checkpointing=config.optim.gradient_checkpointing,
        packing=config.optim.packing and config.engine == "rlhfkit",
        kernels=config.optim.kernels,
        fresh_head=config.stage == "rm",
        device=run.device,
    )
    run.chosen |= _chosen(config, source, text, loaded, run.device)
    trainable, total = parameter_counts(loaded.model)
    for note in [*text.notes, *loaded.notes]:
        run.screen.line(f"  {note}")
    run.screen.line(f"model {source.path} ({text.family.name}): {trainable:,} of {total:,} parameters train")
    return loaded


def _chosen(
    config: StageConfig, source: ModelSource, text: TextSide, loaded: LoadedModel, device: torch.device
) -> dict[str, Any]:
    """What the model, the device and what is installed decide where the configuration says ``auto``."""
    kernels = chosen_kernels(config.optim.kernels, device, str(source.config.get("model_type", "")))
    found: dict[str, Any] = {"model.family": text.family.name, "optim.kernels": kernels}
    # A template of the model's own has no name to be asked for by; auto stays what it is.
    name = text.template.name
    if config.model.template == "auto" and name in template_names() and load_template(name) == text.template:
        found["model.template"] = name
    if loaded.is_lora and config.lora.rank:
        lora = loaded.model.peft_config[loaded.model.active_adapter]
        found["lora.alpha"] = float(lora.lora_alpha)
        if config.lora.targets == "auto" and not isinstance(lora.target_modules, str):
            found["lora.targets"] = ",".join(sorted(lora.target_modules))
    return found


def columns_of(rows: Iterable[PromptRow]) -> set[str]:
    """The names of the rows' fields beside the prompt."""
    return {name for row in rows for name in row.record.columns}


def load_rewards(
    config: StageConfig,
    block: RewardsBlock,
    run: Run,
    columns: Collection[str],
    functions: Mapping[str, FunctionReward],
    policy: LoadedModel | None = None,
) -> WeightedReward:
    """The reward sources of a stage, on this run's device; see `open_rewards`."""
    return open_rewards(
        block.reward,
        device=run.device,
        dtype=run.dtype,
        micro_batch_tokens=run.scoring_tokens,
        trust_remote_code=config.model.trust_remote_code,
        timeout=block.reward_timeout,
        retries=block.reward_retries,
        packing=config.optim.packing,
        kernels=config.optim.kernels,
        columns=columns,
        functions=functions,
        say=run.screen.line,
        policy=policy,
    )


def say_report(screen: Screen, what: str, report: TokenReport) -> None:
    """Tell what tokenising did to the rows."""
    supervised = f", {report.supervised:,} supervised" if report.supervised else ""
    screen.line(f"{tr(what)}: {report.rows:,} rows, {report.tokens:,} tokens{supervised}")
    for sentence in report.sentences():
        screen.line(f"  {sentence}")
