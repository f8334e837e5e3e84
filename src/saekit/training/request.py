"""What a run is asked for: checked before anything is computed, with every default filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..errors import ConfigError, InputError, listed
from ..kinds import LARGEST
from ..memory import check_memory
from ..places import Warned
from ..provenance import library_versions, release
from ..ranks import check_same
from ..rows.joined import with_equal_parts
from ..rows.opening import Rows, source_of, warnings_on_rows
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.parts import widths_of
from ..settings import check_whole, is_whole
from .architectures import config_to_dict, name_of
from .config import BatchTopK, Config
from .defaults import ResolvedConfig, default_batch_rows, resolve
from .fused import STEPS, default_step
from .mesh import Mesh
from .mutual_regularization import check_mutual
from .settings import TrainSettings
from .warm_start import warm_starts

Seeds = int | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Request:
    """One run: what to train, on which rows, and how."""

    source: Source
    configs: list[Config]
    asked_seeds: list[Any]
    """The seeds as they were asked for, one list for all configurations or one each."""
    names: list[str]
    """Folder names of the SAEs, in the order of `learners`."""
    warm_starts: list[SAE]
    """The SAEs to initialize from, in the order of `learners`; empty for random initialization."""
    asked_rows: int
    """Rows to train on before they are cut to whole batches."""
    batch_rows: int
    total_steps: int
    resolved: list[ResolvedConfig]
    """What the run fills in, for each configuration."""
    settings: TrainSettings
    device: torch.device
    step: str
    warnings: list[Warned] = field(default_factory=list)
    """In what the rows are not like those of the SAEs to initialize from."""

    @property
    def d_out(self) -> int | None:
        """Width of the targets of transcoders; None for SAEs."""
        return self.source.info.get("d_out")

    @property
    def used_rows(self) -> int:
        """Rows that the run trains on: whole batches, a row that is seen twice counts twice."""
        return self.total_steps * self.batch_rows

    @property
    def epochs(self) -> float | None:
        """How many times each row of the source is seen; None where the number of its rows is not known."""
        return self.used_rows / self.source.n_rows if self.source.n_rows else None

    @property
    def learners(self) -> Iterator[tuple[Config, int]]:
        """Configuration and seed of every SAE to train: configuration by configuration, seed by seed."""
        for config, own in zip(self.configs, seeds_of(self.configs, self.asked_seeds)):
            for seed in own:
                yield config, seed

    def to_json(self) -> dict[str, Any]:
        """Return what decides the numbers, as ``run.json`` records it; a resumed run must have the same."""
        return {
            "configs": [config_to_dict(config) for config in self.configs],
            "seeds": self.asked_seeds,
            "total_steps": self.total_steps,
            "resolved": [asdict(each) for each in self.resolved],
            "batch_rows": self.batch_rows,
            "data_seed": self.settings.data_seed,
            "precision": self.settings.precision,
            "step": self.step,
            "d_in": self.source.d_in,
            **({} if self.d_out is None else {"d_out": self.d_out}),
            "rows": self.source.info.get("digest"),
            **({"start": [sae.digest() for sae in self.warm_starts]} if self.warm_starts else {}),
        }


def make_request(
    configs: Config | Sequence[Config],
    rows: Rows,
    *,
    seeds: Seeds,
    tokens: int | None,
    start: SAE | Sequence[SAE] | None,
    settings: TrainSettings,
    ranked: bool = False,
) -> Request:
    """Return the request for a call of `saekit.train`; `ranked`: for one of several ranks.

    Raises
    ------
    ConfigError
        A setting cannot work.
    DataError
        The source has fewer rows than a batch.
    """
    configs = [configs] if isinstance(configs, Config) else list(configs)
    check_configs(configs)
    source = source_of(rows)
    d_out = source.info.get("d_out")
    for config in configs:
        check_target(config, d_out, start)
        check_start(config, start)
    configs = [with_parts(config, source, start) for config in configs]
    source = with_equal_parts(source)
    device = device_of(settings)
    check_device(device)
    asked_seeds = listed_seeds(seeds, configs, source.d_in, device)
    own_seeds = seeds_of(configs, asked_seeds)
    for own in own_seeds:
        check_seeds(own)
    check_whole("train", tokens=tokens)
    step = choose_step(settings, configs, device, ranked)
    for config, own in zip(configs, own_seeds):
        check_mutual(config, own, step)
    asked_rows, batch_rows = rows_of(source, tokens, settings.batch_rows)
    total_steps = asked_rows // batch_rows
    learners = [config for config, own in zip(configs, own_seeds) for _ in own]
    check_memory(
        "train",
        memory_of(learners, source.d_in, d_out) | memory_of_batch(learners, source.d_in, batch_rows, step),
        "Use fewer latents or seeds, a smaller `batch_rows`, or a call for each configuration.",
        device,
    )
    names = run_names(configs, asked_seeds)
    given = warm_starts(start, len(names))
    return Request(
        source=source,
        configs=configs,
        asked_seeds=asked_seeds,
        names=names,
        warm_starts=given,
        asked_rows=asked_rows,
        batch_rows=batch_rows,
        total_steps=total_steps,
        resolved=[resolve(each, source.d_in, total_steps, batch_rows, settings.precision) for each in configs],
        warnings=warnings_on_rows([*zip(names, given)], source) if given else [],
        settings=settings,
        device=device,
        step=step,
    )


def check_target(config: Config, d_out: int | None, start: object = None) -> None:
    """Refuse what only SAEs have where rows come with targets, and a skip path where they do not."""
    if d_out is None:
        if config.skip is not None:
            raise ConfigError(
                f"train: `{type(config).__name__}.skip` is for transcoders: an SAE with a skip path would copy its "
                "rows. Give rows with targets (`hook_out`, or ArrayRows(x, target=y)), or leave it out."
            )
        return
    if config.aligned:
        raise ConfigError(
            f"train: `{type(config).__name__}.aligned` must be False where rows come with targets: encoder and decoder "
            "rows of a transcoder lie in two spaces. Leave it out."
        )
    if start is not None:
        raise ConfigError("train: `start` must be left out where rows come with targets; transcoders begin anew.")


STARTED = ("bias", "scaling", "subspace", "encoder_length")
"""Fields about initial values that a warm start brings itself."""


def check_start(config: Config, start: object) -> None:
    """Refuse initial values that a warm start would not use, because it has its own."""
    for name in STARTED if start is not None else ():
        if getattr(config, name, None) != getattr(type(config), name, None):
            raise ConfigError(
                f"train: `{type(config).__name__}.{name}` must be left out with `start`, which brings its own; got "
                f"{getattr(config, name)!r}."
            )


def with_parts(config: Config, source: Source, start: object = None) -> Config:
    """Return the configuration of a crosscoder with the widths of its sources; refuse what crosscoders have not."""
    widths = widths_of(source.info)
    own = getattr(config, "parts", None)
    if widths is None:
        if own is not None:
            raise ConfigError(
                "train: `BatchTopK.parts` is for rows of several sources; these are of one. Make them with "
                "join_rows, which says the widths itself, or leave it out."
            )
        return config
    check_crosscoder(config, start)
    if own is not None and own != widths:
        raise ConfigError(
            f"train: `BatchTopK.parts` must be the widths of the rows, {widths}; got {own}. Leave it out."
        )
    assert isinstance(config, BatchTopK)
    return replace(config, parts=widths)


def check_crosscoder(config: Config, start: object = None) -> None:
    """Refuse what crosscoders have not: other architectures than BatchTopK, a start from another SAE."""
    if not isinstance(config, BatchTopK):
        raise ConfigError(
            f"train: a crosscoder must be a BatchTopK; got {type(config).__name__}. Its rows are those of several "
            "sources side by side."
        )
    if start is not None:
        raise ConfigError("train: `start` must be left out for a crosscoder.")


def check_ranks(request: Request, mesh: Mesh) -> None:
    """Refuse what cannot be split over the ranks, and ranks that were asked for different things.

    Raises
    ------
    ConfigError
        On all ranks.
    """
    if mesh.size == 1:
        return
    if request.batch_rows % mesh.data_size:
        raise ConfigError(
            f"train: `batch_rows` must be a multiple of the {mesh.data_size} ranks that split the rows; got "
            f"{request.batch_rows}. Give another batch_rows, or another number of ranks or `latent_shards`."
        )
    for config in request.configs:
        if config.n_latents % mesh.latent_size:
            raise ConfigError(
                f"train: `n_latents` must be a multiple of latent_shards={mesh.latent_size}; got {config.n_latents}."
            )
        if config.mutual:
            raise ConfigError("train: `mutual` must be 0 on several ranks; use one process for it.")
        if config.orthogonal and mesh.latent_size > 1:  # it compares every latent with every other one
            raise ConfigError("train: `orthogonal` must be 0 with latent_shards > 1; split the rows only.")
    if request.step != "plain":
        raise ConfigError(
            f"train: `step` must be 'plain' on several ranks, the one that is split; got {request.step!r}."
        )
    versions = {**library_versions(with_model=True), "saekit": release()}
    check_same(mesh, "train", {"versions": versions, "request": request.to_json(), "device": request.device.type})


def memory_of(learners: Sequence[Config], d_in: int, d_out: int | None = None) -> dict[str, int]:
    """Return the bytes that learners hold until the run has ended, by what needs them; `d_out`: of transcoders."""
    numbers = [parameters_of(config, d_in, d_out) for config in learners]
    # Weights and Adam's two moments, and at the end the SAEs beside them.
    return {f"weights and moments of {len(numbers):,} SAEs ({sum(numbers):,} parameters)": 4 * 4 * sum(numbers)}


def memory_of_batch(learners: Sequence[Config], d_in: int, batch_rows: int, step: str) -> dict[str, int]:
    """Return the bytes of a step at least, by what needs them; learners take their step one after the other."""
    codes = max(getattr(config, "k", 0) for config in learners)
    gradients = max(parameters_of(config, d_in) for config in learners) if step == "plain" else 0
    return {
        "gradients": 4 * gradients,
        # The rows, what is reconstructed and what is left, and value and index of every code.
        f"batches of {batch_rows:,} rows": batch_rows * (3 * 4 * d_in + (4 + 8) * codes),
    }


def parameters_of(config: Config, d_in: int, d_out: int | None = None) -> int:
    """Return the number of parameters of an SAE, or a transcoder, in training, at least."""
    d_out = d_out or d_in
    skip = d_in * d_out if config.skip else 0
    return config.n_latents * (d_in + d_out) + config.n_latents + d_out + skip


def listed_seeds(seeds: Seeds, configs: Sequence[Config], d_in: int, device: torch.device) -> list[Any]:
    """Return the seeds as a list, unless there are more than SAEs fit into memory; raises `ConfigError`."""
    if isinstance(seeds, int):
        return [seeds]
    if isinstance(seeds, range):  # a short word for what may be longer than any memory
        count = min(max((seeds.stop - seeds.start) // seeds.step, 0), LARGEST)
        smallest = min(parameters_of(config, d_in) for config in configs)
        check_memory("train", {f"{count:,} seeds": 4 * 4 * smallest * count}, "Use fewer seeds.", device)
    return list(seeds)


def choose_step(settings: TrainSettings, configs: Sequence[Config], device: torch.device, ranked: bool = False) -> str:
    """Return the name of the step of a run; raises `ConfigError` for one that does not exist."""
    if settings.step is not None:
        if settings.step not in STEPS:
            raise ConfigError(f"train: `step` must be one of {listed(STEPS)}; got {settings.step!r}.")
        return settings.step
    # Only the plain step knows the penalty that ties seeds together, and is split over ranks.
    plain = any(config.mutual for config in configs)
    return "plain" if ranked or plain else default_step(device)


def check_configs(configs: Sequence[Config]) -> None:
    """Refuse an empty list, what is no configuration, and the same configuration twice; raises `ConfigError`."""
    if not configs:
        raise ConfigError(
            "train: `configs` must hold at least one configuration; got none. Pass TopK(n_latents=1024, k=16), say."
        )
    for config in configs:
        if not isinstance(config, Config):
            raise ConfigError(
                f"train: every one of `configs` must be a configuration such as TopK(n_latents=1024, k=16); "
                f"got {config!r}. Make one from a dictionary with config_from_dict."
            )
    if len(set(configs)) < len(configs):
        raise ConfigError("train: `configs` must all be different; got one twice. Use seeds=[0, 1] for repetitions.")


def check_seeds(seeds: Sequence[Any]) -> None:
    """Refuse seeds of one configuration that are not different whole numbers from 0; raises `ConfigError`."""
    if not seeds or not all(is_whole(seed) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"train: `seeds` must be different whole numbers from 0, at least one; got {seeds!r}. Pass seeds=[0, 1]."
        )


def device_of(settings: TrainSettings) -> torch.device:
    """Return the device to train on; raises `ConfigError` for one that torch does not know."""
    try:
        return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(
            f"train: `device` must be a device of torch, `cpu` or `cuda` say; got {settings.device!r}."
        ) from error


def check_device(device: torch.device) -> None:
    """Refuse a CUDA device where there is none; raises `ConfigError`."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"train: device='{device}' needs a CUDA device; none is available. Use TrainSettings(device='cpu')."
        )


def seeds_of(configs: Sequence[Any], seeds: list[Any]) -> list[list[Any]]:
    """Return the seeds of each configuration: the same for all, or one list each.

    >>> seeds_of(["a", "b"], [0, 1]), seeds_of(["a", "b"], [[0, 1], [0]])
    ([[0, 1], [0, 1]], [[0, 1], [0]])
    """
    if not any(isinstance(own, list | tuple) for own in seeds):
        return [seeds] * len(configs)
    if not all(isinstance(own, list | tuple) for own in seeds) or len(seeds) != len(configs):
        raise ConfigError(
            f"train: `seeds` must be whole numbers, or one list of them for each of the {len(configs)} configurations; "
            f"got {seeds!r}. Pass seeds=[0, 1], or seeds=[[0, 1], [0]] for two configurations."
        )
    return [list(own) for own in seeds]


def rows_of(source: Source, tokens: int | None, batch_rows: int | None) -> tuple[int, int]:
    """Return `tokens`, or the rows of one pass over the source, and the rows per step.

    Raises where there is not one batch.
    """
    rows = tokens if tokens is not None else source.n_rows
    if rows is None:
        raise ConfigError("train: `tokens` must be given for a source that does not know its number of rows; got None.")
    batch_rows = batch_rows or default_batch_rows(rows)
    if rows < batch_rows:
        what = "`tokens` must be" if tokens is not None else "the source must have"
        kind = ConfigError if tokens is not None else InputError
        raise kind(
            f"train: {what} at least batch_rows={batch_rows} rows; got {rows}. "
            "Use a smaller batch: settings=TrainSettings(batch_rows=64), say."
        )
    return rows, batch_rows


def run_names(configs: Sequence[Config], seeds: list[Any]) -> list[str]:
    """Return folder names in the order of the learners; of configurations with one name, all but the first are
    numbered.
    """
    seen: dict[str, int] = {}
    names = []
    for config, own in zip(configs, seeds_of(configs, seeds), strict=True):
        base = name_of(config)
        seen[base] = seen.get(base, 0) + 1
        base += f"-{seen[base]}" if seen[base] > 1 else ""
        names += [f"{base}-seed{seed}" for seed in own]
    return names
