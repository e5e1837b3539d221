"""The fine-tuning stage: from a finished run and a recipe to an assistant.

Weights, shape and vocabulary come from a checkpoint of another run, conversations from a recipe
(`data.recipe`), and the number of steps from both: every conversation is seen `train.epochs`
times. The mixture is built once and kept in the run, so that the run goes on anywhere with the
very conversations that it began with. Part of its identity are the recipe's hash, the mixture's
fingerprint and the sha256 of the weights that it started from.
"""

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from casallm.config import Tree, build, merge, parse_overrides, sha256_of, to_tree
from casallm.data.conversation import Message, prompt_ids
from casallm.data.identity import EVAL_PHRASINGS, ORDINARY_PROMPTS
from casallm.data.mixture import Mixture, build_mixture, load_mixture, save_mixture
from casallm.data.packing import SftLoader
from casallm.data.recipe import IdentityConfig, Recipe, default_recipe, load_recipe
from casallm.data.tokenizer import Tokenizer, load_tokenizer
from casallm.errors import CasallmError, CheckpointError, ConfigError
from casallm.evals.chat import ChatEvaluation, evaluate_chat, evaluation_chats
from casallm.inference.sampling import SamplingConfig
from casallm.storage.store import Store, open_store
from casallm.train.base import BaseName, choose_base, open_base
from casallm.train.distributed import World
from casallm.train.evaluation import Prompt, longest_prompt
from casallm.train.machine import Machine, supports_bf16
from casallm.train.run import BaseConfig, RunConfig, load_config, require_stage, saved_settings
from casallm.train.run_place import run_url as named_run
from casallm.train.stage import Feed, Material, Start
from casallm.train.trained import Trained, answer_chats, load_trained, run_tokenizer

log = logging.getLogger(__name__)

EPOCHS = 3
"""As in the reference recipe."""

LR_FRACTION = 0.1
"""The peak rate, as a share of the pretraining's."""

BATCH_FRACTION = 0.25
"""The sequences of a step, as a share of the pretraining's: conversations are few."""

EVALUATIONS_PER_EPOCH = 2

CHATS = (EVAL_PHRASINGS[0], EVAL_PHRASINGS[3], ORDINARY_PROMPTS[0], ORDINARY_PROMPTS[3])
"""What the model answers at every evaluation unless `eval.prompts` says otherwise."""

ANSWER_TOKENS = 96
"""Of one answer in the chat evaluation: a sentence or four."""

SHORTEST_ANSWER = 8
"""Chats are not judged where an answer could not have so many tokens."""

ROOT = Path("data")


@dataclass(frozen=True)
class SftRequest:
    """What a person asked for; empty means: decide for me."""

    start: Start = field(default_factory=Start)
    start_from: str | None = None
    """RUN or RUN@STEP; empty: the newest finished pretraining run under runs/."""
    data: str | None = None
    """A recipe: a YAML file or a name."""

    def run_url(self, machine: Machine) -> str:
        """Where the run lives: as asked, else beside the run it starts from, with -sft behind."""
        if self.start.run:
            return named_run(self.start.run)
        return f"{BaseName.parse(self.start_from).url.rstrip('/')}-sft"

    def plan(self, machine: Machine, run: Store) -> RunConfig:
        """All settings of the run; the mixture, on which its length depends, is built for it."""
        return self._draft(machine, run).config

    def settle(self, machine: Machine, run: Store) -> tuple[RunConfig, Material]:
        """All settings, and the mixture with its vocabulary under `data/<fingerprint>/`."""
        draft = self._draft(machine, run)
        return draft.config, _save(draft)

    def score(
        self, run: Store, config: RunConfig, material: Material
    ) -> Iterator[tuple[str, Tree]]:
        """How the assistant chats, and how the model that it was made of did."""
        name = _identity(config).name
        models = {"before": partial(_load_base, config), "after": partial(load_trained, run)}
        for when, load in models.items():
            try:
                evaluation = chat_evaluation(load(), config)
            except CasallmError as error:
                log.warning("no chat evaluation (%s): %s", when, error)
                continue
            yield "chat", {"when": when, "name": name, **asdict(evaluation)}

    def _draft(self, machine: Machine, run: Store) -> "_Draft":
        saved = saved_settings(run)
        return self._begin(machine) if saved is None else self._go_on(run, *saved)

    def _begin(self, machine: Machine) -> "_Draft":
        base, sha256 = choose_base(BaseName.parse(self.start_from))
        base_run = open_store(base.run)
        asked = self._asked()
        name = asked.get("data", {}).get("source") or default_recipe()
        recipe = load_recipe(name, {"identity": asked.get("identity", {})})
        settings = merge(_defaults(load_config(base_run)[0], machine), asked)
        decided = {
            "base": to_tree(base),
            "data": {"source": name},
            "identity": to_tree(recipe.identity),
        }
        config = build(RunConfig, merge(settings, decided))
        tokenizer = run_tokenizer(base_run)
        mixture = _build(recipe, tokenizer, config)
        config = _with_length(config, mixture)
        if "every_steps" not in asked.get("eval", {}):
            every = math.ceil(config.train.steps / _epochs(config) / EVALUATIONS_PER_EPOCH)
            evaluation = config.eval.model_copy(update={"every_steps": every})
            config = config.model_copy(update={"eval": evaluation})
        return _Draft(config, recipe, mixture, tokenizer, sha256)

    def _go_on(self, run: Store, settings: Tree, hashes: Tree) -> "_Draft":
        """As the run began, but for what is asked; a difference in identity shows up later."""
        require_stage(run, settings, "sft")
        before = build(RunConfig, settings, where=f"{run.url}/config.yaml")
        config = build(RunConfig, merge(settings, self._asked()))
        base, sha256 = _pinned(before), hashes.get("base_weights_sha256", "")
        if self.start_from and not BaseName.parse(self.start_from).fits(base):
            base, sha256 = choose_base(BaseName.parse(self.start_from))
        recipe = load_recipe(config.data.source, {"identity": to_tree(_identity(config))})
        tokenizer = run_tokenizer(run)
        is_as_before = (
            _sha256_of(recipe) == hashes.get("recipe_sha256")
            and config.train.context_length == before.train.context_length
            and config.train.seed == before.train.seed
        )
        if is_as_before:
            mixture = _load(run, str(hashes.get("mixture_fingerprint")))
        else:
            mixture = _build(recipe, tokenizer, config)
        config = _with_length(config.model_copy(update={"base": base}), mixture)
        return _Draft(config, recipe, mixture, tokenizer, sha256)

    def _asked(self) -> Tree:
        """What was said on the command line; ConfigError for what sft does not leave open."""
        asked = parse_overrides(self.start.settings)
        for section in ("stage", "base", "model", "tokenizer"):
            if section in asked:
                raise ConfigError(
                    f"{section} comes with the run that sft starts from: leave it out, or choose"
                    " another run with --from"
                )
        if "steps" in asked.get("train", {}):
            raise ConfigError(
                "train.steps follows from the number of conversations: set train.epochs instead"
            )
        return merge({"data": {"source": self.data}}, asked) if self.data else asked


def open_feed(directory: Path, config: RunConfig, world: World, micro_batch_size: int) -> Feed:
    """This rank's rows of the mixture in `directory`, and chats to answer."""
    tokenizer = load_tokenizer(directory / "tokenizer")
    loader = SftLoader(
        load_mixture(directory / "mixture.npz"),
        epochs=_epochs(config),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        device=world.device,
    )
    chats = [
        Prompt(text, tuple(prompt_ids((Message("user", text),), tokenizer)))
        for text in config.eval.prompts or CHATS
    ]
    most = longest_prompt(config.train.context_length)
    sources = {name: partial(loader.validation, source=name) for name in loader.validation_sources}
    return Feed(
        loader,
        tokenizer,
        prompts=[chat for chat in chats if len(chat.ids) <= most],
        sources=sources if len(sources) > 1 else {},
    )


@dataclass(frozen=True)
class _Draft:
    """A run's settings and what it trains on, in memory."""

    config: RunConfig
    recipe: Recipe
    mixture: Mixture
    tokenizer: Tokenizer
    base_weights_sha256: str


def _pinned(config: RunConfig) -> BaseConfig:
    if config.base is None:
        raise CheckpointError(
            "the run's config.yaml does not say what it started from (base): restore it, or start a"
            " run of another name"
        )
    return config.base


def _defaults(base: RunConfig, machine: Machine) -> Tree:
    """The settings that follow from those of the run that is started from.

    AdamW, whatever the base was trained with: on batches so small a step of Muon costs nearly half
    as much as the gradient.
    """
    lr = base.optim.lr * (LR_FRACTION if base.stage == "pretrain" else 1)
    tree = to_tree(base)
    return {
        "stage": "sft",
        "model": tree["model"],
        "tokenizer": tree["tokenizer"],
        "optim": {**tree["optim"], "name": "adamw", "lr": float(f"{lr:.3g}")},
        "schedule": {"name": "cosine", "warmup_fraction": 0.03},
        "train": {
            "steps": 1,
            "epochs": EPOCHS,
            "global_batch_size": max(1, round(base.train.global_batch_size * BATCH_FRACTION)),
            "context_length": base.train.context_length,
            "seed": base.train.seed,
            "precision": "bf16" if supports_bf16(machine) else "fp32",
        },
    }


def _load_base(config: RunConfig) -> Trained:
    base = _pinned(config)
    return load_trained(open_store(base.run), open_base(base))


def chat_evaluation(trained: Trained, config: RunConfig) -> ChatEvaluation:
    """How `trained` does in the fixed chats; ConfigError where they do not fit its context."""
    longest = max(len(prompt_ids(chat, trained.tokenizer)) for chat in evaluation_chats())
    if longest + SHORTEST_ANSWER > trained.context_length:
        raise ConfigError(
            f"a question of {longest} tokens leaves no room in a context of"
            f" {trained.context_length}: train with a longer train.context_length"
        )
    respond = partial(
        answer_chats,
        trained,
        max_new_tokens=min(ANSWER_TOKENS, trained.context_length - longest),
        sampling=SamplingConfig(temperature=0.0),
    )
    return evaluate_chat(respond, _identity(config).name)


def _identity(config: RunConfig) -> IdentityConfig:
    return config.identity or IdentityConfig()


def _epochs(config: RunConfig) -> int:
    return config.train.epochs or EPOCHS


def _build(recipe: Recipe, tokenizer: Tokenizer, config: RunConfig) -> Mixture:
    train = config.train
    return build_mixture(recipe, tokenizer, context_length=train.context_length, seed=train.seed)


def _with_length(config: RunConfig, mixture: Mixture) -> RunConfig:
    return config.with_steps(_whole_loader(config, mixture).n_steps)


def _whole_loader(config: RunConfig, mixture: Mixture) -> SftLoader:
    """A loader to ask how many rows and steps there are."""
    return SftLoader(
        mixture,
        epochs=_epochs(config),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        device=torch.device("cpu"),
    )


def _sha256_of(recipe: Recipe) -> str:
    return sha256_of(to_tree(recipe))


def _name_in_run(fingerprint: str) -> str:
    return f"mixture-{fingerprint[:16]}.npz"


def _load(run: Store, fingerprint: str) -> Mixture:
    """The mixture that the run keeps."""
    with tempfile.TemporaryDirectory(prefix="casallm-") as directory:
        path = Path(directory) / "mixture.npz"
        run.get(_name_in_run(fingerprint), path)
        return load_mixture(path)


def _save(draft: _Draft) -> Material:
    """Put the mixture and its vocabulary where the ranks of this machine find them."""
    mixture = draft.mixture
    directory = ROOT / mixture.fingerprint[:16]
    draft.tokenizer.save(directory / "tokenizer")
    save_mixture(mixture, directory / "mixture.npz")
    files = {f"tokenizer/{path.name}": path for path in (directory / "tokenizer").iterdir()}
    files[_name_in_run(mixture.fingerprint)] = directory / "mixture.npz"
    identity = {
        "recipe_sha256": _sha256_of(draft.recipe),
        "mixture_fingerprint": mixture.fingerprint,
        "tokenizer_fingerprint": mixture.tokenizer_fingerprint,
        "base_weights_sha256": draft.base_weights_sha256,
    }
    return Material(directory, identity, _facts(draft), files)


def _facts(draft: _Draft) -> Tree:
    loader = _whole_loader(draft.config, draft.mixture)
    samples = draft.mixture.train
    tokenizer = draft.tokenizer
    return {
        "recipe": draft.config.data.source,
        "sources": [asdict(report) for report in draft.mixture.reports],
        "conversations": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples),
        "learned_tokens": sum(int(sample.is_target.sum()) for sample in samples),
        "rows_per_epoch": loader.sequences_per_epoch,
        "fill_fraction": loader.fill_fraction,
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size},
    }
