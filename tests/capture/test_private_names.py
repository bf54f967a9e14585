"""Private names of torch: each exists and works as ``private`` uses it, and none is used elsewhere.

Runs alone, in seconds: the first thing to run under another torch.
"""

from __future__ import annotations

import ast
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rematplan.scheduler.costs.meters import peak
from rematplan.scheduler.torch_layer import private
from rematplan.scheduler.torch_layer.layouts import equal_bits
from tests.shared.helpers import ROOT

PRIVATE = ROOT / "scheduler/torch_layer/private.py"

# Private names that are not torch's, or that private.py says are stable.
ALLOWED = {
    **dict.fromkeys((*vars(nn.Module()), "_compiled_call_impl", "_call_impl"), "nn.Module's, stable in fact"),
    "_replace": "named tuples': Python's",
    "_inst": "the generator behind random's functions: Python's",
    "_rand": "the generator behind numpy.random's functions: NumPy's",
    "_getframe": "sys's: Python's",
    "_abc_impl": "of abstract classes: Python's",
    "_rematplan_own": "ours, a slot of planned models",
    "_rematplan_plain": "ours, of planned models",
    "_rematplan_plans": "ours, a slot of planned models",
}


# ---- nowhere else ----------------------------------------------------------------------------------------


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _root(node: ast.expr) -> tuple[str, list[str]]:
    """The name that a chain of attributes begins with, and the attributes."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else ""), names


def _own(tree: ast.AST) -> Iterator[str]:
    """Private names that a file defines: functions, classes, fields, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node)[0] == "self":
            yield node.attr


def _found(source: str, own: set[str]) -> Iterator[str]:  # noqa: C901 - one case per kind of syntax
    """Private names of torch, and patches of it, that a file uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for name in ((node.module or "").split(".") + [each.name for each in node.names])[1:]:
                if _is_private(name):
                    yield f"{node.lineno}: from {node.module} import {name}"
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.startswith("torch.") and any(map(_is_private, each.name.split("."))):
                    yield f"{node.lineno}: import {each.name}"
        elif isinstance(node, ast.Attribute):
            root, names = _root(node)
            known = ALLOWED if root == "torch" else {*ALLOWED, *own}
            op = root == "_aten" or names[:2] == ["ops", "aten"]  # the name of an op
            if _is_private(node.attr) and root not in ("self", "cls") and node.attr not in known and not op:
                yield f"{node.lineno}: {ast.unparse(node)}"
            if not isinstance(node.ctx, ast.Load) and root in ("torch", "Tensor", "nn"):
                yield f"{node.lineno}: {ast.unparse(node)} is patched"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            argument = node.args[1] if node.func.id in ("getattr", "hasattr", "setattr") else None
            value = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(value, str) and _is_private(value) and value not in {*ALLOWED, *own}:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch._"):
            yield f"{node.lineno}: {node.value!r}"


def test_no_other_file_names_what_is_private_in_torch_or_patches_it() -> None:
    sources = {
        path: path.read_text(encoding="utf-8")
        for package in ("scheduler", "executors")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != PRIVATE
    }
    own = {name for source in sources.values() for name in _own(ast.parse(source))}
    found = [
        f"{path.relative_to(ROOT)}:{use}" for path, source in sources.items() for use in _found(source, own)
    ]
    assert not found, "name it in scheduler/torch_layer/private.py, with its reason:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._guards import detect_fake_mode",
        "from torch.utils import _pytree as pytree",
        "import torch._dynamo",
        "torch._C._current_graph_task_id()",
        "x = tensor._version",
        "tensor.untyped_storage()._cdata",
        "getattr(op, '_schema', None)",
        "'torch._dynamo' in sys.modules",
        "torch.autograd.grad = noted",
        "Tensor.register_hook = noted",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(_found(source, set()))


@pytest.mark.parametrize(
    "source",
    ["self._found", "module._forward_hooks", "torch.ops.aten._softmax", "random._inst", "x.grad = None"],
)
def test_the_search_passes_by(source: str) -> None:
    assert not list(_found(source, set()))


# ---- tensors and storages --------------------------------------------------------------------------------


def test_versions_rise_with_changes_in_place_of_any_view() -> None:
    tensor = torch.zeros(4)
    before = private.version_of(tensor)
    tensor[:2].add_(1)
    assert private.version_of(tensor) == before + 1
    tensor.data.add_(1)  # which autograd is not told of
    assert private.version_of(tensor) == before + 1
    with private.versions_kept((tensor,)):
        tensor.add_(1)
    assert private.version_of(tensor) == before + 1


@pytest.mark.parametrize("mode", [nullcontext, private.FakeTensorMode])
def test_a_storage_is_one_for_all_views_and_another_for_copies(mode: Callable[[], Any]) -> None:
    with mode():
        tensor = torch.zeros(4)
        key = private.storage_id(tensor.untyped_storage())
        assert private.storage_id(tensor[1:].detach().untyped_storage()) == key
        copy = tensor.clone()
        assert private.storage_id(copy.untyped_storage()) != key


def test_views_negated_and_conjugated_bits_and_parts_of_sparse_tensors() -> None:
    tensor = torch.randn(3, dtype=torch.complex64)
    assert private.is_view(tensor[1:])
    assert not private.is_view(tensor)
    flipped = tensor.conj().imag
    assert flipped.is_neg()
    assert equal_bits(private.neg_view(flipped), tensor.imag)
    other = tensor[:]
    private.set_conj_and_neg(other, True, False)
    assert equal_bits(other, tensor.conj())
    assert other.is_conj()
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2), (3,), check_invariants=True)
    assert not sparse.is_coalesced()
    indices, values = private.coo_parts(sparse)
    assert indices.tolist() == [[1, 1]]
    assert values.tolist() == [1.0, 1.0]


# ---- autograd --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
def test_a_backward_has_a_number_says_whether_it_keeps_its_graph_and_calls_back(retain: bool) -> None:
    leaf, seen = torch.ones(1, requires_grad=True), list[Any]()
    product = leaf * 2

    def hook(_: Tensor) -> None:
        seen.append((private.graph_task(), private.keeps_graph()))
        private.at_end_of_backward(lambda: seen.append(leaf.grad))

    product.register_hook(hook)
    assert private.graph_task() == -1
    product.backward(retain_graph=retain)
    (task, keeps), grad = seen
    assert (task >= 0, keeps) == (True, retain)
    assert grad is leaf.grad
    assert grad is not None


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_custom_functions_those_of_libraries_and_those_of_hooks_are_told_apart() -> None:
    leaf = torch.ones(1, requires_grad=True)
    assert private.function_of_node(_Double.apply(leaf).grad_fn) is _Double
    assert not private.is_of_library_op(_Double)

    @torch.library.custom_op("rematplan_names::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_autograd(lambda _, grad: grad * 2)
    assert private.is_of_library_op(private.function_of_node(double(leaf).grad_fn))
    layer = nn.Linear(1, 1)
    layer.register_full_backward_hook(lambda *_: None)
    assert private.function_of_node(layer(leaf).grad_fn) is private.BackwardHookFunction


def test_the_hooks_of_a_gradient_are_silent_once_their_dicts_are_empty() -> None:
    leaf, seen = torch.ones(1, requires_grad=True), list[int]()
    assert private.hooks_of_gradients(leaf) == []
    leaf.register_hook(lambda _: seen.append(1))
    leaf.register_post_accumulate_grad_hook(lambda _: seen.append(2))
    (leaf * 2).backward()
    assert seen == [1, 2]
    for hooks in private.hooks_of_gradients(leaf):
        hooks.clear()
    (leaf * 2).backward()
    assert seen == [1, 2]


def test_hooks_for_saved_tensors_that_nobody_left_are_left() -> None:
    def same(x: Any) -> Any:
        return x

    assert private.saved_tensors_hooks() is None
    assert private.saved_tensors_refusal() is None
    with torch.autograd.graph.saved_tensors_hooks(same, same):
        before = private.saved_tensors_hooks()
        assert before[0] is same
        torch.autograd.graph.saved_tensors_hooks(id, same).__enter__()
        private.set_saved_tensors_hooks(before, None)
        assert private.saved_tensors_hooks()[0] is same
    with torch.autograd.graph.disable_saved_tensors_hooks("refused"):
        assert private.saved_tensors_refusal() == "refused"
        private.set_saved_tensors_hooks(None, None)
        assert private.saved_tensors_refusal() is None
        private.set_saved_tensors_hooks(None, "refused")


def test_the_level_of_forward_mode_is_left() -> None:
    assert private.dual_level() == -1
    torch.autograd.forward_ad.dual_level().__enter__()
    assert private.dual_level() == 0
    private.leave_dual_level()
    assert private.dual_level() == -1
    with torch.autograd.forward_ad.dual_level():  # it can be entered
        pass


# ---- modes and transforms --------------------------------------------------------------------------------


class _Noting(private.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class _Functions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_of_dispatch_are_seen_hidden_from_and_left() -> None:
    with _Noting() as noting:
        assert private.dispatch_modes() == [noting]
        torch.ones(1).add(1)
        assert torch.ops.aten.add.Tensor in noting.ops
        count = len(noting.ops)
        with private.modes_disabled():
            torch.ones(1).add(1)
        assert len(noting.ops) == count
        other = _Noting()
        other.__enter__()
        private.pop_dispatch_mode(other)
        assert private.dispatch_modes() == [noting]
    assert private.dispatch_modes() == []


def test_modes_of_functions_are_seen_hidden_from_and_left() -> None:
    with _Functions() as mode:
        assert private.function_mode_stack() == [mode]
        with private.torch_functions_disabled():
            torch.ones(1).add(1)
        assert not mode.functions
        _Functions().__enter__()
        private.pop_function_modes(1)
        assert private.function_mode_stack() == [mode]
    with torch.device("meta"):
        (context,) = private.function_mode_stack()
        assert isinstance(context, private.DeviceContext)
        assert context.device.type == "meta"
    assert private.default_device_context() is None
    torch.set_default_device("meta")
    try:
        assert private.default_device_context().device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_autocast_is_off_and_inference_mode_is_on_while_asked() -> None:
    factor = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (factor @ factor).dtype == torch.bfloat16
        with private.autocast_disabled():
            assert (factor @ factor).dtype == torch.float32
    guard = private.inference_mode_entered(True)
    assert torch.is_inference_mode_enabled()
    del guard
    assert not torch.is_inference_mode_enabled()


def test_functions_of_torch_func_are_counted_and_left() -> None:
    depths: list[int] = []

    def inner(x: Tensor) -> Tensor:
        depths.append(private.transform_depth())
        return x * 2

    torch.vmap(inner)(torch.ones(2))
    assert (depths, private.transform_depth()) == ([1], 0)
    torch._C._functorch._vmap_increment_nesting(2, "error")
    assert private.transform_depth() == 1
    private.leave_transforms(0)
    assert private.transform_depth() == 0


# ---- ops and graphs --------------------------------------------------------------------------------------


def test_ops_have_schemas_and_composite_ones_a_kernel_of_other_ops() -> None:
    aten = torch.ops.aten
    assert private.schema_of(aten.add_.Tensor).is_mutable
    assert not private.schema_of(aten.add.Tensor).is_mutable
    assert [a.name for a in private.schema_of(aten.mm.default).arguments] == ["self", "mat2"]
    assert private.schema_of(len) is None
    assert private.composite_kernel(aten.mm.default) is None
    assert private.composite_kernel(len) is None
    kernel = private.composite_kernel(aten.matmul.default)
    assert kernel is not None
    factor = torch.randn(2, 2)
    assert equal_bits(kernel(factor, factor), factor @ factor)
    assert isinstance(aten.mm.default, private.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, private.HigherOrderOperator)


class _Transforms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.sin)(x)


def test_an_exported_graph_shows_transforms_and_gives_its_codegen() -> None:
    graph = torch.export.export(_Transforms(), (torch.ones(2),), strict=False).graph
    assert any(private.is_transform(node.target) for node in graph.nodes)
    assert not private.is_transform(torch.ops.aten.sin.default)
    module = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    copy, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
    copy.output(copy.graph_copy(module.graph, copies))
    copy.set_codegen(private.codegen_of(module.graph))
    given = torch.randn(1, 2)
    assert equal_bits(torch.fx.GraphModule(module, copy)(given), module(given))


def test_tensors_without_data_are_known_and_so_is_their_mode() -> None:
    assert private.detect_fake_mode() is None
    with private.FakeTensorMode() as mode:
        tensor = torch.ones(2)
        assert isinstance(tensor, private.FakeTensor)
        assert private.detect_fake_mode() is mode
        with pytest.raises(private.DataDependentOutputException):
            tensor.sum().item()
        with pytest.raises(private.DynamicOutputShapeException):
            tensor.nonzero()


def test_pytree_opens_what_libraries_have_registered() -> None:
    leaves, spec = private.pytree.tree_flatten({"a": (1, [2]), "b": OrderedDict(c=3)})
    assert leaves == [1, 2, 3]
    assert private.pytree.tree_unflatten(leaves, spec) == {"a": (1, [2]), "b": OrderedDict(c=3)}


# ---- what of the process chooses kernels -----------------------------------------------------------------

BACKENDS = torch.backends


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (private.flash_attention_enabled, BACKENDS.cuda.enable_flash_sdp),
        (private.mem_efficient_attention_enabled, BACKENDS.cuda.enable_mem_efficient_sdp),
        (private.math_attention_enabled, BACKENDS.cuda.enable_math_sdp),
        (private.cudnn_attention_enabled, BACKENDS.cuda.enable_cudnn_sdp),
        (private.onednn_enabled, private.set_onednn_enabled),
        (private.cudnn_enabled, private.set_cudnn_enabled),
        (private.cudnn_benchmark, private.set_cudnn_benchmark),
        (private.cudnn_deterministic, private.set_cudnn_deterministic),
        (private.cudnn_tf32, private.set_cudnn_tf32),
    ],
)
def test_a_switch_is_read_as_it_was_set(read: Callable[[], bool], write: Callable[[bool], Any]) -> None:
    before = read()
    try:
        write(not before)
        assert read() is not before
    finally:
        write(before)


def test_switches_are_those_of_torch_backends() -> None:
    assert private.onednn_enabled() is bool(BACKENDS.mkldnn.enabled)
    assert private.cudnn_enabled() == BACKENDS.cudnn.enabled
    assert private.cudnn_benchmark() == BACKENDS.cudnn.benchmark
    assert private.cudnn_deterministic() == BACKENDS.cudnn.deterministic
    assert private.cudnn_tf32() == BACKENDS.cudnn.allow_tf32
    assert private.quantized_engine() in range(10)
    private.set_sdp_priority(private.sdp_priority())
    for read, name in ((private.reduced_fp16, "fp16"), (private.reduced_bf16, "bf16")):
        attribute = f"allow_{name}_reduced_precision_reduction"
        before = read()
        try:
            setattr(BACKENDS.cuda.matmul, attribute, False)
            assert read() != before  # a bool, or a pair with whether sums are split
        finally:
            setattr(BACKENDS.cuda.matmul, attribute, True)
        assert read() == before


def test_the_precision_of_float32_is_read_and_set_by_backend_and_op() -> None:
    before = private.fp32_precision("mkldnn", "matmul")
    try:
        private.set_fp32_precision("mkldnn", "matmul", "bf16")
        assert private.fp32_precision("mkldnn", "matmul") == "bf16"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    finally:
        private.set_fp32_precision("mkldnn", "matmul", before)
    assert isinstance(private.fp32_precision("generic", "all"), str)


# ---- the compiler ----------------------------------------------------------------------------------------


def test_compiled_functions_are_known_and_marked_ones_are_as_disabled_ones() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    assert not private.is_compiled_function(function)
    assert private.is_compiled_function(torch.compile(function, backend="eager"))
    assert private.dynamo_is_loaded()  # by now
    names = {
        name for name in vars(torch.compiler.disable(function, reason="as said")) if "dynamo_disable" in name
    }
    marked = private.never_compiled(function, "as said")
    assert marked is function
    assert {name for name in vars(function) if "dynamo_disable" in name} <= names


# ---- memory and devices ----------------------------------------------------------------------------------


def _multiplies() -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    for _ in range(3):
        torch.nn.functional.gelu(weight @ weight).sum().backward()


def _attends() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer(torch.randn(2, 8, 16)).sum().backward()


def _convolves() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    layers(torch.randn(2, 3, 16, 16)).sum().backward()


def _makes_nothing() -> None:
    pass


@pytest.mark.parametrize("work", [_multiplies, _attends, _convolves, _makes_nothing])
def test_both_profilers_give_the_same_bytes_in_the_same_order(work: Callable[[], None]) -> None:
    """What ``costs.peak`` counts does not change on the day that torch has the older one no more."""
    work()  # what is made once
    found = []
    for start in (private.legacy_memory_events, peak.public_memory_events):
        torch.manual_seed(0)
        assert not private.profiler_is_on()
        stop = start()
        assert stop is not None
        assert private.profiler_is_on()
        with torch.profiler.record_function("mark"):
            work()
        events = stop()
        assert not private.profiler_is_on()
        found.append(
            (
                [size for kind, _, size in events if kind == "memory_alloc"],
                [name for kind, name, _ in events if kind == "push"],
                sum((kind == "push") - (kind == "pop") for kind, *_ in events),
            )
        )
    assert found[0][:2] == found[1][:2]
    assert "mark" in found[0][1]
    assert found[1][2] == 0


def test_bytes_are_counted_alike_where_torch_has_no_older_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 32, requires_grad=True)

    def step(mark: Callable[[], None]) -> Tensor:
        product = torch.nn.functional.gelu(weight @ weight)
        mark()
        loss = product.sum()
        del product
        loss.backward()
        return loss

    step(lambda: None)
    before = peak.count_bytes(step, torch.device("cpu"))
    monkeypatch.setattr(peak, "legacy_memory_events", lambda: None)
    after = peak.count_bytes(step, torch.device("cpu"))
    assert (after.peak, after.end, after.marks, after.peaks) == (
        before.peak,
        before.end,
        before.marks,
        before.peaks,
    )
    assert before.marks[0] >= 32 * 32 * 4


@pytest.mark.cuda
def test_the_allocator_tells_its_settings_and_a_gpu_can_be_kept_busy() -> None:
    torch.ones(1, device="cuda")
    assert private.expandable_segments_are_on() in (True, False)
    private.keep_gpu_busy(1000)
    torch.cuda.synchronize()


# ---- modules and optimizers ------------------------------------------------------------------------------


def test_every_norm_and_every_convolution_is_of_its_kind() -> None:
    assert issubclass(nn.BatchNorm3d, private.NormBase)
    assert issubclass(nn.SyncBatchNorm, private.NormBase)
    assert issubclass(nn.ConvTranspose1d, private.Convolution)
    assert not issubclass(nn.Linear, private.Convolution)


def test_optimizers_of_tensors_on_a_cpu_step_them_one_by_one_and_lose_hooks_of_a_copy() -> None:
    parameter = nn.Parameter(torch.ones(1))
    assert private.default_foreach([parameter], False) is False
    optimizer, seen = torch.optim.SGD([parameter], lr=0.1), list[int]()
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer.register_step_post_hook(lambda *_: seen.append(2))
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert seen == [1, 2]
    private.drop_step_hooks(optimizer)
    optimizer.step()
    assert seen == [1, 2]


def test_cached_parametrizations_are_known() -> None:
    assert not private.parametrizations_are_cached()
    with parametrize.cached():
        assert private.parametrizations_are_cached()
    assert not private.parametrizations_are_cached()


def test_fully_sharded_state_is_found_by_a_twin() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed import _composable_state as composable

    model, twin, plain = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    state = composable._State()
    composable._insert_module_state(model, state)
    private.share_fsdp_state(model, twin)
    private.share_fsdp_state(plain, nn.Linear(1, 1))  # has none, and gives none
    assert composable._get_module_state(twin) is state


# ---- patches ---------------------------------------------------------------------------------------------


class _Base:
    name = "base"


class _Derived(_Base):
    pass


def test_what_is_replaced_is_put_back_where_it_was() -> None:
    with private.replaced(_Derived, name="other"):
        assert (_Derived.name, _Base.name) == ("other", "base")
    assert "name" not in vars(_Derived)
    with pytest.raises(KeyError), private.replaced(random, random=lambda: dict[str, float]()["met"], other=1):
        random.random()
    assert 0 <= random.random() < 1
    assert not hasattr(random, "other")
    given: dict[str, Any] = {"a": 1}
    with private.replaced(given, a=2, b=3):
        assert given == {"a": 2, "b": 3}
    assert given == {"a": 1}
    bound = torch.autograd.Function.__dict__["apply"]
    with private.replaced(torch.autograd.Function, apply=classmethod(lambda cls, *_: cls)):
        assert _Double.apply(1) is _Double
    assert torch.autograd.Function.__dict__["apply"] is bound
    with pytest.raises(TypeError), private.replaced(int, real=1):
        pass


def test_flags_of_the_compiler_and_functions_that_are_replaced_exist() -> None:
    assert vars(torch.compiler)["_is_compiling_flag"] is False
    assert vars(torch.compiler)["_is_exporting_flag"] is False
    for owner, names in (
        (torch.autograd, ("grad", "backward")),
        (Tensor, ("register_hook", "backward")),
        (nn.Module, ("zero_grad", "_compiled_call_impl", "_call_impl")),
        (torch.optim.Optimizer, ("zero_grad",)),
    ):
        for name in names:
            assert hasattr(owner, name), name


# ---- Inductor --------------------------------------------------------------------------------------------


class _Dropped(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.dropout(torch.nn.functional.gelu(x @ w), 0.5, True) @ w.T,)


@pytest.mark.slow
def test_a_graph_is_compiled_at_a_share_with_the_masks_of_its_forward() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = torch.randn(32, 16, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    graph = make_fx(_Dropped())(x.detach(), w.detach())
    found = []
    for share in (1.0, 0.1):
        function = private.compile_graph(graph, [x, w], share)
        torch.manual_seed(0)
        (y,) = function(x, w)
        private.allow_retained_graphs([y])
        gradients = [torch.autograd.grad(y.square().sum(), [x, w], retain_graph=True) for _ in range(2)]
        assert all(map(equal_bits, *gradients))
        found.append([y.detach(), *gradients[0]])
    assert all(map(equal_bits, *found))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    assert not private.no_compiler("cpu")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "no C++ compiler" in private.no_compiler("cpu")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton" in private.no_compiler("cuda")
