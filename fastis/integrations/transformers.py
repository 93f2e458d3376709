"""Hugging Face's Trainer with importance sampling.

The Trainer draws, computes the loss and saves at its own places; this file stands at those: the
loader (:mod:`fastis.integrations.parts`), the loss (:meth:`Trainer.compute_loss`), the schedule,
the log, and the checkpoint's folder.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler

import fastis
from fastis import check
from fastis.data import DataLoader
from fastis.integrations.model_loss import OVERRIDE, find_shift, logits_of, mean_tokens, model_loss
from fastis.integrations.parts import KEY, InParts, Parts, check_complete
from fastis.lr import EffectiveBatchLR
from fastis.methods import Method
from fastis.methods.base import FOREVER
from fastis.sampler import Sampler
from fastis.scored import ScoredLoss

_FILE = "fastis.pt"  # in a checkpoint's folder
_OF_WORKERS = (
    *("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "worker_init_fn"),
    *("multiprocessing_context", "generator", "timeout", "in_order"),
)


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose training minibatches are a :class:`fastis.Sampler`'s.

    For models with one output of logits: classification of sequences, tokens or images, causal and
    masked language models, sequence to sequence, regression. Takes all arguments of
    ``transformers.Trainer``; nothing else has to change. Evaluation and prediction are as there.

    One step of the optimizer is one minibatch of the sampler, of
    ``per_device_train_batch_size * gradient_accumulation_steps`` samples, whatever the number of
    parts: its gradient is that of the whole minibatch's mean. An epoch is N // B steps. The loss
    that is logged estimates the mean over the training set. To put it into a trainer of another
    class: ``class Mine(fastis.integrations.transformers.Trainer, Seq2SeqTrainer)``.

    Parameters
    ----------
    *args, **kwargs
        of ``transformers.Trainer``.
    sampler : fastis.Sampler, optional
        made by you; default: one of ``method``, seeded by ``data_seed`` or ``seed`` of the
        arguments, on the model's device.
    method : str or fastis.methods.Method, optional
        of the sampler that is made here; default "emais".
    tokens_per_sample : float, optional
        where labels are [B, T], the constant that a sample's sum over tokens is divided by: the
        mean number of labels other than -100 (a minibatch's own count would bias the estimate;
        transformers issue 34198). Default: counted once, when first needed, over at most 1024
        samples at equal distances, and saved in checkpoints.
    effective_batch_lr : bool or dict
        True, or options such as ``{"max_factor": 2.0}``: the schedule is in a
        :class:`fastis.EffectiveBatchLR`. Default: the learning rate is as it would be.

    Attributes
    ----------
    sampler : fastis.Sampler
        also as ``loader``'s; its ``stats()`` are logged with the training loss.
    loader : fastis.DataLoader or None
        once training has begun.

    Checkpoints of the Trainer hold the sampler, and the minibatches with the workers (``fastis.pt``
    in their folder). ``resume_from_checkpoint`` goes on bit for bit, in the middle of an epoch too,
    and loads nothing of what is skipped.

    Raises
    ------
    TypeError, ValueError
        for what can't be trained that way, with what to do instead: several processes or GPUs,
        iterable data sets, ``train_sampling_strategy="group_by_length"``, ``compute_loss_func``,
        ``auto_find_batch_size``, ``ignore_data_skip``, ``use_liger_kernel``. At the first step:
        for a model whose own loss is another one; override ``scored_loss`` then.

    Warns
    -----
    UserWarning
        where the whole run is no longer than the sampler's uniform warm-up.

    Equivalent to::

        for batch, inputs in fastis.DataLoader(train_dataset, sampler, collate_fn=data_collator):
            labels = inputs.pop("labels")
            out = fastis.cross_entropy(model(**inputs).logits, labels, batch.weights)
            sampler.update(batch, out)
            out.backward()
            optimizer.step(); schedule.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        *args: Any,
        sampler: Sampler | None = None,
        method: str | Method | None = None,
        tokens_per_sample: float | None = None,
        effective_batch_lr: bool | Mapping[str, Any] = False,
        **kwargs: Any,
    ) -> None:
        if tokens_per_sample is not None:
            check.number("tokens_per_sample", tokens_per_sample, 0.0, interval="(]")
        if sampler is not None and method is not None:
            raise ValueError("method must be left out where a sampler is given: it has its own")
        self.tokens_per_sample = tokens_per_sample
        self.effective_batch_lr = effective_batch_lr
        self.loader: Any = None
        self._sampler_of_user, self._method = sampler, "emais" if method is None else method
        self._made_for: Any = None  # the training set that the sampler was made for
        self._random_state: str | None = None  # checkpoint whose random state is to be loaded
        self._is_weighted = True  # the minibatch that is trained on
        self._shift: bool | None = None  # of labels against logits, once it is known
        super().__init__(*args, **kwargs)
        _check_arguments(self)
        self.sampler: Any = self._make_sampler() if self.train_dataset is not None else sampler

    def _make_sampler(self) -> Sampler:
        """Of minibatches of one step of the optimizer."""
        self._made_for, args = self.train_dataset, self.args
        _check_dataset(self.train_dataset)
        size = self._train_batch_size * args.gradient_accumulation_steps
        if self._sampler_of_user is None:
            seed = args.seed if args.data_seed is None else args.data_seed
            return Sampler(
                len(self.train_dataset), size, method=self._method, device=args.device, seed=seed
            )
        if self._sampler_of_user.batch_size != size:
            raise ValueError(
                f"sampler must have batch_size={size}, per_device_train_batch_size * "
                f"gradient_accumulation_steps, got {self._sampler_of_user.batch_size}"
            )
        return self._sampler_of_user

    def call_model_init(self, trial: Any = None) -> Any:
        """As there; a new model is trained with a new sampler."""
        self._made_for = self.loader = None
        return super().call_model_init(trial)

    # Data ----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """The minibatches in the parts that the Trainer asks for, from a fastis.DataLoader.

        That has the data set, the collator and the worker arguments of the loader that there would
        be otherwise. The same one as long as ``train_dataset`` is.
        """
        self._is_weighted = True
        if self.train_dataset is not None and self._made_for is not self.train_dataset:
            self.sampler, self.loader = self._make_sampler(), None
        if self.loader is None:
            theirs = super().get_train_dataloader()
            drawn_by = getattr(theirs.batch_sampler, "sampler", None)
            if not isinstance(drawn_by, RandomSampler):
                raise ValueError(
                    "train_sampling_strategy must be 'random' (and group_by_length False): the "
                    f"fastis.Sampler draws the minibatches, got a {type(drawn_by).__name__}"
                )
            self.loader = DataLoader(
                theirs.dataset,
                self.sampler,
                collate_fn=InParts(theirs.collate_fn, self._train_batch_size),
                **{name: getattr(theirs, name) for name in _OF_WORKERS if hasattr(theirs, name)},
            )
        # Its own generator: torch's loaders draw a number when a pass begins.
        parts = Parts(self.loader, self.args.gradient_accumulation_steps)
        return torch.utils.data.DataLoader(
            parts, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator()
        )

    def num_examples(self, dataloader: Any) -> int:
        """As there: samples, not parts."""
        if isinstance(dataloader.dataset, Parts):
            return int(self.sampler.num_samples)
        return int(super().num_examples(dataloader))

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], None]:
        """The parts of the next minibatch. Nothing is counted: no divisor depends on the draw."""
        if not self._is_weighted:
            raise RuntimeError(
                "compute_loss must be left as it is, or call super().compute_loss: the last "
                "minibatch was trained on without its coefficients; for another loss, override "
                "scored_loss(outputs, labels, weights)"
            )
        resumed = self._random_state is not None
        if resumed:
            self._load_rng_state(self._random_state)
        parts, _ = super().get_batch_samples(*args)
        check_complete(parts, self.state.global_step % len(self.loader) if resumed else None)
        self._is_weighted = not parts
        return parts, None

    # Loss ----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The part's own mean, weighted; the Trainer divides by the number of parts, always equal.

        The last part of a minibatch updates the sampler. In evaluation: as there.
        """
        if KEY not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        part, labels = inputs.pop(KEY), inputs.pop("labels", None)
        self._is_weighted = True
        if not isinstance(labels, Tensor) or labels.shape[:1] != part.weights.shape:
            raise ValueError(
                f"data_collator must return labels of {len(part.weights)} rows, one a sample, got "
                f"{check.describe(labels)}"
            )
        if "decoder_input_ids" not in inputs and self._is_encoder_decoder():
            prepare = self.model.prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = prepare(labels=labels)
        if self._shift is None and type(self).scored_loss is Trainer.scored_loss:
            self._compare_with_own_loss(inputs, labels)
        outputs = model(**inputs)
        out = self.scored_loss(outputs, labels, part.weights.to(labels.device, non_blocking=True))
        part.learn(out, self.sampler)
        return (out.loss, outputs) if return_outputs else out.loss

    def scored_loss(self, outputs: Any, labels: Tensor, weights: Tensor) -> ScoredLoss:
        """The loss of a part of a minibatch; override it for another one.

        Parameters
        ----------
        outputs : ModelOutput, dict or tuple
            of the model, which was called without labels.
        labels : Tensor
            ``[b, ...]``.
        weights : Tensor
            ``[b]``: the coefficients. The loss is the part's mean, with a constant divisor.

        Returns
        -------
        ScoredLoss
            of the losses of fastis.
        """
        logits, smoother = logits_of(outputs), self.label_smoother
        denominator = None
        if labels.dim() == 2 and logits.dim() == 3:
            if self.tokens_per_sample is None:
                self.tokens_per_sample = mean_tokens(
                    self.loader.dataset, self.loader.collate_fn, self._shift
                )
            denominator = len(weights) * self.tokens_per_sample
        return model_loss(
            getattr(self.model, "config", None), logits, labels, weights,
            shift=self._shift, denominator=denominator,
            label_smoothing=0.0 if smoother is None else smoother.epsilon,
        )  # fmt: skip

    def _bare_model(self) -> Any:
        return getattr(self.model, "get_base_model", lambda: self.model)()  # inside of PEFT's

    def _is_encoder_decoder(self) -> bool:
        config = getattr(self.model, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(
            self.model, "prepare_decoder_input_ids_from_labels"
        )

    def _compare_with_own_loss(self, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Once, on the first inputs, in evaluation mode: is it the loss of the model itself?"""
        model = self._bare_model()
        if "labels" not in inspect.signature(type(model).forward).parameters:
            raise TypeError(
                f"model must take labels, by which its loss can be told, got {type(model).__name__}"
                f", which does not: {OVERRIDE}"
            )
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model(**inputs, labels=labels)
            self._shift = find_shift(model, outputs, labels)
        self.model.train()

    # Schedule, log, checkpoints ------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As there, in a :class:`fastis.EffectiveBatchLR` where that was asked for."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self.sampler is not None:
            _warn_of_short_run(self.sampler, num_training_steps)
        if self.effective_batch_lr is not False and not isinstance(schedule, EffectiveBatchLR):
            kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
            if kind in ("reduce_lr_on_plateau", "greedy"):
                raise ValueError(
                    "lr_scheduler_type must be one that steps without a metric with "
                    f"effective_batch_lr, got {kind}"
                )
            options = {} if self.effective_batch_lr is True else self.effective_batch_lr
            self.lr_scheduler = schedule = EffectiveBatchLR(schedule, self.sampler, **options)
        return schedule

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As there, and the sampler's ``stats()`` with the training loss, as ``fastis/...``."""
        if self.is_in_train and "loss" in logs:
            found = self.sampler.stats()
            logs.update({f"fastis/{k}": v for k, v in found.items() if math.isfinite(v)})
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        fastis.save_checkpoint(
            os.path.join(output_dir, _FILE),
            rng=False,  # the Trainer saves those
            loader=self.loader,
            tokens_per_sample=self.tokens_per_sample,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, _FILE)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"resume_from_checkpoint must be a checkpoint of this Trainer, got {checkpoint}, "
                f"which has no {_FILE}: begin anew from its model, by from_pretrained"
            )
        loader = self.loader
        values = fastis.load_checkpoint(path, rng=False, loader=loader)
        if self.tokens_per_sample is None:
            self.tokens_per_sample = values["tokens_per_sample"]
        position, steps = (loader._position or 0) % len(loader), self.state.global_step
        if position != steps % len(loader):
            raise ValueError(
                f"resume_from_checkpoint must be of a run of whole epochs of {len(loader)} steps, "
                f"got one that is at step {steps} with {position} steps into an epoch"
            )
        loader._position = position or None  # at the end of an epoch the Trainer begins the next
        self._random_state = checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Before the first minibatch is loaded, which may draw random numbers; not again after."""
        if self._random_state is not None:
            self._random_state = None
            super()._load_rng_state(checkpoint)


def _as_it_is(part: Any) -> Any:
    return part


def _check_arguments(trainer: Any) -> None:
    """Refuses what would part coefficients from their data, or hide the logits."""
    args = trainer.args
    elsewhere = "run one process on one GPU, with CUDA_VISIBLE_DEVICES=0"
    for name, wrong, advice in (
        ("world_size", args.world_size > 1, elsewhere),
        ("n_gpu", args.n_gpu > 1, elsewhere),
        ("deepspeed", trainer.is_deepspeed_enabled, elsewhere),
        ("fsdp", trainer.is_fsdp_enabled, elsewhere),
        ("auto_find_batch_size", args.auto_find_batch_size, "a sampler has one batch_size"),
        ("ignore_data_skip", args.ignore_data_skip, "nothing is loaded to be skipped anyway"),
        ("use_liger_kernel", args.use_liger_kernel, "its fused loss hides the logits"),
    ):
        if wrong:
            got = getattr(args, name)
            raise ValueError(f"{name} must be off with importance sampling, got {got}: {advice}")
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func must be None, got a function of no coefficients: override "
            "scored_loss(outputs, labels, weights) of fastis.integrations.transformers.Trainer"
        )


def _warn_of_short_run(sampler: Sampler, steps: int) -> None:
    warmup = sampler._table.constants.warmup_draws
    if steps <= warmup < FOREVER:
        warnings.warn(
            f"all {steps} steps are drawn uniformly, since the sampler's first epochs, {warmup} "
            "steps, are its warm-up: train for more epochs, or give "
            "method=fastis.methods.EMAIS(warmup_epochs=1)",
            stacklevel=3,
        )


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            "train_dataset must be map-style (dataset[i], len(dataset)), got "
            f"{type(dataset).__name__}: a stream has no indices to remember scores by; use "
            "transformers.Trainer for it"
        )
