"""One command-line option for each field of :class:`~hip_trt.config.HipConfig`, made from the model itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError

_PANEL = "Attention: how it is pruned (lengths in tokens)"


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--config FILE`` and one option per HipConfig field.

    The command is called with what the user gave, as keyword arguments ``config_file`` (a path or None) and ``fields``
    (field names and values), in place of those options; :func:`resolve_config` turns them into a HipConfig.
    """
    names = tuple(HipConfig.model_fields)

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in names}
        fields = {name: _value(name, value) for name, value in given.items() if value is not None}
        command(**arguments, fields=fields)

    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
        for name, field in HipConfig.model_fields.items()
    ]
    kept = [parameter for name, parameter in own.parameters.items() if name not in ("fields", "config_file")]
    config_file = inspect.Parameter(
        "config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[
            Path | None,
            typer.Option(
                "--config", metavar="FILE.yaml", rich_help_panel=_PANEL,
                help="Read these fields from a YAML file; an option given here overrides it.",
            ),
        ],
    )
    parameters = [*kept, config_file, *options]
    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def resolve_config(config_file: Path | None, fields: dict[str, Any]) -> HipConfig:
    """The config that a user asked for: the file, or the defaults, with single fields changed.

    Raises:
        ConfigError: the file or a value is not valid.
    """
    config = HipConfig.create() if config_file is None else HipConfig.from_yaml(config_file)
    return config.replace(**fields) if fields else config


def _annotation(name: str, field: FieldInfo) -> Any:
    default, whole = field.default, isinstance(field.default, int)
    metavar: str | None
    if name == "dense_layers":
        metavar, shown = "0,1,...", "none"
    else:
        metavar, shown = (None if whole else "kv|query"), str(default)
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=field.description, metavar=metavar, show_default=shown,
        rich_help_panel=_PANEL,
    )
    return Annotated[int | None if whole else str | None, option]


def _value(name: str, value: Any) -> Any:
    """A field's value from what stands on the command line."""
    if name != "dense_layers":
        return value
    try:
        return tuple(int(layer) for layer in value.split(",") if layer.strip())
    except ValueError:
        raise ConfigError(
            f"dense_layers: {value!r} is not allowed; it must be layer indices with commas, such as 0,1,2."
        ) from None
