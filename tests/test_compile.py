"""``moecompile.compile``: what a user gets back, and that it is right."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiling import IDS, batches, calibrated, dense_model, plain, tokens, without_inductor
from moecompile.codegen import cpu
from torch import Tensor, nn

import moecompile
from moecompile.checking import largest_difference
from moecompile.compiled import compilation_of
from moecompile.errors import CompileError, InputError, ParityError, PlanError
from moecompile.lowered import _told
from moecompile.recipes import Calibrated, Contiguous
from moecompile.scope import modules_in, modules_named


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test compiles anew and is warned anew."""
    torch._dynamo.reset()
    _told.clear()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_converted_model_through_inductor() -> None:
    moe = calibrated()
    reference = logits(moe)
    fast = moecompile.compile(moe, fullgraph=True)
    close(logits(fast), reference)
    layers = moecompile.last_graphs(fast)[-1].layers
    assert [layer["site"] for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(layer["router"] == "fused" and layer["shared"] and layer["top_k"] == 2 for layer in layers)
    code = moecompile.generated_code(fast)
    assert any(name.startswith("graph_") and "moe_ffn" in text for name, text in code.items())
    if cpu.available() is None:
        assert any(name.startswith("kernel_") and "kernel(" in text for name, text in code.items())


def test_a_compiled_module_is_the_module() -> None:
    moe = calibrated()
    fast = without_inductor(moecompile.compile(moe))
    assert isinstance(fast, type(moe)) and type(fast).__name__ == type(moe).__name__
    assert list(fast.state_dict()) == list(moe.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), moe.parameters(), strict=True))
    fast.train()
    assert moe.training
    fast.eval()
    before = logits(fast)
    with torch.no_grad():
        moe.lm_head.weight.mul_(2)
    close(logits(fast), before * 2)
    assert not moecompile.last_graphs(moecompile.compile(moe))


def test_copies_and_pickles_are_compiled_and_their_own() -> None:
    for model, copied in ((plain(), copy.deepcopy), (calibrated(), lambda m: pickle.loads(pickle.dumps(m)))):
        fast = without_inductor(moecompile.compile(model))
        other = copied(fast)
        close(logits(without_inductor(other)), logits(fast))
        assert other.lm_head.weight is not fast.lm_head.weight
        assert len(moecompile.last_graphs(other)) == 1


def test_save_and_load(tmp_path: Any) -> None:
    fast = without_inductor(moecompile.compile(calibrated()))
    reference = logits(fast)  # weights are laid out anew
    fast.save_pretrained(tmp_path / "moe")
    close(logits(moecompile.load(tmp_path / "moe")), reference)


def test_decorators() -> None:
    moe = plain()

    @moecompile.compile
    def plainly(ids: Tensor) -> Tensor:
        """Its text."""
        return moe(input_ids=ids).logits

    @moecompile.compile(fullgraph=True)
    class Net(nn.Module):
        def __init__(self, scale: float) -> None:
            super(Net, self).__init__()  # noqa: UP008
            self.scale = scale

        def forward(self, ids: Tensor) -> Tensor:
            return moe(input_ids=ids).logits * self.scale

    class Half(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) / 2

    class Holder:
        @moecompile.compile(fullgraph=True)
        def method(self, ids: Tensor) -> Tensor:
            return moe(input_ids=ids).logits

    without_inductor(plainly), without_inductor(Holder.method)
    nets = [without_inductor(net) for net in (Net(1.0), Net(2.0), Half(2.0))]
    reference = logits(moe)
    assert plainly.__doc__ == "Its text." and isinstance(nets[0], nn.Module)
    with torch.no_grad():
        for found in (plainly(IDS), Holder().method(IDS), nets[0](IDS), nets[1](IDS) / 2, nets[2](IDS)):
            close(found, reference)
    for compiled in (plainly, Holder.method, *nets):
        assert len(moecompile.last_graphs(compiled)[-1].layers) == 2


def test_the_backend_of_torch_compile() -> None:
    moe = plain()
    reference = logits(moe)
    torch._dynamo.list_backends()
    fast = torch.compile(moe, backend="moecompile", options={"verify": True})
    close(logits(fast), reference)
    assert len(moecompile.last_graphs()[-1].layers) == 2


def test_a_dense_model_with_a_plan() -> None:
    dense = dense_model()
    before = logits(dense)
    plan = moecompile.plan(dense, Calibrated(experts=6, shared=2, top_k=2), calibration=batches())
    fast = without_inductor(moecompile.compile(dense, plan=plan, fullgraph=True))
    close(logits(fast), logits(moecompile.convert(dense, plan)))
    assert torch.equal(logits(dense), before) and not moecompile.moe_blocks(dense)
    assert fast.model.embed_tokens.weight is dense.model.embed_tokens.weight


def test_options_that_make_no_sense() -> None:
    for options in ({"mode": "fastest"}, {"weights": "int3"}):
        with pytest.raises(InputError, match="there are"):
            moecompile.compile(plain(), **options)
    with pytest.raises(InputError, match="no option 'fastest'"):
        moecompile.compile(plain(), options={"fastest": True})
    with pytest.raises(InputError, match="plan="):
        moecompile.compile(lambda x: x, plan=Calibrated())
    with pytest.raises(InputError, match="takes a module"):
        moecompile.compile(3)
    moe = plain()
    assert moecompile.compile(moe, disable=True) is moe


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_the_model_with_few_graphs(cache: str) -> None:
    moe = calibrated()
    fast = without_inductor(moecompile.compile(moe, fullgraph=True))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    compiled = options | ({"cache_implementation": "static"} if cache == "static" else {})
    for length in (5, 7, 9):
        prompt = tokens(1, length, seed=length)
        assert torch.equal(moe.generate(prompt, **options), fast.generate(prompt, **compiled))
    assert len(moecompile.last_graphs(fast)) <= 3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_generation_through_inductor(mode: str) -> None:
    """In every mode of torch.compile, token for token."""
    moe = calibrated()
    fast = moecompile.compile(moe, mode=mode, fullgraph=True)
    prompt, options = tokens(2, 7), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(moe.generate(prompt, **options), fast.generate(prompt, **options))
    records = moecompile.last_graphs(fast)
    assert len(records) == 2 and all(record.output_code and not record.fallback for record in records)


def test_sizes_that_are_equal_by_chance() -> None:
    """A prompt as long as a head is wide, as many sequences as there are heads: no graph more for others."""
    moe = calibrated()
    for shapes in (((2, 8), (4, 11)), ((3, 7), (5, 11), (6, 9))):
        torch._dynamo.reset()
        fast = without_inductor(moecompile.compile(moe, fullgraph=True))
        for batch, length in shapes:
            prompt, options = tokens(batch, length, seed=length), {"max_new_tokens": 5, "do_sample": False}
            assert torch.equal(moe.generate(prompt, **options), fast.generate(prompt, **options))
        assert len(moecompile.last_graphs(fast)) == 2


def test_generation_of_padded_batches_beams_and_samples() -> None:
    moe = calibrated()
    fast = without_inductor(moecompile.compile(moe))
    prompt, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    prompt[0, :4] = mask[0, :4] = 0
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True, "temperature": 1.0}):
        found = []
        for model in (moe, fast):
            torch.manual_seed(0)
            found.append(model.generate(prompt, attention_mask=mask, max_new_tokens=6, **options))
        assert torch.equal(*found)


def test_the_dial_of_functions_and_methods() -> None:
    """Of models in a closure, given, and held by what a method is called on: more settings than TorchDynamo recompiles for."""
    moe = plain()

    class Holder:
        def __init__(self) -> None:
            self.model = moe

        @moecompile.compile(fullgraph=True)
        def method(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits

    inside = moecompile.compile(lambda ids: moe(input_ids=ids).logits, fullgraph=True)
    given = moecompile.compile(lambda model, ids: model(input_ids=ids).logits, fullgraph=True)

    @moecompile.compile(fullgraph=True)
    @torch.no_grad()
    def decorated(ids: Tensor) -> Tensor:
        return moe(input_ids=ids).logits

    holder = Holder()
    without_inductor(inside), without_inductor(given), without_inductor(Holder.method), without_inductor(decorated)
    settings = [(k, phase) for k in (0, 1, 2, 3, 4) for phase in (1, 5)]
    with torch.no_grad():
        for k, later in settings:
            moecompile.set_top_k(moe, k, layers=[0])
            moecompile.set_top_k(moe, later, layers=[1])
            for found in (inside(IDS), given(moe, IDS), holder.method(IDS), decorated(IDS)):
                close(found, logits(moe))
    for compiled in (inside, given, Holder.method, decorated):
        assert len(moecompile.last_graphs(compiled)) == len(settings)


def test_modules_that_a_function_names() -> None:
    outer, other = nn.Linear(2, 2), nn.Linear(3, 3)
    scope = {"outer": outer, "other": other, "torch": torch}
    exec("@torch.no_grad()\ndef f(x, many=[1]):\n    return (lambda y: outer(y.other))(x)", scope)
    assert modules_named(scope["f"]) == [outer]
    assert modules_named(functools.partial(lambda a, b: a(b), other)) == [other]
    assert modules_in([[outer], {"a": other}, SimpleNamespace(model=outer), range(3), "text", 1.0]) == [outer, other]
    assert modules_in([dict.fromkeys(range(300), outer)]) == []


def test_class_and_static_methods() -> None:
    """The decorator above theirs and below."""
    moe = plain()

    class Holder:
        model = moe

        @moecompile.compile(fullgraph=True)
        @classmethod
        def above(cls, ids: Tensor) -> Tensor:
            return cls.model(input_ids=ids).logits

        @classmethod
        @moecompile.compile(fullgraph=True)
        def below(cls, ids: Tensor) -> Tensor:
            return cls.model(input_ids=ids).logits

        @moecompile.compile
        @staticmethod
        def static(ids: Tensor) -> Tensor:
            return moe(input_ids=ids).logits

    for name in ("above", "below", "static"):
        without_inductor(inspect.unwrap(getattr(Holder, name), stop=lambda f: hasattr(f, "_moecompile")))
        with torch.no_grad():
            close(getattr(Holder(), name)(IDS), logits(moe))
            close(getattr(Holder, name)(IDS), logits(moe))


def test_the_error_that_a_caller_handles_is_not_raised_again() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x.reshape(7)

    fast = without_inductor(moecompile.compile(wrong))
    try:
        raise CompileError("another one")
    except CompileError:
        with pytest.raises(Exception, match="7") as raised:
            fast(torch.ones(3))
    assert not isinstance(raised.value, CompileError)


def test_a_width_that_is_symbolic() -> None:
    block, x = plain().model.layers[0].mlp, torch.randn(5, 32)
    fast = without_inductor(moecompile.compile(lambda x: block(x), dynamic=True, fullgraph=True))
    with torch.no_grad():
        close(fast(x), block(x))


def test_what_is_behind_torch_compile_is_refused_and_verified_too() -> None:
    with pytest.raises(Exception, match="no CPU kernel for float64"):
        logits(torch.compile(plain().double(), backend="moecompile", fullgraph=True))
    torch._dynamo.reset()
    spoilt = plain()
    spoilt.model.layers[1].mlp.place[0] = spoilt.model.layers[1].mlp.place[1]
    with pytest.raises(Exception, match="all experts on, the block differs"):
        logits(torch.compile(spoilt, backend="moecompile", options={"verify": True}))
    torch._dynamo.reset()
    scope = {"model": spoilt}
    exec("def around(ids):\n    return model(input_ids=ids).logits", scope)
    with pytest.raises(Exception, match="all experts on, the block differs"), torch.no_grad():
        torch.compile(scope["around"], backend="moecompile", options={"verify": True})(IDS)


def test_weights_that_nothing_rounds() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = plain().model.layers[0].mlp, nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.block(x), self.head.weight * 2)

    with pytest.raises(CompileError, match="its weight is computed in the graph"), torch.no_grad():
        moecompile.compile(Computed(), weights="int8-all", fullgraph=True)(torch.randn(5, 32))
    with pytest.warns(moecompile.FallbackWarning, match="changes nothing: Linear has no experts"):
        moecompile.compile(nn.Linear(2, 2), weights="int8")


@pytest.mark.parametrize("kind", ["static", "padded", "beams"])
def test_other_generation_through_inductor(kind: str) -> None:
    moe = calibrated()
    fast = moecompile.compile(moe, fullgraph=True)
    prompt, options = tokens(2, 7), {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(prompt)
    if kind != "static":
        prompt[0, :3] = mask[0, :3] = 0
    more: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    options |= {"num_beams": 3} if kind == "beams" else {}
    wanted = moe.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(fast.generate(prompt, attention_mask=mask, **options, **more), wanted)
    records = moecompile.last_graphs(fast)
    assert 0 < len(records) <= 3 and all(record.output_code and not record.fallback for record in records)


def test_fully_sharded_parameters(tmp_path: Path) -> None:
    """Two processes with FSDP2, compiled: the logits and gradients of one."""
    script = tmp_path / "job.py"
    script.write_text(
        "import torch, moecompile\n"
        "torch.set_num_threads(1)\n"
        "from compiling import IDS, plain, without_inductor\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "from moecompile.tuning.parallel import process_group\n"
        "moe = plain()\n"
        "wanted = moe(input_ids=IDS, labels=IDS)\n"
        "wanted.loss.backward()\n"
        "gradients = {n: p.grad for n, p in moe.named_parameters() if p.grad is not None}\n"
        "moe.zero_grad()\n"
        "with process_group(torch.device('cpu')):\n"
        "    mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (2,))\n"
        "    for layer in moe.model.layers:\n"
        "        fully_shard(layer, mesh=mesh)\n"
        "    fully_shard(moe, mesh=mesh)\n"
        "    fast = without_inductor(moecompile.compile(moe))\n"
        "    with torch.no_grad():\n"
        "        assert (fast(input_ids=IDS).logits - wanted.logits).abs().max() < 1e-5\n"
        "    out = fast(input_ids=IDS, labels=IDS)\n"
        "    out.loss.backward()\n"
        "    for name, parameter in moe.named_parameters():\n"
        "        if name in gradients:\n"
        "            error = (parameter.grad.full_tensor() - gradients[name]).abs().max()\n"
        "            assert error < 1e-5 + 1e-3 * gradients[name].abs().max(), (name, error)\n"
        "records = moecompile.last_graphs(fast)\n"
        "assert any(record.training for record in records) and any(record.layers for record in records)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    job = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=280)
    assert job.returncode == 0, job.stderr[-3000:]


def test_functions_share_code_between_equal_blocks() -> None:
    """One graph for all layers that a function is given."""
    moe, x = plain(), torch.randn(5, 32)
    blocks = list(moecompile.moe_blocks(moe).values())
    layer = without_inductor(moecompile.compile(lambda block, x: block(x), fullgraph=True))
    with torch.no_grad():
        for block in blocks:
            close(layer(block, x), block(x))
    assert len(moecompile.last_graphs(layer)) == 1


def test_the_dial() -> None:
    dense = dense_model()
    moe = plain(dense)
    fast = without_inductor(moecompile.compile(moe, fullgraph=True))
    for _ in range(2):
        for k in (0, 2, 4, 6, 3, 1, 5):
            moecompile.set_top_k(fast, k)
            reference = logits(moe)
            close(logits(fast), reference)
    graphs = len(moecompile.last_graphs(fast))
    assert graphs == 7
    with moecompile.using_top_k(fast, 1, layers=[-1]):
        assert [b.top_k for b in moecompile.moe_blocks(fast).values()] == [5, 1]
        close(logits(fast), logits(moe))
    assert [b.top_k for b in moecompile.moe_blocks(fast).values()] == [5, 5]
    logits(fast)
    assert len(moecompile.last_graphs(fast)) == graphs + 1
    with moecompile.using_top_k(fast, None, phase="prefill"):
        close(logits(fast), logits(dense))
        one = logits(fast, IDS[:, :1])
    close(one, logits(moe, IDS[:, :1]))
    assert (one - logits(dense, IDS[:, :1])).abs().max() > 1e-3
    for wrong in ({"layers": [9]}, {"layers": ["no"]}, {"phase": "training"}):
        with pytest.raises(InputError, match="there is no"):
            moecompile.set_top_k(fast, 1, **wrong)
    with pytest.raises(PlanError, match="has 6 experts"):
        moecompile.set_top_k(fast, 7)


def test_training_through_it() -> None:
    moe = calibrated().train()
    fast = moecompile.compile(moe, fullgraph=True)

    def gradients(model: Any) -> dict[str, Tensor]:
        moe.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    eager, compiled = gradients(moe), gradients(fast)
    assert eager.keys() == compiled.keys() and any("router" in name for name in eager)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert moecompile.last_graphs(fast)[-1].training


def _gradients(model: Any, moe: Any) -> tuple[Tensor, dict[str, Tensor]]:
    moe.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["autocast", "checkpointing"])
def test_autocast_and_checkpointing(kind: str) -> None:
    """Loss and every gradient, through Inductor."""
    moe = plain().train()
    if kind == "checkpointing":
        moe.gradient_checkpointing_enable()
    fast = moecompile.compile(moe)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        (loss, wanted), (ours, found) = _gradients(moe, moe), _gradients(fast, moe)
    share = 0.05 if kind == "autocast" else 1e-3
    torch.testing.assert_close(ours, loss, rtol=share, atol=share)
    assert found.keys() == wanted.keys() and any("experts" in name for name in wanted)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= share * gradient.norm() + 1e-6, name
    records = moecompile.last_graphs(fast)
    assert records and any(record.training and record.output_code for record in records)


def test_what_cannot_be_traced_runs_eagerly_with_one_warning() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * 2 if y.sum().item() > 0 else y - 1

    model, x = Branching(), torch.randn(3, 4)
    fast = without_inductor(moecompile.compile(model))
    with torch.no_grad(), pytest.warns(moecompile.FallbackWarning, match="eager"):
        close(fast(x), model(x))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(fast(x), model(x))
        close(fast(-x), model(-x))
    with torch.no_grad(), pytest.raises(Exception, match=r"(?i)data-dependent|item|unsupported|graph break"):
        moecompile.compile(Branching(), fullgraph=True)(x)


def test_a_failing_pass_or_inductor_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from moecompile.passes.fuse_router import FuseRouter

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken on purpose")

    moe = plain()
    reference = logits(moe)
    with monkeypatch.context() as patched:
        patched.setattr(FuseRouter, "__call__", fails)
        with pytest.warns(moecompile.FallbackWarning, match="fuse_router.*broken on purpose"):
            close(logits(without_inductor(moecompile.compile(moe))), reference)
        with pytest.raises(CompileError, match="fuse_router"):
            logits(moecompile.compile(moe, fullgraph=True))
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with pytest.warns(moecompile.FallbackWarning, match="Inductor.*broken on purpose"):
        close(logits(moecompile.compile(moe)), reference)
    with pytest.raises(CompileError, match="Inductor"):
        logits(moecompile.compile(moe, fullgraph=True))


def test_float64_runs_in_torch_operators() -> None:
    moe = plain().double()
    fast = without_inductor(moecompile.compile(moe))
    with pytest.warns(moecompile.FallbackWarning, match=r"model.layers.0.mlp: node .* plain torch operators: .*float64"):
        torch.testing.assert_close(logits(fast), logits(moe), rtol=1e-10, atol=1e-12)
    with pytest.raises(CompileError, match="no CPU kernel for float64"):
        logits(moecompile.compile(moe, fullgraph=True))
    assert {layer["backend"] for layer in moecompile.last_graphs(fast)[-1].layers} == {"torch"}
    assert any("float64" in note for note in moecompile.last_graphs(fast)[-1].notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_rounded_once(dtype: torch.dtype) -> None:
    moe = plain().to(dtype)
    fast = without_inductor(moecompile.compile(moe, weights="int8", verify=True))
    difference = (logits(fast) - logits(moe)).float().norm() / logits(moe).float().norm()
    assert 0 < difference < 0.05


def test_weights_that_a_device_has_no_kernel_for() -> None:
    moe = plain()
    with pytest.raises(InputError, match="is for GPUs"):
        moecompile.compile(moe, weights="int4")
    with pytest.raises(InputError, match="there are: same, int8, int8-all, int4, fp8"):
        moecompile.compile(moe, weights="int3")
    # A function has no device before it is called: its weights are read as they are, with a warning.
    fast = moecompile.compile(lambda ids: moe(input_ids=ids).logits, weights="int4")
    with torch.no_grad(), pytest.warns(moecompile.FallbackWarning, match="CPU kernels have no int4 weights"):
        close(without_inductor(fast)(IDS), logits(moe))
    assert any("no int4" in note for note in moecompile.last_graphs(fast)[-1].notes)


def test_inference_mode_leaves_the_model_trainable() -> None:
    moe = plain()
    with torch.inference_mode():
        without_inductor(moecompile.compile(moe))(input_ids=IDS)
    moe.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        moe = plain()
        reference = logits(moe)
        close(logits(without_inductor(moecompile.compile(moe))), reference)
        torch.testing.assert_close(logits(moe), reference)


def test_a_fused_optimizer_survives_an_evaluation_between_steps() -> None:
    """Its moments are paired with the weights by memory."""

    def trained(evaluate: bool) -> dict[str, Tensor]:
        moe = plain()
        fast = without_inductor(moecompile.compile(moe))
        optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2, fused=True)
        for step in range(4):
            if evaluate and step == 2:
                close(logits(fast), logits(moe))
            optimizer.zero_grad()
            moe(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        return moe.state_dict()

    plainly = trained(False)
    for name, tensor in trained(True).items():
        torch.testing.assert_close(tensor, plainly[name], rtol=1e-4, atol=1e-4, msg=name)


def test_training_where_a_block_reads_a_view() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            moe = moecompile.convert(dense_model(), Contiguous(experts=4, shared=0, top_k=2))
            self.block = moe.model.layers[0].mlp
            self.block.router.weight.data = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))

        def forward(self, z: Tensor) -> Tensor:
            return self.block(z.t() * 1.5).sin()  # (T, D), its strides (1, T)

    def outputs(call: Any) -> tuple[Tensor, Tensor]:
        z = torch.randn(32, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = call(z)
        y.square().sum().backward()
        assert z.grad is not None
        return y.detach(), z.grad

    model = Turned()
    for ours, reference in zip(outputs(moecompile.compile(model)), outputs(model), strict=True):
        close(ours, reference)


def test_an_inline_ffn_is_rewritten_in_the_graph() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.LayerNorm(8)
            self.w1, self.w2, self.w3 = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.w2(nn.functional.silu(self.w1(h)) * self.w3(h))

    model, x = Inline().eval(), torch.randn(2, 3, 8)
    fast = moecompile.compile(model, plan=Contiguous(4, 0, 4), example_inputs=(x,), fullgraph=True)
    with torch.no_grad():
        close(without_inductor(fast)(x), model(x))
        half = without_inductor(moecompile.compile(model, plan=Contiguous(4, 0, 2), example_inputs=(x,), fullgraph=True))
        half(x)
    assert [layer["site"] for layer in moecompile.last_graphs(half)[0].layers] == ["moe_blocks.0"]


def test_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = calibrated()
    close(logits(without_inductor(moecompile.compile(moe, verify=True))), logits(moe))
    spoilt = copy.deepcopy(moe)
    spoilt.model.layers[1].mlp.place.copy_(spoilt.model.layers[1].mlp.place.flip(0))
    spoilt.model.layers[1].mlp.place[0] = spoilt.model.layers[1].mlp.place[1]
    with pytest.raises(ParityError, match=r"model\.layers\.1\.mlp"):
        logits(without_inductor(moecompile.compile(spoilt, verify=True)))
    right = cpu.moe_ffn
    monkeypatch.setattr(cpu, "moe_ffn", lambda *operands: right(*operands) + 0.1)
    if cpu.available() is None:
        with pytest.raises(ParityError, match=r"model\.layers\.0\.mlp.*differs from eager"):
            logits(without_inductor(moecompile.compile(moe, verify=True)))


def test_verification_of_whole_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the code around the layers does wrong: of rounded weights, and of a graph that is differentiated."""
    from moecompile.backend import Backend

    def spoilt(self: Backend, graph_module: Any, *_: Any) -> Any:
        def run(*args: Any) -> Any:
            return [leaf + 0.1 if leaf.is_floating_point() else leaf for leaf in graph_module(*args)]

        return run

    moe = calibrated()
    for options, inputs in (({"weights": "int8"}, {}), ({}, {"labels": IDS})):
        moe.train(bool(inputs))
        with torch.set_grad_enabled(bool(inputs)):
            without_inductor(moecompile.compile(moe, verify=True, **options))(input_ids=IDS, **inputs)
            with monkeypatch.context() as patched, pytest.raises(ParityError, match="outputs differ"):
                patched.setattr(Backend, "_lower", spoilt)
                without_inductor(moecompile.compile(moe, verify=True, **options))(input_ids=IDS, **inputs)


def test_verification_of_a_wrong_pass_with_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers agree on their own, and the graph of rounded weights is what is wrong."""
    from moecompile.passes import lower_cpu
    from moecompile.passes.match_experts import moe_nodes, set_operands

    right = lower_cpu.LowerCPU.__call__

    def wrong(self: Any, graph_module: Any) -> Any:
        result = right(self, graph_module)
        for node in moe_nodes(result.graph_module):
            set_operands(node, "wrong", bias=None)
        return result

    monkeypatch.setattr(lower_cpu.LowerCPU, "__call__", wrong)
    with pytest.raises(ParityError, match="the cause is outside of them"):
        logits(without_inductor(moecompile.compile(calibrated(), weights="int8", verify=True)))


def test_verification_under_autocast() -> None:
    """Gradients are float32, what they are computed of is not."""
    moe = plain().train()
    fast = moecompile.compile(moe, verify=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fast(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert moecompile.last_graphs(fast)[-1].training


def test_verification_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are right, the gradients twice what they should be; and a parameter that is written to stays what it was."""
    from moecompile.backend import Backend

    def doubled(self: Backend, graph_module: Any, *_: Any) -> Any:
        def twice(leaf: Any) -> Any:
            return leaf + (leaf - leaf.detach()) if leaf.requires_grad else leaf

        return lambda *args: [twice(leaf) for leaf in graph_module(*args)]

    moe = calibrated().train()
    right = without_inductor(moecompile.compile(moe, verify=True))
    right(input_ids=IDS[:, :-1], labels=IDS[:, 1:]).loss.backward()  # of other strides than a copy has
    assert moecompile.last_graphs(right)[-1].training
    assert not any("verify" in note for record in moecompile.last_graphs(right) for note in record.notes)
    with monkeypatch.context() as patched, pytest.raises(ParityError, match=r"gradient of model\.layers\.\d.* differs"):
        patched.setattr(Backend, "_lower", doubled)
        without_inductor(moecompile.compile(moe, verify=True))(input_ids=IDS, labels=IDS)

    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.5)
            return x * self.weight.detach() * self.other

    fading = Fading().train()
    without_inductor(moecompile.compile(fading, verify=True))(torch.ones(3)).sum().backward()
    assert fading.weight.tolist() == [0.5] * 3


def test_verification_says_what_it_cannot_compare() -> None:
    moe = dense_model(attention_dropout=0.5).train()
    fast = without_inductor(moecompile.compile(moe, verify=True))
    fast(input_ids=IDS, labels=IDS).loss.backward()
    assert any("random numbers" in note for note in moecompile.last_graphs(fast)[-1].notes)


def test_verification_excuses_a_choice_that_rounding_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second layer expert 1 leads expert 2 by less than what a tolerable difference of the first layer does."""
    if cpu.available() is not None:
        pytest.skip(cpu.available() or "")
    moe, seen = plain(), []
    hook = moe.model.layers[1].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().flatten(0, -2)))
    logits(moe)
    hook.remove()
    moe.model.layers[1].mlp.experts.down_proj.data *= 20  # so that a choice shows
    tokens = seen[0]  # (T, D), fewer than D: a row may have any scores
    wanted = torch.full((6, len(tokens)), -0.01)
    wanted[:3] = torch.tensor([[0.01], [3e-7], [-3e-7]])  # two are chosen
    inverse = torch.linalg.pinv(tokens.double())
    blind = torch.randn(32, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    blind -= inverse @ (tokens.double() @ blind)  # what it sees of the tokens is rounding alone
    rows = wanted.double() @ inverse.t()
    rows[1] += blind
    moe.model.layers[1].mlp.router.weight.data = rows.float()
    right, calls = cpu.moe_ffn, []

    def rounded(*operands: Any) -> Tensor:
        calls.append(operands)
        y = right(*operands)
        noise = 3e-7 * torch.randn(y.shape, generator=torch.Generator().manual_seed(len(y)))
        return y + noise if operands[5].data_ptr() == moe.model.layers[0].mlp.experts.gate_up_proj.data_ptr() else y

    monkeypatch.setattr(cpu, "moe_ffn", rounded)
    fast = without_inductor(moecompile.compile(moe, verify=True))
    assert (logits(fast) - logits(moe)).abs().max() > 1e-3
    assert calls and moecompile.last_graphs(fast)[-1].ties > 0


def test_verification_sees_behind_a_nan() -> None:
    nan, inf = float("nan"), float("inf")
    theirs = torch.tensor([[nan, 1.0], [inf, -inf]])
    assert largest_difference([theirs], [theirs.clone()]) == 0.0
    changes = (((0, 1), 1.5, 0.5), ((0, 0), 1.0, inf), ((0, 1), nan, inf), ((1, 0), -inf, inf), ((1, 1), 0.0, inf))
    for at, value, expected in changes:
        ours = theirs.clone()
        ours[at] = value
        assert largest_difference([ours], [theirs]) == expected
    assert largest_difference([theirs[:0]], [theirs[:0]]) == 0.0


def outputs_off(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Compiled graphs whose outputs are wrong, though no layer is."""
    from moecompile import backend

    right = backend.through_inductor

    def wrong(*arguments: Any) -> Any:
        compiled = right(*arguments)
        return lambda *args: tuple(out + by if out.is_floating_point() else out for out in compiled(*args))

    monkeypatch.setattr(backend, "through_inductor", wrong)


def test_verification_finds_what_is_wrong_outside_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs_off(monkeypatch, 0.01)
    with pytest.raises(ParityError, match="the cause is outside of them"):
        logits(without_inductor(moecompile.compile(calibrated(), verify=True)))


def test_verification_excuses_only_the_sequences_with_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    from moecompile import backend, checking

    right, layers = backend.through_inductor, checking._check_layers
    wrong_rows = slice(0, 1)

    def wrong(*arguments: Any) -> Any:
        compiled = right(*arguments)

        def run(*args: Any) -> Any:
            outs = compiled(*args)
            for out in outs:
                if out.is_floating_point() and out.dim() and len(out) == len(IDS):
                    out[wrong_rows] += 1.0
            return outs

        return run

    def tied(record: Any, args: Any, near: bool = False) -> tuple[Any, list[Tensor]]:
        record.ties += 1
        return layers(record, args, near)[0], [torch.arange(IDS.numel()) == 3]  # a token of the first sequence

    monkeypatch.setattr(backend, "through_inductor", wrong)
    monkeypatch.setattr(checking, "_check_layers", tied)
    moe = calibrated()
    logits(without_inductor(moecompile.compile(moe, verify=True)))
    wrong_rows = slice(1, 2)
    with pytest.raises(ParityError, match="the cause is outside of them"):
        logits(without_inductor(moecompile.compile(moe, verify=True)))


def test_verification_in_bfloat16_finds_what_is_wrong_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are compared as they were made, in float32: rounded scores would seem to turn some, and excuse all."""
    outputs_off(monkeypatch, 1.0)
    moe = plain()
    for block in moecompile.moe_blocks(moe).values():  # scores so close that many are level in bfloat16
        block.router.weight.data = block.router.weight[:1] + 0.01 * block.router.weight
    with pytest.raises(ParityError, match="the cause is outside of them"):
        logits(without_inductor(moecompile.compile(moe.to(torch.bfloat16), verify=True)))


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = calibrated()
    reference = logits(without_inductor(moecompile.compile(moe)))
    torch._dynamo.reset()
    monkeypatch.setattr(cpu, "unsupported", lambda activation: "there is no working C++ compiler")
    fast = without_inductor(moecompile.compile(moe))
    close(logits(fast), reference)
    notes = [note for note in moecompile.last_graphs(fast)[-1].notes if note.startswith("lower_cpu")]
    assert len(notes) == 1 and "model.layers.0.mlp" in notes[0] and "and 1 more" in notes[0]
    assert "no working C++ compiler" in notes[0]
    with pytest.raises(CompileError, match=r"model.layers.0.mlp: node .*no working C\+\+ compiler"):
        logits(moecompile.compile(moe, fullgraph=True))


def test_on_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """Neither our kernels nor Inductor's: correct eager code, and one warning for each."""
    script = """
import torch, warnings
from compiling import calibrated, tokens
import moecompile
moe = calibrated()
fast, prompt, options = moecompile.compile(moe), tokens(2, 7), {"max_new_tokens": 6, "do_sample": False}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert torch.equal(moe.generate(prompt, **options), fast.generate(prompt, **options))
told = [str(w.message) for w in told if issubclass(w.category, moecompile.FallbackWarning)]
assert len(told) == 2 and "plain torch operators" in told[0] and "graphs run in eager mode" in told[1], told
assert len(moecompile.last_graphs(fast)) == 2
"""
    environment = os.environ | {
        "CXX": "/nowhere/c++", "PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(Path(__file__).parent),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_caches_on_disk_know_the_code_of_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    from moecompile import backend

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    moe, hits = plain(dense_model(num_hidden_layers=1)), []
    for key in ("this", "this", "that"):
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "operators_key", lambda key=key: key)
        before = counters["aot_autograd"]["autograd_cache_hit"]
        close(logits(moecompile.compile(moe)), logits(moe))
        hits.append(counters["aot_autograd"]["autograd_cache_hit"] - before)
    assert hits == [0, 1, 0]


def test_calls_inside_a_compiled_function() -> None:
    fast = moecompile.compile(plain())

    @torch.compile(backend="eager", fullgraph=True)
    def outer(ids: Tensor) -> Tensor:
        return fast(input_ids=ids).logits * 2

    with torch.no_grad():
        close(outer(IDS), logits(compilation_of(fast).target) * 2)


def test_the_garbage_collector_runs_again_after_compiling() -> None:
    states: list[bool] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    fast = without_inductor(moecompile.compile(Net()))
    compilation = compilation_of(fast)
    compilation.backend._compile = lambda graph_module, inputs: states.append(gc.isenabled()) or graph_module.forward  # type: ignore[method-assign]
    close(fast(torch.ones(3)), torch.full((3,), 2.0))
    assert states == [False] and gc.isenabled()

    def failing(graph_module: Any, inputs: Any) -> Any:
        raise CompileError("no")

    compilation.backend._compile = failing  # type: ignore[method-assign]
    with pytest.raises(CompileError):
        fast(torch.ones(3, dtype=torch.float64))
    assert gc.isenabled()
    gc.disable()
    try:
        compilation.backend._compile = lambda graph_module, inputs: graph_module.forward  # type: ignore[method-assign]
        fast(torch.ones(3, dtype=torch.float16))
        assert not gc.isenabled()  # it was off before
    finally:
        gc.enable()
