"""``rlhfkit serve-reward``: options of score, and its own."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from rlhfkit.cli.application import register, use_endpoint
from rlhfkit.cli.options import option_of
from rlhfkit.config.load import iterate_fields, load_config
from rlhfkit.config.stages import STAGES, ScoreConfig
from rlhfkit.errors import ConfigError

SERVED = ("max_length", "micro_batch_tokens", "precision", "quantize", "trust_remote_code", "hf_endpoint")


def _serve_reward_command() -> None:
    fields = {f.path: f for f in iterate_fields(STAGES["score"]) if f.path in SERVED}

    def command(**given: Any) -> None:
        flags = {name: given[name] for name in fields if given[name] is not None}
        if not given["model"]:
            raise ConfigError("no reward model is given", hint="rlhfkit serve-reward FOLDER_OR_HUB_ID")
        try:
            config: Any = load_config(ScoreConfig, flags={"model": given["model"], **flags}, not_needed=("data",))
        except ConfigError as error:
            raise ConfigError(error.message, hint="all options: rlhfkit serve-reward --help") from None
        use_endpoint(config.endpoint)
        from rlhfkit.stages import serve_reward as stage

        port = 8000 if given["port"] is None else given["port"]
        stage.run(config, host=given["host"] or "127.0.0.1", port=port)

    annotations = {
        "model": Annotated[
            Optional[str],  # noqa: UP045
            typer.Argument(metavar="RM", help="Reward model: folder or hub id.", show_default=False),
        ],
        "host": Annotated[
            Optional[str],  # noqa: UP045
            typer.Option(
                "--host", help="Address to listen at; 0.0.0.0 lets other machines in.", show_default="127.0.0.1"
            ),
        ],
        "port": Annotated[
            Optional[int],  # noqa: UP045
            typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.", show_default="8000"),
        ],
        **{name: option_of(field) for name, field in fields.items()},
    }
    examples = [
        "rlhfkit serve-reward runs/rm/final --port 8000",
        "rlhfkit ppo --model runs/sft/final --reward http://127.0.0.1:8000/score --data prompts.jsonl",
    ]
    register("serve-reward", command, annotations, "Serve a reward model's scores over HTTP, for PPO.", examples)


_serve_reward_command()
