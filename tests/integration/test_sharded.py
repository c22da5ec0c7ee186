"""Models spread over processes by FSDP2 or ZeRO-3: what is refused, memory, checkpoints, bases saved in 4 bits."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from helpers import REPOSITORY, SETTINGS, assert_same_run, hw3, launch, losses
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Gemma2Config, LlamaConfig

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.modeling.adapter_slot import lora_config
from hw3.modeling.loading import load_base
from hw3.modeling.quantization import GatheredLinear4bit
from hw3.runs.checkpoints import complete_checkpoints, drop_old_state, mark_complete
from hw3.runs.resume import check_state
from hw3.training.memory_estimate import Memory, memory_of, weight_counts
from hw3.training.plan import plan_run
from hw3.training.sharding import sharded_as, sharded_by
from hw3.training.trainer import SHARDED_POLICY

# 4,096,000 weights in linear layers, 10 layers of them; 2 * 640,000 in embedding and head; norms 2,688.
SHAPE = LlamaConfig(
    vocab_size=5000, hidden_size=128, intermediate_size=896, num_hidden_layers=10, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32,
)  # fmt: skip
TRAINED = 1_000_000
# `hw3` on CPU processes that accelerate takes for another device's: it has no FSDP for CPUs, PyTorch has.
FSDP_ON_CPUS = """
import sys
from accelerate.state import DistributedType, PartialState
begin = PartialState.__init__
def as_another(self, *arguments, **named):
    begin(self, *arguments, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU
PartialState.__init__ = as_another
from torch.nn import Linear
from hw3.training.trainer import CompletionTrainer
train = CompletionTrainer.train
def tell_dtypes(self, *arguments, **named):
    dtypes = set()
    for name, module in self.model.named_modules():
        if "lora_A" in name and isinstance(module, Linear):
            module.register_forward_hook(lambda module, _, out: dtypes.add((module.weight.dtype, out.dtype)))
    train(self, *arguments, **named)
    print("adapters:", *dtypes)
CompletionTrainer.train = tell_dtypes
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""


def memory(sharded: str | None, processes: int, *overrides: str) -> Memory:
    recipe = load_recipe(REPOSITORY / "recipes/llama/qlora.yaml", list(overrides))
    return memory_of(
        recipe, SHAPE, weight_counts(SHAPE), TRAINED, rows=1, width=10, outputs=5, captured=False, dequantized=False,
        checkpointing=False, optim="adamw_torch_fused", processes=processes, sharded=sharded,
    )  # fmt: skip


def test_memory_of_a_sharded_model() -> None:
    linear, other = weight_counts(SHAPE)
    assert (linear, other) == (4_096_000, 1_282_688)
    # bfloat16: 8,192,000 bytes in layers, 2,565,376 elsewhere; 4-bit: 2,048,000 and 65,000 of scales.
    whole = memory(None, 2, "quantization=null")
    assert (whole.weights, whole.adapters, whole.optimizer) == (10_757_376, 12_000_000, 8_000_000)
    fsdp = memory("FSDP", 2, "quantization=null")
    assert fsdp.weights == 10_757_376 // 2 + 2 * 819_200 + 1_280_000
    assert (fsdp.adapters, fsdp.optimizer) == (4_000_000, 4_000_000)
    packed = memory("FSDP", 4)
    assert packed.weights == (2_048_000 + 2_565_376) // 4 + 65_000 + 2 * 204_800 + 1_280_000
    zero3 = memory("DeepSpeed", 4, "quantization=null")
    # All of this small base may stay gathered; float32 copies of adapters and gradients; the buffer.
    assert zero3.weights == 10_757_376 // 4 + 10_757_376
    assert (zero3.adapters, zero3.optimizer) == (3_000_000 + 10**9, 2_000_000)
    assert fsdp.activations == zero3.activations == whole.activations


def test_what_shards_is_read_from_environment_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sharded_by() is None
    files = {file.stem: sharded_as(file) for file in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert files == {"cpu2": None, "ddp": None, "multi_node": None, "fsdp2": "FSDP", "zero3": "DeepSpeed"}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert sharded_by() == "DeepSpeed"
    (tmp_path / "a.yaml").write_text("- a")
    with pytest.raises(UserError, match="no file of accelerate's"):
        sharded_as(tmp_path / "a.yaml")


def test_what_cannot_be_sharded_is_refused(mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw3.training.sharding.find_spec", lambda name: None)
    recipe = load_recipe(mini_recipe, ["training.optim=paged_adamw_8bit", "model.dtype=bfloat16"])
    with pytest.raises(UserError) as refused:
        plan_run(recipe, tmp_path / "run", 2, "DeepSpeed")
    shown = "\n".join(refused.value.problems)
    assert 'SET="quantization.bnb_4bit_quant_storage=bfloat16"' in shown
    assert (
        "paged_adamw_8bit is bitsandbytes', which knows no sharded parameters; this works: SET=\"training.op" in shown
    )
    assert "DeepSpeed is not installed; this installs it: pip install" in shown
    assert "model.dtype: found bfloat16; DeepSpeed computes in the dtype of the weights" in shown
    assert 'SET="model.dtype=float32"' in shown


def test_states_of_sharded_runs_are_part_of_complete_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / f"global_step{step}").mkdir(parents=True)
        for rank in (0, 1):
            (folder / f"global_step{step}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"state")
        for name in ("adapter_model.safetensors", "adapter_config.json", "latest", "pytorch_model_fsdp.bin"):
            (folder / name).write_bytes(b"x")
        mark_complete(folder, step)
    record = json.loads((tmp_path / "checkpoint-3/COMPLETE.json").read_text())
    assert set(record["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt" in record["resume_files"]
    drop_old_state(tmp_path)
    assert sorted(file.name for file in (tmp_path / "checkpoint-1").iterdir()) == [
        "COMPLETE.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    first, _, last = complete_checkpoints(tmp_path)
    assert not first.resumable and last.resumable
    check_state(last, "DeepSpeed", 2)
    for sharded, processes in (("DeepSpeed", 4), (None, 2), ("FSDP", 2)):
        with pytest.raises(UserError, match="its optimizer state is of ACCELERATE=zero3 GPUS=2"):
            check_state(last, sharded, processes)
    (last.path / "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert not complete_checkpoints(tmp_path)[-1].resumable


@pytest.fixture
def packed_recipe(tmp_path: Path, mini_recipe: Path) -> Path:
    """The mini recipe on a base that is saved in 4 bits, stored as float32."""
    from memory import make_quantized_base

    recipe = yaml.safe_load(mini_recipe.read_text())
    shape = Gemma2Config.from_pretrained(recipe["model"]["pretrained_model_name_or_path"])
    make_quantized_base(tmp_path / "packed", shape, recipe["model"]["pretrained_model_name_or_path"], "float32", "cpu")
    recipe["model"]["pretrained_model_name_or_path"] = str(tmp_path / "packed")
    recipe["quantization"]["bnb_4bit_quant_storage"] = "float32"
    path = tmp_path / "packed.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True))
    return path


def test_a_base_saved_in_4_bits(packed_recipe: Path, tmp_path: Path) -> None:
    """It is loaded as it was packed, trained, and refused where the recipe says other things of it."""
    saved = load_file(tmp_path / "packed/model.safetensors")
    model = load_base(load_recipe(packed_recipe), torch.device("cpu"))
    layer = model.model.layers[1].mlp.up_proj
    packed = saved["model.layers.1.mlp.up_proj.weight"]
    # As bytes: four bits beside each other are no numbers.
    assert torch.equal(layer.weight.view(torch.uint8), packed.view(torch.uint8)) and packed.dtype == torch.float32
    assert layer.weight.quant_state.nested and layer.weight.quant_state.shape == (128, 64)
    hw3("train", packed_recipe, "--run", tmp_path / "run", "training.max_steps=1", "training.save_steps=1")
    assert complete_checkpoints(tmp_path / "run")[-1].step == 1
    for override, problem in {
        "quantization.bnb_4bit_quant_storage=uint8": 'saved with float32; this works: SET="quantization.bnb_4bit_',
        "quantization.bnb_4bit_quant_type=fp4": "found fp4; ",
        "quantization=null": "is saved in 4 bits; the recipe must say so",
    }.items():
        with pytest.raises(UserError) as refused:
            plan_run(load_recipe(packed_recipe, [override]), tmp_path / "other", 1)
        assert problem in "\n".join(refused.value.problems)


def gathered_bytes(rank: int, store: Path, policy: MixedPrecisionPolicy) -> tuple[int, int]:
    """Of a layer's packed weights that FSDP2 gathers: how many bytes are other ones, and how many there are."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    overrides = ["model.dtype=bfloat16", "quantization.bnb_4bit_quant_storage=bfloat16"]
    recipe = load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml", overrides)
    model = get_peft_model(load_base(recipe, torch.device("cpu")), lora_config(recipe.lora))
    layer = model.get_base_model().base_model.layers[0]
    before = [part.weight.data.view(torch.uint8).clone() for part in layer.modules() if type(part) is Linear4bit]
    copy = torch._foreach_copy_

    def through_float32(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
        """What a GPU's copy does to bfloat16: one NaN for all."""
        for one, other in zip(to, of, strict=True):
            one.copy_(other)
            if other.dtype == torch.bfloat16:
                one.view(torch.int16)[other.isnan()] = 0x7FFF

    torch._foreach_copy_ = through_float32
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    layer.unshard()
    after = [part.weight.data.view(torch.uint8) for part in layer.modules() if type(part) is Linear4bit]
    torch._foreach_copy_ = copy
    torch.distributed.destroy_process_group()
    other = sum(int((one.flatten() != two.flatten()).sum()) for one, two in zip(before, after, strict=True))
    return other, sum(part.numel() for part in before)


def test_packed_weights_are_gathered_as_they_are(tmp_path: Path) -> None:
    """Under our policy, and not under the one that accelerate would take."""
    theirs = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        found = []
        for name, policy in (("ours", SHARDED_POLICY), ("theirs", theirs)):
            both = [processes.submit(gathered_bytes, rank, tmp_path / name, policy) for rank in range(2)]
            found.append([each.result() for each in both])
    assert found[0] == [(0, 303_104)] * 2
    assert all(spoiled > 100 for spoiled, _ in found[1])


def fsdp2(processes: int, recipe: Path, run: Path, *overrides: str, precision: str = "no") -> str:
    """Train under FSDP2 on CPU processes; returns what was printed."""
    config = yaml.safe_load((REPOSITORY / "accelerate_configs/fsdp2.yaml").read_text())
    config |= {"use_cpu": True, "mixed_precision": precision}
    file, script = run.with_name("fsdp2.yaml"), run.with_name("on_cpus.py")
    file.write_text(yaml.safe_dump(config))
    script.write_text(FSDP_ON_CPUS)
    options = ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", "0"]
    done = launch(script, "train", recipe, "--run", run, *overrides, options=options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_fsdp2_is_the_run_of_one_process(mini_recipe: Path, tmp_path: Path) -> None:
    """Two CPU processes begin, and four go on."""
    hw3("train", mini_recipe, "--run", tmp_path / "straight", *SETTINGS)
    for processes, steps in ((2, 8), (4, 12)):
        shown = fsdp2(processes, mini_recipe, tmp_path / "run", *SETTINGS, f"training.max_steps={steps}")
        assert f"run: {steps} steps done" in shown
        assert "adapters: (torch.float32, torch.float32)\n" in shown
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_fsdp2_computes_under_autocast(mini_recipe: Path, tmp_path: Path) -> None:
    """Float32 weights, bfloat16 products, as on one GPU; the launcher asks for it, recipes for CPUs may not."""
    short = [*SETTINGS, "training.max_steps=2"]
    shown = fsdp2(2, mini_recipe, tmp_path / "run", *short, precision="bf16")
    assert "adapters: (torch.float32, torch.bfloat16)\n" in shown
    hw3("train", mini_recipe, "--run", tmp_path / "straight", *short)
    for step, (loss, tokens) in losses(tmp_path / "straight").items():
        assert losses(tmp_path / "run")[step] == (pytest.approx(loss, rel=5e-3), tokens)


@pytest.mark.parametrize("again", [False, True])
def test_zero3_is_the_run_of_one_process(mini_recipe: Path, tmp_path: Path, again: bool) -> None:
    """DeepSpeed on two CPU processes, stopped and resumed; it is an extra, so this runs where it is installed."""
    pytest.importorskip("deepspeed")
    config = yaml.safe_load((REPOSITORY / "accelerate_configs/zero3.yaml").read_text()) | {"use_cpu": True}
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    options = ["--config_file", str(tmp_path / "zero3.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    hw3("train", mini_recipe, "--run", tmp_path / "straight", *SETTINGS)
    own = [*SETTINGS, f"training.activation_checkpointing={str(again).lower()}"]
    for steps in (8, 12):
        done = launch(
            "-m", "hw3", "train", mini_recipe, "--run", tmp_path / "run", *own, f"training.max_steps={steps}",
            options=options, DS_ACCELERATOR="cpu",
        )  # fmt: skip
        # Not by its status: on a CPU, in some of ten runs, a process of DeepSpeed's aborts on its way out, after all is
        # done ("terminate called without an active exception": a thread that nobody joined).
        assert f"run: {steps} steps done" in done.stdout, done.stdout
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert not list((tmp_path / "run/checkpoint-12").glob("zero_to_*.py"))


@pytest.mark.parametrize(
    ("compute", "packed_from", "double"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
    ],
)
def test_a_gathered_layer_keeps_no_weight_for_its_backward(
    compute: torch.dtype, packed_from: torch.dtype, double: bool
) -> None:
    """What DeepSpeed gathers is freed after the forward; the backward takes what is there by then."""
    torch.manual_seed(0)
    layer = Linear4bit(64, 48, compute_dtype=compute, quant_type="nf4", compress_statistics=double, device="cpu")
    layer.weight.data, layer.bias.data = torch.randn(48, 64, dtype=packed_from), torch.randn(48)
    layer.to("cpu")
    layer.weight.requires_grad_(False)
    x, dy = torch.randn(2, 5, 64, dtype=compute, requires_grad=True), 1e-9 * torch.randn(2, 5, 48, dtype=compute)
    expected = layer(x)
    expected.backward(dy)
    gradients, x.grad, layer.bias.grad = (x.grad, layer.bias.grad), None, None

    layer.__class__ = GatheredLinear4bit
    y = layer(x)
    assert torch.equal(y, expected)
    gathered, again = layer.weight.data, layer.weight.data.clone()
    gathered.zero_()
    layer.weight.data = again
    y.backward(dy)
    assert torch.equal(x.grad, gradients[0]) and bool(x.grad.any())
    torch.testing.assert_close(layer.bias.grad, gradients[1])
