"""transformers' Trainer with SUSTrainerCallback: a tiny Llama, accumulation, evaluation, checkpoint and resume."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fx_passes.huggingface import SUSTrainerCallback, register_sus_attention  # noqa: E402
from sus_lightning import LinearSchedule, VarianceTarget  # noqa: E402

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)


def data(count: int = 72) -> list[dict[str, Any]]:
    steps = torch.randint(-1, 2, (count, 48), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": x} for x in steps.cumsum(1) % 32]


def trainer(folder: Path, callbacks: list[Any], net: Any = None, **options: Any) -> Any:
    torch._dynamo.reset()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **options,
        },
    )
    net = model() if net is None else net
    return transformers.Trainer(net, arguments, train_dataset=data(), eval_dataset=data(8), callbacks=callbacks)


def sus(c: Any = 4, **options: Any) -> SUSTrainerCallback:
    return SUSTrainerCallback(c, **{"compiler": "eager", **options})


def weights(fit: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in fit.model.parameters()])


def logged(fit: Any, key: str) -> list[float]:
    return [entry[key] for entry in fit.state.log_history if key in entry]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int) -> None:
    def run(callbacks: list[Any]) -> Any:
        fit = trainer(tmp_path, callbacks, gradient_accumulation_steps=accumulate)
        fit.train()
        return fit

    seen: list[dict[str, float]] = []

    class Look(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    callback = sus(LinearSchedule(12, 4, steps=4))
    # The first of all callbacks sees the values too, as TensorBoard's and WandB's must, which come before the user's.
    fit = run([Look(), callback])
    assert logged(fit, "sus/c") == [12, 10, 8, 6, 4, 4]
    assert [entry["sus/c"] for entry in seen if "sus/c" in entry] == [12, 10, 8, 6, 4, 4]
    assert logged(fit, "sus/attention_rewritten") == [2] * 6
    assert all(0 < kept <= c for kept, c in zip(logged(fit, "sus/kept_per_row"), logged(fit, "sus/c"), strict=True))
    assert all(0 < x < 1 for x in logged(fit, "sus/kept_fraction"))
    assert callback.backend.state.counter == 6 * accumulate
    assert "2 of 2 attentions rewritten" in capsys.readouterr().out
    losses = logged(fit, "loss")
    assert losses[-1] < losses[0]
    plain, exact = run([]), run([sus(float("inf"))])
    moved, rounding = (float((weights(f) - weights(plain)).norm() / weights(plain).norm()) for f in (fit, exact))
    assert rounding < 1e-4 < 1e-2 < moved  # Adam makes steps out of gradients that are rounding


def test_the_model_is_given_back_and_evaluated_as_it_was(tmp_path: Path) -> None:
    net, callback, compiled = model(), sus(), []

    class Look(transformers.TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.utils.counters.clear()
    fit = trainer(tmp_path, [callback, Look()], net, eval_strategy="steps", eval_steps=2, max_steps=4)
    fit.train()
    assert len(set(compiled)) == 1  # the graphs of training, and none for evaluation
    assert net._compiled_call_impl is None
    assert torch._dynamo.config.recompile_limit == 8
    assert len(logged(fit, "eval_loss")) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, accumulate: int) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": accumulate}
    first = sus({0: 8, 4: 3})
    whole = trainer(tmp_path / "whole", [first], **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SUSTrainerCallback"]
    assert saved["attributes"]["saved"] == {"c": 8, "counter": 3 * accumulate, "number": 0}
    second = sus({0: 8, 4: 3})
    resumed = trainer(tmp_path / "resumed", [second], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert second.backend.state.counter == first.backend.state.counter
    assert torch.equal(weights(resumed), weights(whole))
    again = trainer(tmp_path / "again", [sus({0: 8})], **options, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="c must be given again"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_callbacks_restored_by_the_trainer(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    whole = trainer(tmp_path / "whole", [sus(5)], **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", [sus(5)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(resumed), weights(whole))


def test_torch_compile_of_the_arguments_is_taken_over(tmp_path: Path) -> None:
    callback = sus(compiler="aot_eager")
    fit = trainer(tmp_path, [callback], torch_compile=True, torch_compile_backend="eager", max_steps=2)
    fit.train()
    assert callback.backend.report.rewritten == 2
    assert callback.backend.state.counter == 2


def test_a_model_with_the_attention_implementation(tmp_path: Path) -> None:
    handle = register_sus_attention(c=100)
    fit = trainer(tmp_path, [sus({0: 6, 3: 3})], model("sus"))
    fit.train()
    assert logged(fit, "sus/c") == [6, 6, 6, 3, 3, 3]
    assert handle.c == 3
    assert all(0 < kept <= 6 for kept in logged(fit, "sus/kept_per_row"))
    assert fit.model._compiled_call_impl is None


def test_no_attention_is_an_error_with_the_report(tmp_path: Path) -> None:
    class Without(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

        def forward(self, input_ids: Any, labels: Any) -> Any:
            logits = self.head(self.embedding(input_ids))
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    net = Without()
    with pytest.raises(RuntimeError, match=r"(?s)rewrote no attention.*No softmax attention"):
        trainer(tmp_path, [sus()], net).train()
    assert net._compiled_call_impl is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_a_fitted_callback(tmp_path: Path, copied: Any) -> None:
    callback = sus(5)
    trainer(tmp_path, [callback], max_steps=2).train()
    twin = copied(callback)
    assert twin.c == 5
    fit = trainer(tmp_path, [twin], max_steps=2)
    fit.train()
    assert logged(fit, "sus/c") == [5, 5]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"c": -1}, "c must be above 0"),
    "text": ({"c": "x"}, "c must be a number above 0"),
    "no step 0": ({"c": {3: 4}}, r"c must say what it is at step 0, but its steps are \[3\]"),
    "step": ({"c": {0: 3, 1.5: 4}}, "the keys of c must be steps"),
    "value": ({"c": {0: 3, 2: -4}}, r"c\[2\] must be above 0"),
    "adapts": ({"c": VarianceTarget(0.01)}, "it adapts to the probes"),
    "sampler": ({"sampler": "x"}, "sampler must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        SUSTrainerCallback(**arguments)
