"""Commands on model folders and run folders, whose options are their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rlhfkit.cli.application import as_command, use_endpoint
from rlhfkit.cli.options import family_names, one_of
from rlhfkit.errors import ConfigError
from rlhfkit.words import tr


@as_command("fix-checkpoint")
def fix_checkpoint(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The original model folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder a training run saved; it is mended in place.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Carry the plan out without asking.")] = False,
    pad_vocab: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--pad-vocab", min=1, help="Grow embedding and head to a multiple of this number of rows."),
    ] = None,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Write .bin weights as safetensors, running no code in them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")] = False,
) -> None:
    """Repair DST (what a training run saved) from SRC (the original model folder).

    The plan is shown first; what is replaced is kept in a backup folder. Weights are written only with
    --pad-vocab or --safetensors.

    [bold]Examples[/bold]

      rlhfkit fix-checkpoint ./Qwen-7B ./my-finetune --dry-run

      rlhfkit fix-checkpoint ./Qwen-7B ./my-finetune --yes

      rlhfkit fix-checkpoint ./Qwen-7B ./my-finetune --safetensors --pad-vocab 64
    """
    if dry_run and yes:
        raise ConfigError("--yes has no effect with --dry-run, which asks nothing", hint="give one of them")
    from rlhfkit.stages import fix_checkpoint as stage

    stage.run(
        src,
        dst,
        dry_run=dry_run,
        yes=yes,
        confirm=typer.confirm,
        pad_vocab=pad_vocab or 0,
        safetensors=safetensors,
        as_json=as_json,
    )


@as_command("merge")
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, its final/, or any peft LoRA folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make; it must not exist.")],
    base: Annotated[str, typer.Option("--base", help="The base model, if it is not where the adapter says.")] = "",
    dtype: Annotated[
        str,
        one_of(
            "--dtype",
            "Format of the result; auto: the base's, fp32 for reward models.",
            "auto",
            "fp32",
            "bf16",
            "fp16",
        ),
    ] = "auto",
    device: Annotated[str, one_of("--device", "Where the comparison computes.", "auto", "cpu", "cuda")] = "auto",
    hf_endpoint: Annotated[str, typer.Option("--hf-endpoint", help="Hub mirror; else HF_ENDPOINT.")] = "",
) -> None:
    """Merge a LoRA or QLoRA adapter into its 16-bit base, and prove the result.

    Weights pass tensor by tensor. Base and adapter are compared with the merged folder on probe text before
    it is put in place; if they differ by more than rounding, nothing is written.

    [bold]Examples[/bold]

      rlhfkit merge runs/sft7b merged/sft7b

      rlhfkit merge runs/sft7b/final merged/exact --dtype fp32
    """
    use_endpoint(hf_endpoint)
    from rlhfkit.stages import merge as stage

    stage.run(run, dst, base=base, dtype=dtype, device=device)


@as_command("doctor")
def doctor(
    model: Annotated[Path, typer.Argument(metavar="M", help="A model folder, a LoRA folder, or a run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")] = False,
) -> None:
    """Say what is wrong with a model folder or its tokenizer, and what mends it.

    Reads names, shapes and settings: no weights are loaded, and no code of the folder runs. The exit code is 1 if a
    check fails.

    [bold]Examples[/bold]

      rlhfkit doctor ./my-finetune

      rlhfkit doctor runs/sft --json
    """
    from rlhfkit.stages import doctor as stage

    if any(finding.state == "fail" for finding in stage.run(model, as_json=as_json)):
        raise typer.Exit(1)


@as_command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a folder that holds some.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="File to write; report.html in the run folder, or here for several runs."),
    ] = None,
    form: Annotated[
        Optional[str],  # noqa: UP045
        one_of("--format", "Form of the report; by the name of --out if not given.", "html", "png", "md"),
    ] = None,
) -> None:
    """Show what runs did: curves, answers as they changed, settings, what deserves a look.

    The page needs nothing beside it and opens from disk. Runs of one stage are laid over one another.

    [bold]Examples[/bold]

      rlhfkit report runs/ppo

      rlhfkit report runs/ppo runs/ppo-kl01 --out compare.html

      rlhfkit report runs/sft --format png
    """
    from rlhfkit.stages import report as stage

    for path in stage.run(runs, out=out, form=form):
        print(path)


@as_command("init")
def init(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE",
            help="sft, rm, ppo, dpo, kto, grpo or rloo.",
            autocompletion=lambda: ["sft", "rm", "ppo", "dpo", "kto", "grpo", "rloo"],
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", help="Folder or hub id; the family's largest that fits if not given.")
    ] = "",
    family: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--family",
            help="Whose models to choose from.",
            show_default="qwen",
            autocompletion=lambda: family_names()[1:],
        ),
    ] = None,
    memory: Annotated[float, typer.Option("--memory", min=1, help="GiB that the GPU, or the machine, has.")] = 24.0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="File to write.", show_default="configs/STAGE.yaml"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented recipe for a stage, a model and a memory size, and the schema by which editors check it.

    [bold]Examples[/bold]

      rlhfkit init sft --memory 24

      rlhfkit init ppo --model runs/sft/final --memory 16 --out configs/ppo.yaml

      rlhfkit init rm --family llama --memory 8
    """
    if model and family:
        raise ConfigError("--family has no effect with --model, which is chosen already", hint="give one of them")
    from rlhfkit.stages import init as stage_init

    recipe, schema = stage_init.run(
        stage, model=model, family=family or "qwen", memory_gib=memory, out=out, force=force
    )
    plan = " --plan" if stage in ("sft", "rm", "ppo") else ""  # what TRL holds is not known beforehand
    print(tr(f"{recipe}\n{schema}\nnext: rlhfkit {stage} {recipe}{plan}"))


@as_command("convert")
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The folder to convert; it is only read.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    to: Annotated[
        str, one_of("--to", "Transformers' own class, or back to the original layout.", "native", "original")
    ] = "native",
    original: Annotated[
        Optional[Path],  # noqa: UP045 -- typer reads it at run time
        typer.Option(
            "--original",
            help="With --to original: the original model folder, if SRC does not know what it was converted from.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Carry the plan out without asking.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print plan and proof as one JSON object; needs --yes or --dry-run.")
    ] = False,
) -> None:
    """Convert a legacy checkpoint (Qwen 1, Baichuan 7B) to the class that transformers has for it.

    No code of the folder is run, and memory stays small whatever the size of the model. The plan is shown first; the
    result is put in place only if its logits and token ids are those of the original. A LLaMA folder with nothing but
    a tokenizer.model gets the right fast tokenizer.

    [bold]Examples[/bold]

      rlhfkit convert ./Qwen-7B-Chat ./qwen-native --dry-run

      rlhfkit convert ./Baichuan2-7B-Chat ./baichuan-native --yes

      rlhfkit convert runs/sft/final ./for-old-servers --to original
    """
    from rlhfkit.stages import convert as stage

    stage.run(src, dst, to=to, original=original, dry_run=dry_run, yes=yes, as_json=as_json, confirm=typer.confirm)


@as_command("families")
def families() -> None:
    """List the installed model families and the package each comes from.

    [bold]Example[/bold]

      rlhfkit families
    """
    from rlhfkit.stages import families as stage

    stage.run()


@as_command("demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the three run folders go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same numbers.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a demo that was stopped.")] = False,
) -> None:
    """Run SFT, reward model and PPO on a bundled model and data: offline, on a CPU, in minutes.

    [bold]Example[/bold]

      rlhfkit demo
    """
    from rlhfkit.stages import demo as stage

    stage.run(out, seed=seed, resume=resume)
