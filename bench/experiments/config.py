"""The configuration of a training run, as result rows keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.report import Row

# Fields that came later: a row leaves out those that have their default, so that the rows from
# before they came are still found as the same runs.
LATER = (
    "options",
    "lr_adjust",
    "scheme",
    "batch_size_like",
    "clip_norm",
    "seconds",
    "score",
    "max_lr",
    "lr_rule",
    "class_weights",
    "weighted_norm",
)

# fastis' own settings of EMAIS and its kin; a configuration without options has the published ones.
OURS: dict[str, Any] = {"floor": 0.1, "tau_scale": 0.25}
OURS_WITH_GAIN: dict[str, Any] = {"options": OURS, "lr_rule": "gain"}
DEFAULTS: dict[str, Any] = {"options": OURS | {"least_gain": 1.25}, "lr_rule": "gain"}


def config_key(config: dict[str, Any]) -> str:
    """One string per configuration, for finding a run again."""
    return json.dumps(config, sort_keys=True)


def latest(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of each configuration, in the order in which the configurations appeared."""
    return {config_key(row["config"]): row for row in rows}


@dataclass(frozen=True)
class RunConfig:
    """All that a run's outcome depends on; two runs with equal configurations are the same run."""

    method: str
    lr: float
    seed: int
    dataset: str = "fashion_mnist"  # the task: a key of tasks.TASKS
    data: str = "embedded"  # or the file's name
    model: str = "lenet5"
    optimizer: str = "sgd"
    iterations: int = 2000
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-3
    device: str = "cpu"
    # Options of the method, as plain JSON values (see methods.py).
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    lr_adjust: bool = True  # False: the learning rate does not follow the sampler's factor
    lr_rule: str = "linear"  # how it does: "linear", "gain", or "root" of the gain
    # Each class counts alike in the loss: weights N / (C n_c), whose mean over the data is 1.
    class_weights: bool = False
    weighted_norm: bool = False  # BatchNorm's statistics are weighted by the coefficients
    max_lr: float = 0.0  # upper bound on the scaled rate; 0: none
    scheme: str = "multinomial"
    # A method's name: minibatches as large as the N_ems of that method's run (dynamic_batch.py).
    batch_size_like: str = ""
    clip_norm: float = 0.0  # 0: gradients are not clipped
    # What the sampler observes of a sample: its gradient norm at the "logits", or that of the
    # "last_layer"'s weight and bias.
    score: str = "logits"
    # A budget of training time: the run and its schedule end with it, not with the iterations.
    seconds: float = 0.0

    @property
    def factor_of(self) -> tuple[str, str]:
        """The arguments ``optimizer`` and ``rule`` of the sampler's factor."""
        return ("adam", "gain") if self.lr_rule == "root" else (self.optimizer, self.lr_rule)

    @property
    def label(self) -> str:
        return f"{self.variant} lr {self.lr:g} seed {self.seed}"

    @property
    def variant(self) -> str:
        """The method with whatever sets it apart from the published settings, in words."""
        if self.options == DEFAULTS["options"] and self.lr_rule == "gain":
            extras = ["default"]
        elif self.options == OURS and self.lr_rule == "gain":
            extras = ["default but for pauses"]
        else:
            extras = [f"{name} {value}" for name, value in sorted(self.options.items())]
            extras += [] if self.lr_rule == "linear" else [self.lr_rule]
        extras += [] if self.lr_adjust else ["lr not adjusted"]
        extras += ["class weights"] if self.class_weights else []
        extras += ["weighted BatchNorm"] if self.weighted_norm else []
        extras += [] if self.scheme == "multinomial" else [self.scheme]
        extras += [f"rate at most {self.max_lr:g}"] if self.max_lr else []
        extras += [] if self.score == "logits" else [f"score {self.score}"]
        extras += [f"minibatch N_ems of {self.batch_size_like}"] if self.batch_size_like else []
        return f"{self.method} ({', '.join(extras)})" if extras else self.method

    def check_options(self, known: Iterable[str]) -> None:
        """Raises ValueError on an option that is not among the method's."""
        names = list(known)
        unknown = sorted(self.options.keys() - set(names))
        if unknown:
            raise ValueError(
                f"options of method {self.method!r} must be among {', '.join(names) or '(none)'}, "
                f"got {', '.join(unknown)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a row; later fields only where they differ from their default."""
        values = asdict(self)
        default = asdict(RunConfig(method="", lr=0.0, seed=0))
        for name in LATER:
            if values[name] == default[name]:
                del values[name]
        return values

    @property
    def key(self) -> str:
        """One string per configuration, for finding a run again."""
        return config_key(self.to_json())
