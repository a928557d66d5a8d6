"""Trainers with a PlannerCallback next to the same without: losses, weights, checkpoints and generated text are equal."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pytorch_lightning import LightningModule
from pytorch_lightning import Trainer as LightningTrainer
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from planner import plan, plan_at_first_call
from planner.integrations import lightning, transformers
from planner.runtime.install import PlannedForward
from tests.support.paths import ROOT

QUICK = {"costs": "estimate", "progress": False, "check": False}
LENGTHS = (16, 12, 16, 9, 9, 7, 9, 8, 16, 10)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def texts():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 64, (length,), generator=generator)} for length in LENGTHS]


def padded(examples):
    tokens = nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples], batch_first=True)
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == 0, -100)}


class Generates(TrainerCallback):
    """What a model writes after each evaluation."""

    def __init__(self):
        self.texts = []

    def on_evaluate(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            prompt = torch.arange(1, 5)[None]
            self.texts.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False))


def train(folder, callbacks=(), resume=None, prepare=lambda trainer: None, **arguments):
    """A Trainer with batches of several sizes, and evaluation, generation and a checkpoint after each epoch."""
    model, generated = gpt2(), Generates()
    given = TrainingArguments(
        str(folder),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **arguments,
        },
    )
    trainer = Trainer(
        model, given, data_collator=padded, train_dataset=texts(), eval_dataset=texts()[:4], callbacks=[generated, *callbacks]
    )
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, generated.texts


def losses(trainer):
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def weights(model):
    return list(model.state_dict().values())


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="plain", marks=pytest.mark.zoo),
        pytest.param({"bf16": True, "gradient_accumulation_steps": 2}, id="bf16"),
    ],
)
def test_two_epochs_of_the_hugging_face_trainer(arguments, tmp_path, capsys):
    trainer, generated = train(tmp_path / "plain", **arguments)
    callback = transformers.PlannerCallback(0.95, **QUICK)
    planned, planned_generated = train(tmp_path / "planned", [callback], **arguments)
    assert losses(planned) == losses(trainer)
    assert_equal(weights(planned.model), weights(trainer.model))
    assert_equal(planned_generated, generated)

    stats = callback.planned.stats()
    assert (stats.planned, len(stats.sizes)) == (6, 3)
    assert not isinstance(planned.model.forward, PlannedForward)
    accumulates = "gradient_accumulation_steps" in arguments
    printed = capsys.readouterr().out
    assert printed.count("saved for backward") == printed.count("planner/seconds") == printed.count("optimizer state") == 1
    assert ("gradients of earlier micro-steps" in printed) is accumulates

    step = 2 if accumulates else 3  # of an epoch
    checkpoints = [tmp_path / run / f"checkpoint-{step}" for run in ("plain", "planned")]
    saved, expected = [load_file(checkpoint / "model.safetensors") for checkpoint in reversed(checkpoints)]
    assert list(saved) == list(expected)
    assert_equal(list(saved.values()), list(expected.values()))
    history = json.loads((tmp_path / "planned" / f"checkpoint-{2 * step}" / "trainer_state.json").read_text())["log_history"]
    (entry,) = [entry for entry in history if "planner/seconds" in entry]
    assert entry["planner/peak_bytes"] <= entry["planner/budget_bytes"] < entry["planner/plain_peak_bytes"]
    assert any("planner/other_sizes" in entry for entry in history)

    if not accumulates:
        return
    again, _ = train(tmp_path / "again", [transformers.PlannerCallback(0.95, **QUICK)], str(checkpoints[1]), **arguments)
    assert losses(again)[-step - 1 :] == losses(trainer)[-step - 1 :]


def test_what_the_hugging_face_trainer_cannot_plan_trains_as_before(tmp_path):
    short = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer, _ = train(tmp_path, **short)
    with pytest.warns(UserWarning, match=r"GPT2LMHeadModel trains unplanned.*InfeasibleBudgetError"):
        other, _ = train(tmp_path, [transformers.PlannerCallback("1 KiB", **QUICK)], **short)
    assert losses(other) == losses(trainer)
    (error,) = [entry["planner/error"] for entry in other.state.log_history if "planner/error" in entry]
    assert error.startswith("InfeasibleBudgetError: Raise the budget")


class Reporter(TrainerCallback):
    """What a tracker is given; a Trainer puts those of `report_to` before the callbacks that it is given."""

    def __init__(self):
        self.names = set()

    def on_log(self, args, state, control, logs, **kwargs):
        self.names |= logs.keys()


@pytest.mark.parametrize("first", [False, True], ids=["as given", "moved to the front"])
def test_trackers_see_what_a_callback_before_them_adds(first, tmp_path):
    reporter, callback = Reporter(), transformers.PlannerCallback(0.95, **QUICK)

    def to_the_front(trainer):
        trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(transformers.PlannerCallback))

    short = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    train(tmp_path, [reporter, callback], prepare=to_the_front if first else lambda trainer: None, **short)
    assert callback.planned.stats().planned > 0
    assert ("planner/peak_bytes" in reporter.names) is first
    assert "loss" in reporter.names


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
def test_checkpointing_of_the_models_own_is_named_as_what_stands_in_the_way(tmp_path):
    short = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    with pytest.warns(UserWarning, match=r"switch the model's own checkpointing off \(activation_checkpointing or"):
        train(tmp_path, [transformers.PlannerCallback("60%", **QUICK)], activation_checkpointing=True, **short)


def test_data_parallel_is_left_as_it_is():
    model, callback = gpt2(), transformers.PlannerCallback(0.9)
    args = SimpleNamespace(n_gpu=2, parallel_mode=ParallelMode.NOT_DISTRIBUTED)
    state = SimpleNamespace(log_history=[], epoch=0.0, global_step=0)
    with pytest.warns(UserWarning, match="unplanned.*DataParallel.*torchrun"):
        callback.on_train_begin(args, state, None, model=model)
    assert "forward" not in vars(model) and "DataParallel" in state.log_history[0]["planner/error"]


class Classifier(LightningModule):
    """Calls its network by its own forward, or directly; the head is a weight of its own, or a module."""

    def __init__(self, calls, head):
        super().__init__()
        self.calls = calls
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 4) if head == "module" else nn.Parameter(torch.ones(64, 4))

    def forward(self, x):
        found = self.net(x)
        return self.head(found) if isinstance(self.head, nn.Module) else found @ self.head

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x) if self.calls == "forward" else Classifier.forward(self, x), y)

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("validation", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(folder, calls, head="weight", callbacks=(), **arguments):
    """Two epochs with a smaller last batch, and validation after each; returns the module, the trainer and what was logged."""
    torch.manual_seed(0)
    module, data = Classifier(calls, head), TensorDataset(torch.randn(300, 16), torch.randint(4, (300,)))
    trainer = LightningTrainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **arguments},
    )
    trainer.fit(module, DataLoader(data, 128, shuffle=True), DataLoader(data, 100))
    rows = [line.split(",") for line in Path(trainer.logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()]
    return module, trainer, [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


# Lightning itself: it asks torch for a name that is on its way out, and comments on the machine's cores and devices
lightnings = pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)


@lightnings
@pytest.mark.parametrize(
    ("calls", "head", "arguments"),
    [
        ("forward", "module", {}),
        ("forward", "module", {"precision": "bf16-mixed"}),
        ("submodule", "weight", {"accumulate_grad_batches": 2}),
    ],
)
def test_two_epochs_of_lightning(calls, head, arguments, tmp_path, capsys):
    module, _, logged = fit(tmp_path / "plain", calls, head, **arguments)
    callback = lightning.PlannerCallback(0.85, **QUICK)
    planned, _, planned_logged = fit(tmp_path / "planned", calls, head, [callback], **arguments)
    assert_equal(weights(planned), weights(module))
    for name in ("loss", "validation"):
        rows = [[row[name] for row in found if row[name]] for found in (planned_logged, logged)]
        assert rows[0] == rows[1] and len(rows[0]) >= 2

    assert callback.planned.original is (planned if calls == "forward" else planned.net)
    assert callback.planned.num_planned_calls == 6 and len(callback.planned.stats().sizes) == 2
    assert "forward" not in vars(planned) and "forward" not in vars(planned.net)
    assert capsys.readouterr().out.count("saved for backward") == 1
    (row,) = [row for row in planned_logged if row["planner/seconds"]]
    assert float(row["planner/peak_bytes"]) <= float(row["planner/budget_bytes"]) < float(row["planner/plain_peak_bytes"])
    assert [row["planner/other_sizes"] for row in planned_logged if row["planner/other_sizes"]] == ["1"]
    kept = callback.planned.plan.graph.value["(optimizer state)"].nbytes
    assert kept >= 2 * sum(weight.nbytes for weight in planned.parameters()), "AdamW's state"


class Taught(LightningModule):
    """Two networks with an optimizer each."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.net, self.teacher = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)), nn.Linear(16, 4)

    def training_step(self, batch, _):
        loss = (self.net(batch[0]) - self.teacher(batch[0])).square().mean()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net, self.teacher)]


@lightnings
def test_state_of_an_optimizer_that_trains_other_parts_is_set_aside(tmp_path):
    torch.manual_seed(0)
    module, data = Taught(), TensorDataset(torch.randn(64, 16))
    callback = lightning.PlannerCallback(1.0, module="net", **QUICK)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    LightningTrainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(module, DataLoader(data, 32))
    value = callback.planned.plan.graph.value
    own, others = (sum(p.nbytes for p in part.parameters()) for part in (module.net, module.teacher))
    steps = {"(optimizer state)": 4 * 4, "(reserved)": 2 * 4}  # Adam counts each parameter's steps in a tensor of 4 bytes
    assert value["(optimizer state)"].nbytes == 2 * own + steps["(optimizer state)"]
    assert value["(reserved)"].nbytes == 4 * others + steps["(reserved)"]  # weights and gradients, too
    assert callback.planned.num_planned_calls == 2


@lightnings
def test_lightning_plans_the_submodule_that_is_named(tmp_path):
    module, _, _ = fit(tmp_path, "submodule", "module")
    with pytest.warns(UserWarning, match=r"Classifier trains unplanned.*calls net by itself, and head .*module='net'"):
        found, _, _ = fit(tmp_path, "submodule", "module", [lightning.PlannerCallback(0.9, **QUICK)])
    assert_equal(weights(found), weights(module))
    callback = lightning.PlannerCallback(0.9, module="net", **QUICK)
    found, _, _ = fit(tmp_path, "submodule", "module", [callback])
    assert_equal(weights(found), weights(module))
    assert callback.planned.original is found.net and callback.planned.num_planned_calls == 6


@lightnings
def test_lightning_saves_and_gives_back_what_it_would_without_a_plan(tmp_path):
    saved = []
    for name, callbacks in (("plain", []), ("planned", [lightning.PlannerCallback(0.85, **QUICK)])):
        _, trainer, _ = fit(tmp_path / name, "forward", callbacks=callbacks, enable_checkpointing=True)
        saved.append(torch.load(trainer.checkpoint_callback.best_model_path)["state_dict"])
    assert list(saved[0]) == list(saved[1])
    assert_equal(list(saved[1].values()), list(saved[0].values()))

    class Fails(lightning.Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step:
                self.module = pl_module
                assert "forward" in vars(pl_module)
                raise KeyError("a fault of the user's")

    fails = Fails()
    with pytest.raises(KeyError):
        fit(tmp_path, "forward", callbacks=[lightning.PlannerCallback(0.85, **QUICK), fails])
    assert "forward" not in vars(fails.module)


@pytest.mark.parametrize("is_before", [pytest.param(True, marks=pytest.mark.zoo), False])
def test_accelerate(is_before):
    found, tables = [], []
    for is_planned in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = gpt2()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if is_planned and is_before:
            plan_at_first_call(model, 0.95, log=tables.append, accumulate=True, optimizer=optimizer, **QUICK)
        loader = DataLoader(texts()[:6], 4, collate_fn=padded)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if is_planned and not is_before:
            first = plan_at_first_call(model, 0.95, log=tables.append, accumulate=True, optimizer=optimizer, **QUICK)
            assert first.planned is None
        seen = []
        torch.manual_seed(3)
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append(loss.detach())
            with torch.no_grad():
                seen.append(model.eval()(**padded(texts())).loss)
                model.train()
        found.append([*seen, *weights(model)])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_equal(*found)
    assert len(tables) == 1 and "optimizer state" in tables[0]
    assert is_before or first.planned.stats().planned == 4


def test_mistakes_are_told_where_the_callback_is_made():
    for module in (transformers, lightning):
        with pytest.raises(TypeError, match="did you mean 'effort'"):
            module.PlannerCallback("20GiB", efort=3)
        with pytest.raises(ValueError, match="20 potatoes"):
            module.PlannerCallback("20 potatoes")


def test_a_missing_package_is_named_with_its_extra():
    script = (
        "import importlib, sys; sys.modules.update(dict.fromkeys(['transformers', 'lightning', 'pytorch_lightning']))\n"
        "from planner import InputError\n"
        "for name in ('transformers', 'lightning'):\n"
        "    try: importlib.import_module(f'planner.integrations.{name}')\n"
        "    except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    for name in ("transformers", "lightning"):
        assert f"pip install 'checkpoint-planner[{name}]'" in done.stdout, done.stderr


def test_a_planned_module_is_trained_as_its_model_is(tmp_path):
    models = {"plain": gpt2(), "planned": gpt2()}
    for model in models.values():
        model.config.use_cache = False  # as the Trainer sets it
    batch = {**padded(texts()[:1] * 4), "num_items_in_batch": torch.tensor(60)}
    models["planned"] = planned = plan(models["planned"].train(), 1.0, kwargs=batch, dynamic=True, **QUICK)
    histories = []
    for way, model in models.items():
        given = TrainingArguments(
            str(tmp_path / way),
            max_steps=1,
            per_device_train_batch_size=4,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = texts()[:1] * 4
        trainer = Trainer(model, given, data_collator=padded, train_dataset=data, eval_dataset=data)
        trainer.train()
        histories.append(losses(trainer))
    assert histories[0] == histories[1] and len(histories[0]) == 2
    assert planned.stats().planned == 1 and planned.stats().unplanned == 0
