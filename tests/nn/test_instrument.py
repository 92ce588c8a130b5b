"""Residual additions that models write inline: which are found, and that only the modules' names change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import helpers.inline_cases as cases
import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.nn import ResidualAdd
from gradprobe.nn.residual import InlineAdd

IMAGES = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()
TOKENS = torch.linspace(-2, 2, 4 * 5 * 8).reshape(4, 5, 8).sin()

# Name: model, batch, names of the residual adds.
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str]]] = {
    "torchvision-basic": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), cases.BasicBlock(8, 8), cases.BasicBlock(8, 4, stride=2)),
        IMAGES,
        ["1.bn2+", "2.bn2+"],
    ),
    "torchvision-bottleneck": (
        lambda: nn.Sequential(cases.Bottleneck(3, 4), cases.Bottleneck(16, 4)),
        IMAGES,
        ["0.bn3+", "1.bn3+"],
    ),
    "timm": (lambda: cases.TimmViT(8), TOKENS, [f"blocks.{k}.{n}+" for k in (0, 1) for n in ("attn", "mlp")]),
    "transformers": (
        lambda: cases.Decoder(8),
        TOKENS,
        [f"layers.{k}.{n}+" for k in (0, 1) for n in ("self_attn", "mlp")],
    ),
    "bert": (lambda: cases.BertLayer(8), TOKENS, ["attention_output.dense+", "output.dense+"]),
    "parallel": (lambda: cases.Parallel(8), TOKENS, ["attn+"]),
    "torch-norm-first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True),
        TOKENS,
        ["self_attn+", "linear2+"],
    ),
    "torch-norm-last": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        TOKENS,
        [f"layers.{k}.{n}+" for k in (0, 1) for n in ("self_attn", "linear2")],
    ),
    "fx": (lambda: cases.traced(8), TOKENS, ["attention_output+", "output+"]),
    "densenet": (lambda: cases.DenseNet(), IMAGES, []),
    "plain": (lambda: cases.Positions(8), TOKENS, []),
    "root": (lambda: cases.Root(8), TOKENS, ["a+", "b+", "c+"]),
    "loop": (lambda: cases.Loop(8), TOKENS, ["layers+"]),
    "used-twice": (lambda: cases.Twice(8), TOKENS, ["block.attn+", "block.mlp+"]),
    "data-dependent": (lambda: cases.DataDependent(8), TOKENS, ["b+"]),
    "methods": (lambda: cases.Methods(8), TOKENS, ["a+", "_Methods__b+", "c+"]),
    "decorated": (lambda: cases.Decorated(8), TOKENS, ["layer+"]),
    "function-outside": (lambda: cases.OutsideFunction(8), TOKENS, ["layer+"]),
    "closure-and-super": (lambda: cases.closure(8), TOKENS, ["layer+"]),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def first_tensor(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else first_tensor(output[0])


def trained(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Returns outputs in both modes, gradients and weights of a few training steps."""
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        torch.manual_seed(step)
        model.train()
        optimizer.zero_grad()
        output = first_tensor(model(batch.clone()))
        output.square().mean().backward()
        optimizer.step()
        seen += [output.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.eval()
        with torch.no_grad():
            seen.append(first_tensor(model(batch.clone())))
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def are_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_residual_adds_are_found_and_measured(name: str) -> None:
    _, batch, expected = MODELS[name]
    model = built(name)
    report = gradprobe.instrument(model, batch)
    assert sorted(report.junctions) == sorted(expected)
    assert report.unseen == {}
    probe = gradprobe.attach(model)
    first_tensor(model(batch.clone())).square().mean().backward()
    probe.step()
    junctions = probe.latest().junctions
    assert set(junctions) == set(expected)
    assert all(junction.shortcut.norm > 0 for junction in junctions.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("probed", [False, True], ids=["alone", "probed"])
def test_numbers_are_the_same_bit_for_bit(name: str, probed: bool) -> None:
    batch = MODELS[name][1]
    expected = trained(built(name), batch)
    model = built(name)
    gradprobe.instrument(model, batch)
    if probed:
        gradprobe.attach(model)
    assert are_equal(trained(model, batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_undo_leaves_no_trace(name: str) -> None:
    model = built(name)
    before = {id(module): (type(module), set(vars(module)), list(module._modules)) for module in model.modules()}
    text = repr(model)
    with gradprobe.instrument(model, MODELS[name][1]) as report:
        assert [key for key in model.state_dict() if "+" in key] == []
        assert all(type(module) is before[id(module)][0] for module in model.modules() if id(module) in before)
    after = {id(module): (type(module), set(vars(module)), list(module._modules)) for module in model.modules()}
    assert after == before
    assert repr(model) == text
    report.undo()
    gradprobe.instrument(model, MODELS[name][1])


def test_x_is_the_shortcut_and_f_the_branch() -> None:
    model = built("timm")
    gradprobe.instrument(model, TOKENS)
    probe = gradprobe.attach(model)
    block = model.blocks[0]
    stream = model.embed(TOKENS) + model.position
    attended = block.attn(block.norm1(stream))
    model(TOKENS).square().mean().backward()
    probe.step()
    junction = probe.latest().junctions["blocks.0.attn+"]
    assert junction.x.norm == pytest.approx(stream.norm().item(), rel=1e-5)
    assert junction.f.norm == pytest.approx(attended.norm().item(), rel=1e-5)
    assert 0 < junction.shortcut_share < 1


def test_a_projected_shortcut_is_the_shortcut() -> None:
    model = built("torchvision-bottleneck")
    gradprobe.instrument(model, IMAGES)
    probe = gradprobe.attach(model)
    shortcut = model[0].downsample(IMAGES)
    model(IMAGES).sum().backward()
    probe.step()
    assert probe.latest().junctions["0.bn3+"].x.norm == pytest.approx(shortcut.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (cases.Chain, "is a container that would run one more child along with the others"),
        (cases.OverChildren, "iterates over its children in forward, which would run one more child too"),
        (cases.Unclear, "its operands come through 2 and 3 layers: neither is clearly the shortcut"),
    ],
)
def test_an_addition_left_alone_is_reported(block: Callable[[int], nn.Module], reason: str) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), block(8), nn.Linear(8, 1))

    model = net()
    report = gradprobe.instrument(model, TOKENS)
    assert report.junctions == ()
    assert report.unseen == {"1": reason}
    assert report.blocks == ("1",)
    assert str(report) == f"1  unseen: {reason}"
    assert are_equal(trained(model, TOKENS), trained(net(), TOKENS))


def test_an_unreadable_block_is_measured_at_its_boundaries() -> None:
    namespace: dict[str, type[nn.Module]] = {"Base": cases.TimmBlock}
    exec("class Hidden(Base):\n    def forward(self, x):\n        return x + self.mlp(self.norm2(x))", namespace)
    scripted, compiled = torch.jit.script(cases.TimmBlock(8)), torch.compile(cases.TimmBlock(8), backend="eager")
    model = nn.Sequential(nn.Linear(8, 8), namespace["Hidden"](8), scripted, compiled)
    report = gradprobe.instrument(model, TOKENS)
    assert report.unseen == {
        "1": "has no readable source",
        "2": "is scripted and takes no hooks",
        "3": "is compiled",
    }
    assert report.blocks == ("1", "3")
    probe = gradprobe.attach(model, activations=[*report.blocks])
    model(TOKENS).sum().backward()
    probe.step()
    assert {"1", "3"} == set(probe.latest().activations)


def test_a_source_that_differs_from_the_code_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from torch.nn import Linear\n"
        "class Net(Linear):\n  def forward(self, x):\n    return x + super().forward(x).relu(){}\n"
    )
    path = tmp_path / "changing.py"
    path.write_text(text.format(""))
    monkeypatch.syspath_prepend(tmp_path)
    model = import_module("changing").Net(2, 2)
    path.write_text(text.format(" + 1"))
    assert gradprobe.instrument(model, TOKENS[..., :2]).unseen == {"": "runs code that differs from its source"}


def test_an_inline_add_broadcasts_and_adds_other_operands() -> None:
    added = InlineAdd(shortcut_first=True, written="+")
    assert added(2, 3) == 5
    assert added(TOKENS, TOKENS[..., :1]).shape == TOKENS.shape
    in_place = InlineAdd(shortcut_first=False, written="+=")
    target = torch.ones(2, 3)
    assert in_place(x=torch.ones(3), f=target) is target
    assert target.sum() == 12


@pytest.mark.parametrize("written", ["+", "+=", "add_"])
@pytest.mark.parametrize("shortcut_first", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_f"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (0, 2)], ids=lambda kind: ("nchw", "nhwc", "slice")[kind]
)
def test_a_probe_changes_no_strides(of_x: int, of_f: int, shortcut_first: bool, written: str) -> None:
    def operand(kind: int) -> torch.Tensor:
        tensor = torch.randn(2, 3, 4, 5, requires_grad=True) * 1
        if kind == 2:
            return (torch.randn(2, 3, 4, 10, requires_grad=True) * 1)[..., ::2]
        return tensor.contiguous(memory_format=torch.channels_last) if kind else tensor

    joint = InlineAdd(shortcut_first, written)
    model = nn.Sequential(nn.Linear(1, 1), joint)
    torch.manual_seed(0)
    x, f = operand(of_x), operand(of_f)
    expected = joint(x, f)
    torch.manual_seed(0)
    x, f = operand(of_x), operand(of_f)
    probe = gradprobe.attach(model)
    y = joint(x, f)
    assert (y.stride(), y.tolist()) == (expected.stride(), expected.tolist())
    (y.sum() + model[0].weight.sum()).backward()
    probe.step()
    assert probe.latest().junctions["1"].y.norm == pytest.approx(y.norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["torchvision-basic", "torchvision-bottleneck", "timm", "transformers"])
def test_mixed_precision_rounds_as_before(name: str) -> None:
    batch = MODELS[name][1]

    def outputs(instrumented: bool) -> list[torch.Tensor]:
        model = built(name)
        if instrumented:
            gradprobe.instrument(model, batch)
            gradprobe.attach(model)
        with torch.autocast("cpu", torch.bfloat16):
            return trained(model, batch)

    assert are_equal(outputs(True), outputs(False))


def test_options_of_a_forward_still_work() -> None:
    model = cases.DecoderLayer(8)
    mask = torch.full((5, 5), -1e9).triu(1)
    expected = [model(TOKENS), model(TOKENS, mask), model(TOKENS, attention_mask=mask, output_attentions=True)]
    gradprobe.instrument(model, TOKENS)
    seen = [model(TOKENS), model(TOKENS, mask), model(TOKENS, attention_mask=mask, output_attentions=True)]
    assert [len(output) for output in seen] == [len(output) for output in expected] == [1, 1, 2]
    assert all(torch.equal(a, b) for x, y in zip(seen, expected, strict=True) for a, b in zip(x, y, strict=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention'"):
        model(TOKENS, attention=mask)


def test_attributes_still_decide_at_run_time() -> None:
    model = built("torch-norm-first")
    reference = built("torch-norm-first")
    gradprobe.instrument(model, TOKENS)
    for net in (model, reference):
        net.norm_first = False
    assert are_equal(trained(model, TOKENS), trained(reference, TOKENS))


def test_hooks_and_weights_stay() -> None:
    model = built("torchvision-basic")
    calls = []
    model[1].register_forward_hook(lambda module, args, output: calls.append(module))
    parameters = list(model.parameters())
    gradprobe.instrument(model, IMAGES)
    calls.clear()
    model(IMAGES)
    assert calls == [model[1]]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model[1], cases.BasicBlock)
    assert isinstance(getattr(model[1], "bn2+"), ResidualAdd)


@pytest.mark.parametrize("name", ["torchvision-basic", "transformers", "methods", "function-outside"])
def test_a_deep_copy_is_instrumented_and_independent(name: str) -> None:
    batch = MODELS[name][1]
    model = built(name)
    report = gradprobe.instrument(model, batch)
    model.eval()(batch.clone())
    twin = copy.deepcopy(model).train()
    report.undo()
    probe = gradprobe.attach(twin)
    assert are_equal(trained(twin, batch), trained(built(name), batch))
    probe.step()
    assert set(probe.latest().junctions) == set(MODELS[name][2])


def test_pickles_of_model_and_state() -> None:
    model = built("timm")
    gradprobe.instrument(model, TOKENS)
    plain = built("timm")
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    loaded = pickle.loads(pickle.dumps(model.eval()))
    plain.eval()
    assert torch.equal(loaded(TOKENS), plain(TOKENS))
    assert len(gradprobe.instrument(loaded, TOKENS).junctions) == 4


def test_a_residual_add_pickled_by_an_earlier_version_loads() -> None:
    module = ResidualAdd()
    module.tap = None  # the observer's former name, in the state of every pickle
    loaded = pickle.loads(pickle.dumps(module))
    assert torch.equal(loaded(TOKENS, TOKENS), 2 * TOKENS)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision-basic",
        "transformers",
        "function-outside",
        pytest.param("timm", marks=pytest.mark.soak),
        pytest.param("torch-norm-last", marks=pytest.mark.soak),
    ],
)
def test_it_compiles_without_a_graph_break(name: str) -> None:
    batch = MODELS[name][1]
    model = built(name)
    torch.manual_seed(1)
    expected = first_tensor(model(batch))
    model = built(name)
    gradprobe.instrument(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    assert torch.allclose(first_tensor(compiled(batch)), expected, atol=1e-6)


def test_a_model_without_residual_additions_says_so() -> None:
    assert str(gradprobe.instrument(cases.DenseNet(), IMAGES)) == "no residual additions found"


def compiled_in_place() -> nn.Module:
    model = nn.Linear(2, 2)
    model.compile()
    return model


def instrumented() -> nn.Module:
    model = cases.TimmBlock(8)
    gradprobe.instrument(model, TOKENS)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [nn.Linear(2, 2)], "model: needed a torch.nn.Module, got list"),
        (
            lambda: torch.jit.script(nn.Linear(2, 2)),
            "model: needed one that runs as Python .* got a compiled or scripted",
        ),
        (lambda: torch.compile(nn.Linear(2, 2)), "model: needed one that runs as Python .* got a compiled or scripted"),
        (compiled_in_place, "model: needed one that runs as Python .* got a compiled or scripted"),
        (instrumented, "model: needed one that is not instrumented yet, got an instrumented one: undo it"),
    ],
    ids=["list", "scripted", "compiled", "compiled-in-place", "instrumented"],
)
def test_bad_models(make: Callable[[], object], message: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=message):
        gradprobe.instrument(make())
