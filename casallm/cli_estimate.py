"""`casallm estimate`: options to a request, and the answer as table, arithmetic, JSON or plot.

Only typer is imported before the command runs, and neither torch nor the network ever.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from casallm.estimate.architecture import ModelConfig
    from casallm.estimate.estimator import Estimate
    from casallm.estimate.hardware import Hardware
    from casallm.estimate.layout import Wishes

Text = str | None
Number = TypeVar("Number", int, float)


def estimate_command(
    params: Annotated[Text, typer.Option(help="Parameters, as in 350M or 1.2B.")] = None,
    preset: Annotated[Text, typer.Option(help="A named size, with its tokens.")] = None,
    shape: Annotated[
        Text, typer.Option(help="Any model: n_layers=24,d_model=2048,n_heads=16,vocab_size=50304.")
    ] = None,
    tokens: Annotated[
        Text, typer.Option(help="Tokens, as in 24B. Default: 20 a parameter.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Context length. Default: 2048.")] = None,
    gpu: Annotated[Text, typer.Option(help="Only this GPU and count a node, as in A100:8.")] = None,
    nodes: Annotated[int, typer.Option(help="Machines that train together.")] = 1,
    region: Annotated[Text, typer.Option(help="Only this region.")] = None,
    cloud: Annotated[Text, typer.Option(help="Only this cloud.")] = None,
    spot: Annotated[
        bool | None, typer.Option("--spot/--on-demand", help="Only one way of renting.")
    ] = None,
    budget: Annotated[Text, typer.Option(help="Dollars: find the best model they buy.")] = None,
    deadline: Annotated[Text, typer.Option(help="Hours it may take, as in 24h or 2d.")] = None,
    stack: Annotated[str, typer.Option(help="compiled or eager.")] = "compiled",
    precision: Annotated[str, typer.Option(help="bf16, fp8 or fp32.")] = "bf16",
    recompute: Annotated[Text, typer.Option(help="none, selective or full.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences of one pass.")] = None,
    sharding: Annotated[Text, typer.Option(help="ddp, zero1 or fsdp.")] = None,
    price_per_gpu_hour: Annotated[
        Text, typer.Option(help="Dollars; answers for --gpu without a price list.")
    ] = None,
    measured_tokens_per_second: Annotated[
        float | None, typer.Option(help="The run's own rate on --gpu instead of the prediction.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Walk through the arithmetic.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write dollars against parameters to this .png.")
    ] = None,
) -> None:
    """Say what a run will cost: hours and dollars, with a range, by offer."""
    from casallm.estimate.estimator import EstimateRequest, estimate
    from casallm.units import parse_count, parse_hours, parse_usd

    config, usual_tokens, usual_context = _model(params, preset, shape)
    hardware, n_gpus = _machine(gpu, is_priced=price_per_gpu_hour is not None)
    request = EstimateRequest(
        config=config,
        tokens=_maybe(parse_count, tokens, "--tokens") or (None if budget else usual_tokens),
        context_length=usual_context if context is None else context,
        hardware=hardware,
        n_gpus=n_gpus,
        n_nodes=nodes,
        cloud=cloud,
        region=region,
        is_spot=spot,
        budget_usd=_maybe(parse_usd, budget, "--budget"),
        deadline_hours=_maybe(parse_hours, deadline, "--deadline"),
        usd_per_gpu_hour=_maybe(parse_usd, price_per_gpu_hour, "--price-per-gpu-hour"),
        measured_tokens_per_second=measured_tokens_per_second,
        is_own=shape is None,
        wishes=_wishes(stack, precision, recompute, micro_batch, sharding),
    )
    _show(estimate(request), explain=explain, as_json=as_json, plot=plot)


def parse_shape(text: str) -> "ModelConfig":
    """A model of any program from `n_layers=24,d_model=2048,…`; classic and tied unless said.

    Where only its size matters, classic models may also have an untied head or grouped heads.
    """
    from casallm.config import build, parse_overrides
    from casallm.errors import ConfigError
    from casallm.estimate.architecture import ModelConfig

    parts = [part.strip() for part in text.split(",") if part.strip()]
    keys = ["is_tied" if part.startswith("tied=") else part.partition("=")[0] for part in parts]
    example = "write it as n_layers=24,d_model=2048,n_heads=16,vocab_size=50304"
    for part, key in zip(parts, keys, strict=True):
        if "=" not in part:
            raise ConfigError(f"--shape: {part!r} is not KEY=VALUE: {example}")
        if keys.count(key) > 1:
            raise ConfigError(f"--shape says {key} {keys.count(key)} times: keep one of them")
    tree = {"family": "classic"} | parse_overrides(parts)
    if "tied" in tree:
        tree["is_tied"] = tree.pop("tied")
    missing = [key for key in ("n_layers", "d_model", "n_heads", "vocab_size") if key not in tree]
    if missing:
        raise ConfigError(f"--shape {text!r} lacks {', '.join(missing)}: {example}")
    loose: dict[str, Any] = {}
    if tree["family"] == "classic":
        loose = {key: tree.pop(key) for key in ("is_tied", "n_kv_heads") if key in tree}
    config = build(ModelConfig, tree, where="--shape")
    if not loose:
        return config
    checked = build(ModelConfig, tree | loose | {"family": "modern"}, where="--shape")
    update = {"is_tied": checked.is_tied, "n_kv_heads": checked.n_kv_heads}
    return config.model_copy(update=update)


def _model(params: Text, preset: Text, shape: Text) -> tuple["ModelConfig | None", int | None, int]:
    """The model that was asked for, the tokens that go with it, and its context."""
    from casallm.errors import ConfigError
    from casallm.estimate.architecture import named_size, shape_for_params
    from casallm.estimate.estimator import DEFAULT_CONTEXT_LENGTH
    from casallm.estimate.scaling import tokens_for_params
    from casallm.units import parse_count

    if sum(each is not None for each in (params, preset, shape)) > 1:
        raise ConfigError("--params, --preset and --shape exclude each other: keep one of them")
    if params is not None:
        n_params = parse_count(params, what="--params")
        config = shape_for_params(n_params)
        return config, tokens_for_params(n_params), DEFAULT_CONTEXT_LENGTH
    if preset is not None:
        return named_size(preset), *_preset_tokens(preset)
    config_or_none = None if shape is None else parse_shape(shape)
    return config_or_none, None, DEFAULT_CONTEXT_LENGTH


def _preset_tokens(preset: str) -> tuple[int | None, int]:
    """Tokens and context of the run that `casallm pretrain --preset` would start."""
    from importlib import resources

    from casallm.config import parse_yaml
    from casallm.estimate.estimator import DEFAULT_CONTEXT_LENGTH

    file = resources.files("casallm.train").joinpath("presets", f"{preset.lower()}.yaml")
    if not file.is_file():
        return None, DEFAULT_CONTEXT_LENGTH
    train = parse_yaml(file.read_text("utf-8"), where=f"preset {preset}")["train"]
    context_length = int(train["context_length"])
    steps, batch = int(float(train["steps"])), int(train["global_batch_size"])
    return steps * batch * context_length, context_length


def _machine(gpu: Text, *, is_priced: bool) -> tuple["Hardware | None", int | None]:
    """The GPU and its count in a node; a bare name is any count, or one if a price is given."""
    from casallm.estimate.hardware import parse_gpu

    if gpu is None:
        return None, None
    hardware, count = parse_gpu(gpu)
    return hardware, count if is_priced or ":" in gpu else None


def _maybe(parse: Callable[..., Number], text: Text, what: str) -> Number | None:
    return None if text is None else parse(text, what=what)


def _wishes(
    stack: str, precision: str, recompute: Text, micro_batch: int | None, sharding: Text
) -> "Wishes":
    from typing import get_args

    from casallm.config import nearest
    from casallm.errors import ConfigError
    from casallm.estimate import memory
    from casallm.estimate.layout import Wishes

    def one_of(name: str, value: Text, choices: Any) -> Any:
        known = get_args(choices)
        if value is not None and value not in known:
            hint = nearest(value, known)
            raise ConfigError(f"--{name} {value!r} is unknown{hint} (known: {', '.join(known)})")
        return value

    if micro_batch is not None and micro_batch < 1:
        raise ConfigError(f"--micro-batch is {micro_batch}, but must be at least 1")
    return Wishes(
        stack=one_of("stack", stack, memory.Stack),
        precision=one_of("precision", precision, memory.Precision),
        recompute=one_of("recompute", recompute, memory.Recompute),
        micro_batch_size=micro_batch,
        sharding=one_of("sharding", sharding, memory.DataParallel),
    )


def _show(answer: "Estimate", *, explain: bool, as_json: bool, plot: Path | None) -> None:
    from casallm.estimate.answer import to_json

    if plot is not None:
        from casallm.estimate.plot import plot as draw

        draw(answer, plot)
        typer.echo(f"written to {plot}", err=True)
    if as_json:
        typer.echo(json.dumps(to_json(answer), indent=2))
    else:
        _print(answer, explain=explain)


def _print(answer: "Estimate", *, explain: bool) -> None:
    """Plain text of 100 columns; on a terminal the table in colour, as wide as it is."""
    from casallm.estimate import answer as form
    from casallm.estimate.explain import format_explain

    if not sys.stdout.isatty():
        text = format_explain(answer) if explain else form.format_table(answer)
        typer.echo(text)
        return
    from rich.console import Console

    console = Console(highlight=False)
    if explain:
        typer.echo(format_explain(answer, width=console.width))
        return
    console.print(form.heading(answer, width=console.width) + "\n", markup=False)
    console.print(form.rich_table(answer, width=console.width))
    console.print()
    for note in form.notes(answer):
        console.print(note, style="dim", markup=False)
