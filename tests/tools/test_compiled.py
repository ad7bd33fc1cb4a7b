"""Programs compiled by the TPU's and the GPU's own compilers (extra `aot`); nothing of them is run."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import sentiments
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file

import bert_jax
from bert_jax import recipes, sharding
from bert_jax.data.loader import Shape
from bert_jax.inference.batches import Bucket
from bert_jax.settings import Settings
from bert_jax.tools import aot

pytestmark = pytest.mark.aot

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_check.py"
spec = importlib.util.spec_from_file_location("aot_check", SCRIPT)
aot_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot_check)


def share_of_bfloat16(found):
    flops = {kinds.split(" × ")[0]: flops for kinds, (_, flops) in found["products"].items()}
    return flops["bfloat16"] / sum(flops.values())


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])  # the others: scripts/aot_check.py, docs/accelerators.md
def test_a_step_of_base_on_eight_devices(name):
    found = aot_check.finetune(aot.get(name), "emotion", "base", Shape(256, 128, 4))
    assert found["fits"]
    assert share_of_bfloat16(found) > 0.999
    assert set(found["collectives"]) == {"all-reduce"}
    assert found["collectives"]["all-reduce"][1] == pytest.approx(found["gradient_bytes"], rel=0.02)
    assert found["aliased"] >= 3 * found["gradient_bytes"]


def test_fsdp_shares_out_the_state():
    found = aot_check.finetune(aot.get("h100:8"), "squad", "base", Shape(64, 384, 4), mesh={"data": 1, "fsdp": 8},
                               training={"scan_layers": True})  # fmt: skip
    assert found["fits"]
    assert "all-gather" in found["collectives"]
    assert found["resident"] < 0.3 * 3 * found["gradient_bytes"]


def test_splash_attention_is_in_the_step_of_a_tpu():
    changes = {"model": {"attention": "splash", "attention_probs_dropout_prob": 0.0}, "data": {"max_length": 512}}
    found = aot_check.finetune(aot.get("v5e:2x4"), "squad", "base", Shape(256, 512, 4), **changes)
    assert found["fits"]
    assert found["kernels"] == {"tpu_custom_call": 36}  # of each layer: forward, and two backward


def test_triton_attention_of_packed_rows_is_in_the_step_of_a_gpu():
    changes = {"model": {"attention": "triton", "attention_probs_dropout_prob": 0.0}, "data": {"max_length": 512}}
    found = aot_check.finetune(aot.get("h100:8"), "squad", "base", Shape(256, 512, 4), **changes)
    assert found["fits"]
    assert found["kernels"]["__gpu$xla.gpu.triton"] >= 36  # of each layer: forward, and two backward


@pytest.mark.parametrize(("name", "task"), [("v5e:2x4", "fill-mask"), ("h100:8", "text-classification")])
def test_eight_devices_share_the_rows_of_a_pipeline(name, task):
    found = aot_check.inference(aot.get(name), "base", Bucket(128, 128, 2 * (task == "fill-mask")), task=task)
    assert found["fits"]
    assert not found["collectives"]


@pytest.mark.parametrize(("name", "task"), [("h100:8", "fill-mask"), ("v5e:2x4", "text-classification")])
def test_eight_devices_share_the_parameters_of_a_pipeline(name, task):
    bucket = Bucket(128, 128, 2 * (task == "fill-mask"))
    found = aot_check.inference(aot.get(name), "large", bucket, task=task, data=1, fsdp=8)
    assert found["fits"]
    assert found["resident"] < 0.2 * 2 * 333_579_264  # bytes of the parameters in bfloat16
    assert "all-gather" in found["collectives"]


@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:2x4", "h100:8"])
def test_int8_products(name):
    products = aot_check.inference(aot.get(name), "base", Bucket(16, 128, 2), "int8", data=1)["products"]
    flops = {kinds: flops for kinds, (_, flops) in products.items()}
    assert flops["int8 × int8 → int32"] > 0.9 * sum(flops.values())  # the rest are those of attention and of the head


def test_what_does_not_fit_is_seen():
    changes = {"data": {"max_length": 512}, "training": {"scan_layers": True}}  # quicker to compile
    found = aot_check.finetune(aot.get("v5e:2x4"), "squad", "large", Shape(1024, 512, 4), **changes)
    assert not found["fits"]
    assert found["memory"] > aot.CHIPS["v5e"].memory


@pytest.mark.parametrize("name", ["v5e:2x2"])
def test_a_dry_run_says_what_the_compiler_says(tmp_path, monkeypatch, name):
    kind = name.split(":")[0]  # of which a small model soon has too much
    monkeypatch.setitem(aot.CHIPS, kind, dataclasses.replace(aot.CHIPS[kind], memory=2**25))
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(1)).save_pretrained(tmp_path / "base")
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(tmp_path / "base")
    rows = "".join(json.dumps(row) + "\n" for row in sentiments.rows(40))
    (tmp_path / "train.jsonl").write_text(rows)
    settings = Settings.from_dict(
        {
            "task": "text-classification",
            "model": {"id": str(tmp_path / "base")},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32},
            "training": {"batch_size": 16},
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    shown = io.StringIO()
    report = recipes.dry_run(settings, name, console=Console(file=shown, width=200))
    assert "fits, " in shown.getvalue()
    assert "DOES NOT FIT, " in shown.getvalue()
    for part in [f"compiles for {name}", "not run on it", "GiB per device", "all-reduce", "rows per device"]:
        assert part in report


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_program(tmp_path, name, dtype):
    bert_jax.export(bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", dtype=dtype), tmp_path)
    program = jax.export.deserialize(bytearray((tmp_path / "program.bin").read_bytes()))
    target = aot.get(name)
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    params = sharding.abstract(load_file(tmp_path / "model.safetensors"), place)
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), np.zeros((8, 128), np.int32))
    inputs["masked_positions"] = np.zeros((8, 3), np.int32)
    check = aot.check(jax.jit(program.call).trace(params, sharding.abstract(inputs, place)), target)
    assert check.fits
    assert check.memory > sum(param.nbytes for param in load_file(tmp_path / "model.safetensors").values())
