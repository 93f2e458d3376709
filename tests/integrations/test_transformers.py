"""fastis.integrations.transformers.Trainer against loops written by hand, and its checkpoints."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastis

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastis.integrations import model_loss  # noqa: E402
from fastis.integrations.transformers import Trainer  # noqa: E402

N, B, CLASSES, WORDS = 48, 8, 3, 40
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": WORDS}
GPT2_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(autouse=True)
def _generators_as_they_were():
    """A Trainer seeds all of them."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def bert(kind="BertForSequenceClassification", **options):
    torch.manual_seed(1)
    defaults = dict(vocab_size=WORDS, max_position_embeddings=16, num_labels=CLASSES, **TINY)
    config = transformers.BertConfig(**{**defaults, **options})
    return getattr(transformers, kind)(config)


def gpt2(**options):
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **options}))


class Plain(nn.Module):
    """A model of torch's, which takes no num_items_in_batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, CLASSES)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).mean(1).tanh())
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


def sentences(num_samples=N):
    """Some far harder than others."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(num_samples):
        label = int(torch.randint(CLASSES, (), generator=generator))
        words = torch.randint(CLASSES, WORDS, (8,), generator=generator)
        if i % 4:
            words[:4] = label
        rows.append({"input_ids": words, "labels": label, "index": i})
    return rows


def texts(num_samples=N):
    """Of 2 to 12 words, filled up; loss on the words alone."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(num_samples):
        words = torch.randint(1, WORDS if i % 2 else 4, (12,), generator=generator)
        labels = words.clone()
        length = int(torch.randint(2, 13, (), generator=generator))
        words[length:], labels[length:] = 0, -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": B,
        "max_steps": 20,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(folder, **{**defaults, **options})


def trained(folder, model, rows, resume=None, kind=Trainer, options=None, **kwargs):
    trainer = kind(
        model=model, args=arguments(folder, **kwargs), train_dataset=rows, **options or {}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# The gradient -------------------------------------------------------------------------------------


def by_hand(model, rows, loss_of, steps=20, lr=0.1, batch_size=B):
    """Whole minibatches, losses by torch; ``loss_of(logits, labels)`` gives [B, T] or [B]."""
    sampler = fastis.Sampler(len(rows), batch_size, seed=42)  # the Trainer's default seed
    optimizer = torch.optim.SGD(model.parameters(), lr)
    weighted = 0
    for _ in range(steps):
        batch = sampler.sample()
        chosen = [rows[i] for i in batch.indices.tolist()]
        inputs = torch.stack([row["input_ids"] for row in chosen])
        labels = torch.stack([torch.as_tensor(row["labels"]) for row in chosen])
        out = model(input_ids=inputs)
        logits = out["logits"]
        with torch.no_grad():
            aligned = labels if labels.dim() == 1 else F.pad(labels, (0, 1), value=-100)[:, 1:]
            sampler.update(batch, fastis.cross_entropy(logits.detach(), aligned, batch.weights))
        optimizer.zero_grad()
        (batch.weights.double() * loss_of(logits, labels)).sum().backward()
        optimizer.step()
        weighted += bool((batch.weights != 1).any())
    assert weighted > 5, "no draws with coefficients: nothing is tested"
    return model


def classification(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none") / B


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("make", [lambda: bert(**NO_DROPOUT), Plain])
def test_gradient_is_that_of_the_whole_minibatchs_mean(tmp_path, make, parts):
    """BERT takes num_items_in_batch, by which the Trainer would not divide; the other doesn't."""
    expected = by_hand(make().double(), sentences(), classification)
    trainer = trained(
        *(tmp_path, make().double(), sentences()),
        per_device_train_batch_size=B // parts,
        gradient_accumulation_steps=parts,
    )
    assert trainer.model_accepts_loss_kwargs is (not isinstance(trainer.model, Plain))
    assert trainer.sampler.step == 20
    for found, wanted in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


MEAN_LENGTH = sum(int((row["labels"][1:] != -100).sum()) for row in texts()) / N


def language(logits, labels):
    """torch's sums over the words of each text, and a constant divisor."""
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.sum(1) / (B * MEAN_LENGTH)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("given", [None, MEAN_LENGTH])
def test_tokens_have_a_constant_divisor(tmp_path, parts, given):
    model = gpt2(**GPT2_NO_DROPOUT)
    expected = by_hand(gpt2(**GPT2_NO_DROPOUT).double(), texts(), language)
    trainer = trained(
        *(tmp_path, model.double(), texts()),
        options={"tokens_per_sample": given},
        per_device_train_batch_size=B // parts,
        gradient_accumulation_steps=parts,
    )
    assert trainer.tokens_per_sample == MEAN_LENGTH
    for found, wanted in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_tokens_are_counted_over_samples_at_equal_distances(tmp_path, monkeypatch):
    monkeypatch.setattr(model_loss, "_COUNTED", 10)
    rows = texts()
    chosen = rows[::5]
    trainer = trained(tmp_path, gpt2(), rows, max_steps=1)
    expected = sum(int((row["labels"][1:] != -100).sum()) for row in chosen) / len(chosen)
    assert trainer.tokens_per_sample == expected


def test_label_smoothing_is_that_of_the_trainer(tmp_path):
    """Uniform minibatches in the same order have the losses of transformers' own smoother."""
    smoother = transformers.trainer_pt_utils.LabelSmoother(0.3)
    model, rows = bert(**NO_DROPOUT), sentences()
    trainer = trained(tmp_path, model, rows, max_steps=1, label_smoothing_factor=0.3)
    logits, labels = torch.randn(B, CLASSES), torch.randint(CLASSES, (B,))
    found = trainer.scored_loss({"logits": logits}, labels, torch.ones(B)).loss
    torch.testing.assert_close(found, smoother({"logits": logits}, labels))


# Which samples ------------------------------------------------------------------------------------


class WithIndex(Plain):
    def forward(self, input_ids, index=None, labels=None):
        return super().forward(input_ids, labels)


class Watching(Trainer):
    """Notes each minibatch's indices; those that the data set returned must be the same."""

    def training_step(self, model, inputs, *args):
        part = inputs["fastis_part"]
        size = len(part.weights)
        drawn = part.batch.indices[part.number * size : (part.number + 1) * size]
        assert torch.equal(inputs["index"], drawn)
        self.__dict__.setdefault("seen", []).append(drawn)
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize("workers", [0, 2])
def test_coefficients_stay_with_their_samples(tmp_path, workers):
    """Also where a run is resumed, in which the Trainer skips minibatches."""
    options = {"kind": Watching, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    options.update(dataloader_num_workers=workers, save_strategy="steps", save_steps=8)
    whole = trained(tmp_path, WithIndex(), sentences(), **options)
    seen = torch.cat(whole.seen)
    assert torch.equal(seen[:N].sort().values, torch.arange(N)), "an epoch of the warm-up"
    resumed = trained(
        tmp_path, WithIndex(), sentences(), resume=f"{tmp_path}/checkpoint-8", **options
    )
    assert torch.equal(torch.cat(resumed.seen), seen[8 * B :])
    assert whole.sampler.step == resumed.sampler.step == 20


def test_epochs_are_of_whole_minibatches(tmp_path):
    trainer = trained(tmp_path, Plain(), sentences(50), max_steps=-1, num_train_epochs=2.5)
    assert trainer.state.global_step == 15
    assert trainer.state.epoch == 2.5
    assert trainer.num_examples(trainer.get_train_dataloader()) == 50


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path, workers):
    """In the middle of an epoch of 6 steps (4), at its end (12), with dropout and a schedule."""
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": workers,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "options": {"effective_batch_lr": True},
    }
    whole = trained(tmp_path, bert(), sentences(), **options)
    for step in (4, 12, 16):
        resumed = trained(
            tmp_path, bert(), sentences(), resume=f"{tmp_path}/checkpoint-{step}", **options
        )
        assert same(whole.model, resumed.model), step
        assert torch.equal(whole.sampler.importance, resumed.sampler.importance)
        assert whole.lr_scheduler.get_last_lr() == resumed.lr_scheduler.get_last_lr()


class Masking:
    """A collator that draws random numbers, as DataCollatorForLanguageModeling does."""

    def __call__(self, rows):
        words = torch.stack([row["input_ids"] for row in rows])
        masked = torch.rand(words.shape) < 0.3
        masked[:, 0] = True
        return {
            "input_ids": words.masked_fill(masked, 0),
            "labels": words.masked_fill(~masked, -100),
        }


def test_resumed_run_masks_the_same_words(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "options": {"data_collator": Masking()}}
    whole = trained(tmp_path, bert("BertForMaskedLM"), texts(), **options)
    for step in (4, 12):
        resumed = trained(
            *(tmp_path, bert("BertForMaskedLM"), texts()),
            resume=f"{tmp_path}/checkpoint-{step}",
            **options,
        )
        assert resumed.tokens_per_sample == whole.tokens_per_sample
        assert same(whole.model, resumed.model), step


def test_checkpoint_of_another_trainer_is_refused(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trained(tmp_path, Plain(), sentences(), kind=transformers.Trainer, **options)
    with pytest.raises(FileNotFoundError, match=r"of this Trainer.*no fastis\.pt"):
        trained(tmp_path, Plain(), sentences(), resume=f"{tmp_path}/checkpoint-4", **options)


def test_nothing_is_saved_where_only_the_model_is(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    trained(tmp_path, Plain(), sentences(), **options)
    assert not (tmp_path / "checkpoint-4" / "fastis.pt").exists()


# The rest of the Trainer --------------------------------------------------------------------------


def test_evaluation_is_unchanged(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 5, "label_smoothing_factor": 0.1}
    rows = sentences(30)
    trainer = trained(
        tmp_path, bert(), sentences(), options={"eval_dataset": rows}, max_steps=5, **options
    )
    theirs = transformers.Trainer(
        model=trainer.model, args=arguments(tmp_path, **options), eval_dataset=rows
    )
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert found == [theirs.evaluate()["eval_loss"]]


def test_stats_are_logged_with_the_loss(tmp_path):
    trainer = trained(
        tmp_path, Plain(), sentences(), logging_strategy="steps", logging_steps=5, max_steps=10
    )
    steps = [row["fastis/step"] for row in trainer.state.log_history if "loss" in row]
    assert steps == [5.0, 10.0]


@pytest.mark.parametrize("asked", [False, True, {"max_factor": 1.001}])
def test_learning_rate_follows_where_it_was_asked_for(tmp_path, asked):
    trainer = trained(
        *(tmp_path, Plain(), sentences()),
        options={"effective_batch_lr": asked},
        max_steps=40,
        lr_scheduler_type="linear",
    )
    schedule = trainer.lr_scheduler
    assert isinstance(schedule, fastis.EffectiveBatchLR) is (asked is not False)
    if asked:
        assert schedule.sampler is trainer.sampler
        assert schedule.max_factor == (None if asked is True else 1.001)


def test_loss_that_is_logged_is_the_mean_over_parts(tmp_path):
    logged = []
    for parts in (1, 4):
        trainer = trained(
            *(tmp_path, Plain(), sentences()),
            per_device_train_batch_size=B // parts,
            gradient_accumulation_steps=parts,
            logging_strategy="steps",
            logging_steps=20,
        )
        logged.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_it_can_be_trained_again(tmp_path):
    trainer = trained(tmp_path, Plain(), sentences())
    sampler = trainer.sampler
    trainer.train()
    assert trainer.sampler is sampler
    assert sampler.step == 40
    trainer.train_dataset = sentences(56)
    trainer.train()
    assert (trainer.sampler.num_samples, trainer.sampler.step) == (56, 20)


def test_new_model_has_a_new_sampler(tmp_path):
    options = {"model_init": Plain}
    trainer = trained(tmp_path, None, sentences(), options=options)
    first = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.sampler.step == 20
    assert all(torch.equal(a, b) for a, b in zip(first, trainer.model.parameters(), strict=True))


def test_sampler_of_the_users(tmp_path):
    sampler = fastis.Sampler(N, B, method="scan", seed=3)
    assert trained(tmp_path, Plain(), sentences(), options={"sampler": sampler}).sampler is sampler
    assert sampler.step == 20
    named = trained(tmp_path, Plain(), sentences(), options={"method": "loss"}, data_seed=5)
    assert "Loss" in repr(named.sampler)
    assert "seed=5" in repr(named.sampler)


def test_columns_that_the_model_does_not_take_are_removed(tmp_path):
    rows = [{**row, "label": row["labels"], "note": "a word"} for row in sentences()]
    for row in rows:
        del row["labels"]
    assert trained(tmp_path, Plain(), rows).sampler.step == 20


@pytest.mark.parametrize(("steps", "short"), [(12, True), (13, False)])
def test_run_that_ends_with_the_warm_up_is_warned_of(tmp_path, steps, short):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trained(tmp_path, Plain(), sentences(), max_steps=steps)
        trained(tmp_path, Plain(), sentences(), max_steps=2, options={"method": "scan"})
    messages = [str(w.message) for w in heard if "are drawn uniformly" in str(w.message)]
    assert len(messages) == short
    assert all(m.startswith("all 12 steps") for m in messages)


def test_mixed_precision(tmp_path):
    """The scores of a model that stays as it is are those of single precision, but for rounding."""
    means = [
        trained(
            tmp_path, bert(**NO_DROPOUT), sentences(), bf16=half, learning_rate=0.0
        ).sampler.mean
        for half in (False, True)
    ]
    torch.testing.assert_close(means[1], means[0], rtol=2e-2, atol=0.0)  # of 8 bits
    assert not torch.equal(*means)


def test_loader_has_the_trainers_arguments_for_workers(tmp_path):
    args = arguments(
        tmp_path,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
        dataloader_multiprocessing_context="fork",
    )
    given = {"model": Plain(), "args": args, "train_dataset": sentences()}
    trainer, theirs = Trainer(**given), transformers.Trainer(**given).get_train_dataloader()
    made = trainer.get_train_dataloader().dataset.loader
    for name in ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context"):
        assert getattr(trainer.loader, name) == getattr(theirs, name), name
    assert trainer.loader.worker_init_fn.func is theirs.worker_init_fn.func
    assert trainer.get_train_dataloader().dataset.loader is trainer.loader is made


# Other losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "kind", "count"),
    [
        (lambda y: float(y), "regression", 1),
        (lambda y: y, "regression", 1),
        (lambda y: [float(y == c) for c in range(CLASSES)], "multi_label_classification", CLASSES),
        (lambda y: [float(y == c) for c in range(CLASSES)], None, CLASSES),
        (lambda y: [float(y == c) for c in range(CLASSES)], "regression", CLASSES),
    ],
)
def test_losses_of_other_problems(tmp_path, labels, kind, count):
    """Each is compared, in the first step, with the one that the model computes itself."""
    rows = [{**row, "labels": labels(row["labels"])} for row in sentences()]
    model = bert(num_labels=count, problem_type=kind)
    trainer = trained(tmp_path, model, rows, learning_rate=0.01)
    assert trainer._shift is False
    assert trainer.sampler.step == 20


def test_token_classification(tmp_path):
    rows = texts()
    for row in rows:
        row["labels"] = torch.where(row["labels"] > 0, row["labels"] % CLASSES, -100)
    trainer = trained(tmp_path, bert("BertForTokenClassification"), rows)
    assert trainer._shift is False
    length = sum(int((row["labels"] != -100).sum()) for row in rows) / N
    assert trainer.tokens_per_sample == length, "nothing is shifted"


def test_sequence_to_sequence_by_two_bases(tmp_path):
    class Mine(Trainer, transformers.Seq2SeqTrainer):
        pass

    config = transformers.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    args = transformers.Seq2SeqTrainingArguments(**arguments(tmp_path).to_dict())
    trainer = Mine(model=model, args=args, train_dataset=texts())
    trainer.train()
    assert trainer._shift is False
    assert trainer.sampler.step == 20


class Penalised(Plain):
    def forward(self, input_ids, labels=None):
        found = super().forward(input_ids, labels)
        if labels is not None:
            found["loss"] = found["loss"] + 0.1 * self.head.weight.square().sum()
        return found


def test_model_with_a_loss_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have the cross-entropy .* override scored_loss"):
        trained(tmp_path, Penalised(), sentences())


class WithoutLabels(Plain):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_model_that_says_nothing_of_its_loss_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must take labels, .* WithoutLabels"):
        trained(tmp_path, WithoutLabels(), sentences(), remove_unused_columns=False)


def test_loss_of_the_users(tmp_path):
    class Mine(Trainer):
        def scored_loss(self, outputs, labels, weights):
            out = fastis.cross_entropy(outputs["logits"], labels, weights)
            penalty = 0.1 * self.model.head.weight.square().sum()
            return out._replace(loss=out.loss + penalty)

    plain = trained(tmp_path, Penalised(), sentences(), kind=Mine)
    assert plain.sampler.step == 20


def test_loss_without_coefficients_is_refused(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "labels")}
            return model(**inputs)["loss"]

    with pytest.raises(RuntimeError, match=r"compute_loss must be left .* override scored_loss"):
        trained(tmp_path, Plain(), sentences(), kind=Mine)


def test_loader_of_others_is_refused(tmp_path):
    class Mine(Trainer):
        def get_train_dataloader(self):
            return transformers.Trainer.get_train_dataloader(self)

    with pytest.raises(RuntimeError, match=r"must be that of get_train_dataloader\(\)"):
        trained(tmp_path, Plain(), sentences(), kind=Mine)


# Refused ------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sentences()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"auto_find_batch_size": True}, r"auto_find_batch_size must be off .* one batch_size"),
        ({"ignore_data_skip": True}, r"ignore_data_skip must be off .* nothing is loaded"),
        ({"dataloader_in_order": False}, r"in_order must be True"),
        ({"train_sampling_strategy": "sequential"}, r"must be 'random' .* SequentialSampler"),
        ({"train_sampling_strategy": "group_by_length"}, r"must be 'random' .* LengthGrouped"),
    ],
)
def test_arguments_that_would_choose_other_samples(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, Plain(), sentences(), **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_dataset": Stream()}, TypeError, "train_dataset must be map-style"),
        ({"compute_loss_func": len}, ValueError, "compute_loss_func must be None.* override"),
        ({"sampler": fastis.Sampler(N, 7)}, ValueError, "must have batch_size=8, .* got 7"),
        ({"sampler": fastis.Sampler(N, B), "method": "scan"}, ValueError, "method must be left"),
        ({"tokens_per_sample": 0.0}, ValueError, r"tokens_per_sample must be .* got 0\.0"),
    ],
)
def test_options_that_are_refused(tmp_path, options, error, message):
    given = {"model": Plain(), "args": arguments(tmp_path), "train_dataset": sentences(), **options}
    with pytest.raises(error, match=message):
        Trainer(**given)


@pytest.mark.parametrize("name", ["world_size", "n_gpu"])
def test_several_processes_and_gpus_are_refused(tmp_path, name, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), name, property(lambda self: 2))
    with pytest.raises(ValueError, match=rf"{name} must be off .* got 2: run one process"):
        Trainer(model=Plain(), args=args, train_dataset=sentences())


def test_collator_must_keep_one_row_a_sample(tmp_path):
    def flat(rows):
        words = torch.cat([row["input_ids"] for row in rows])[None]
        return {"input_ids": words, "labels": words}

    with pytest.raises(ValueError, match=r"must return labels of 8 rows, .* \[1, 96\]"):
        trained(tmp_path, gpt2(), texts(), options={"data_collator": flat})


def test_schedules_with_a_metric_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type must be one that steps without"):
        trained(
            *(tmp_path, Plain(), sentences()),
            options={"effective_batch_lr": True, "eval_dataset": sentences()},
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
        )
